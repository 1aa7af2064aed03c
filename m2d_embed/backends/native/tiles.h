// Transformer blocks with bfloat16 or int8 products of tiles, all else in float32.
//
// How tiles are multiplied is up to the file that includes this: amx.c leaves it to Intel's matrix unit, avx512.c does
// it with vectors. Such a file defines the functions that are declared here without a body, and these constants:
//   CHUNK_ROWS           tokens that go through a block together: more reuse of the weights, less of the cache;
//   HIDDEN_BYTES         of an MLP between its layers: what a core's own cache holds beside all else;
//   LEVELS_ARE_UNSIGNED  whether int8 values of A are stored with 128 added.
//
// A block takes few passes over memory: what is between two matrix products (normalisation, GELU, softmax, rounding) is
// done while the values are in the cache, and written in the order in which the next product reads it.
//
// A tile is 16 rows of 64 bytes. Of a product A B there are
//   A tiles: 16 rows of 32 bf16 (64 int8) consecutive values along the inner dimension;
//   B tiles: 16 rows, each 2 bf16 (4 int8) consecutive values along the inner dimension for each of 16 columns.
// All matrices here are arrays of such tiles, [row or column tile][step along the inner dimension]. Rows are tokens.
// For attention every window begins with a new tile, and rows beyond its tokens hold zeros or results of zeros;
// after it all tokens of a chunk follow one another, and rows beyond the last may hold anything.

#ifndef M2D_TILES_H
#define M2D_TILES_H

#include "ahead.h"
#include "memory.h"
#include "outputs.h"
#include "probe.h"
#include "teams.h"
#include "vec.h"

#ifdef M2D_GENERIC
#include "generic.h"
#endif

enum {
  TILE = 1024,  // bytes
  TILE_ROWS = 16,    // of a tile
  PAIR = 32,    // columns that are computed together, two tiles
};

// --- vectors -------------------------------------------------------------------------------------------------------

INLINE __m512 load_bf16(const uint16_t* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// 32 values as bf16, `low` first.
INLINE __m512i as_bf16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// 2^t for t <= 0, to 3e-6.
INLINE __m512 exp2_of(__m512 t) {
  __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 rest = _mm512_sub_ps(t, whole);  // in [-0.5, 0.5]
  __m512 p = _mm512_set1_ps(0.009570100f);
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.055917859f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.24024744f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.69312179f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.99999928f));
  return _mm512_scalef_ps(p, whole);
}

// x * Phi(x) to 3e-5 max(1, |x|), less than what rounding to bf16 changes in values above 0.02. Phi is one of 32
// parabolas, each 0.26 wide, fitted at Chebyshev nodes; their coefficients are looked up by the lowest five bits of a
// number.
INLINE __m512 gelu(__m512 x) {
  static const float coefficients[3][32] __attribute__((aligned(64))) = {
      {0.5f,         0.499108702f, 0.49310115f,    0.483281225f,   0.47881344f,   0.492108881f,  0.531585276f,
       0.596771419f, 0.678538322f, 0.763551772f,   0.839752138f,   0.899934351f,  0.942391694f,  0.969395339f,
       0.984981477f, 0.993185461f, 0.00286167557f, 0.00681451662f, 0.0150185032f, 0.0306046419f, 0.0576083101f,
       0.100065663f, 0.160247847f, 0.236448243f,   0.321461678f,   0.403228581f,  0.468414754f,  0.507891119f,
       0.52118659f,  0.516718805f, 0.50689888f,    0.500891328f},
      {0.398101121f,   0.410916626f,   0.44191727f,   0.472665071f,   0.483080268f,   0.460829705f,  0.405889362f,
       0.32881403f,    0.244873583f,   0.167790934f,  0.105933651f,   0.0617139153f,  0.0332221352f, 0.0165469851f,
       0.00763383973f, 0.00326530216f, 0.0012960668f, 0.00326530216f, 0.00763383973f, 0.0165469851f, 0.0332221352f,
       0.0617139153f,  0.105933651f,   0.167790934f,  0.244873583f,   0.32881403f,    0.405889362f,  0.460829705f,
       0.483080268f,   0.472665071f,   0.44191727f,   0.410916626f},
      {0.0f,           -0.0499838591f,  -0.0903473198f,  -0.114489488f,    -0.120549962f,   -0.111235507f,
       -0.0921074152f, -0.0693130195f,  -0.0477621369f,  -0.0302842446f,   -0.0177279338f,  -0.00960368849f,
       -0.0048229997f, -0.00224839803f, -0.00097399106f, -0.000392390415f, 0.000147112762f, 0.000392390415f,
       0.00097399106f, 0.00224839803f,  0.0048229997f,   0.00960368849f,   0.0177279338f,   0.0302842446f,
       0.0477621369f,  0.0693130195f,   0.0921074152f,   0.111235507f,     0.120549962f,    0.114489488f,
       0.0903473198f,  0.0499838591f}};
  __m512 c = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(4.02974f)), _mm512_set1_ps(-4.28974f));
  // Adding 1.5 * 2^23 leaves c / 0.26, rounded to a whole number, in the lowest bits.
  __m512i which = _mm512_castps_si512(_mm512_fmadd_ps(c, _mm512_set1_ps(1 / 0.26f), _mm512_set1_ps(12582912.0f)));
  __m512 p[3];
  for (int i = 0; i < 3; i++) {
    p[i] = _mm512_permutex2var_ps(_mm512_load_ps(coefficients[i]), which, _mm512_load_ps(coefficients[i] + 16));
  }
  return _mm512_mul_ps(x, _mm512_fmadd_ps(_mm512_fmadd_ps(p[2], c, p[1]), c, p[0]));
}

// A tile of 16 x 16 values of 4 bytes, transposed.
INLINE void transpose_tile(const uint8_t from[TILE_ROWS][64], uint8_t* to) {
  __m512 r[TILE_ROWS];
  for (int i = 0; i < TILE_ROWS; i++) r[i] = _mm512_load_ps(from[i]);
  v_transpose(r);
  for (int i = 0; i < TILE_ROWS; i++) _mm512_store_ps(to + 64 * i, r[i]);
}

// The sum or the greatest of each of 16 vectors, as one vector. It changes v.
INLINE __m512 reduce(__m512 v[16], int greatest) {
#define COMBINE(a, b) (greatest ? _mm512_max_ps(a, b) : _mm512_add_ps(a, b))
  for (int i = 0; i < 8; i++) {
    v[i] = COMBINE(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  }
  for (int i = 0; i < 4; i++) {
    __m512d a = _mm512_castps_pd(v[2 * i]), b = _mm512_castps_pd(v[2 * i + 1]);
    v[i] = COMBINE(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int count = 2; count >= 1; count /= 2) {
    for (int i = 0; i < count; i++) {
      v[i] = COMBINE(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88),
                     _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd));
    }
  }
  return v[0];
#undef COMBINE
}

// --- scratch -------------------------------------------------------------------------------------------------------

typedef struct {
  int64_t dim, hidden, heads, head_dim;
  int64_t tokens, token_tiles, token_steps;  // of a window; a step of the product with V is 32 tokens
  int64_t windows;                           // of a chunk
  int64_t members;                           // of a team, at most
  int64_t rows;                              // of a chunk
  int64_t part;                              // hidden values that are between the layers of the MLP at a time
  int64_t attention_bytes;                   // for each member of a team
  int quantized;
} Shape;

typedef struct {
  uint8_t* rounded;      // A tiles of norm1, of attention, of norm2
  uint8_t *q, *k, *v;    // for each window and head: A tiles, B tiles, B tiles
  uint8_t* hidden;       // A tiles
  uint8_t* unquantized;  // bf16, in the order of A tiles, before it is rounded to int8
  float* row_scales;     // int8: the scale of each row of `rounded`; else NULL
  float* hidden_scales;  // and of `hidden`
  uint8_t* attention;    // for each member of the team: scores and weights of 32 queries
} Scratch;

static Shape shape_of(const Call* call) {
  const Block* block = call->blocks;
  Shape s = {.dim = block->dim, .hidden = block->hidden, .heads = block->heads, .quantized = block->quantized};
  s.head_dim = s.dim / s.heads;
  s.tokens = call->tokens;
  s.token_tiles = rounded_up(s.tokens, TILE_ROWS) / TILE_ROWS;
  s.token_steps = (s.token_tiles + 1) / 2;
  s.windows = at_least(1, CHUNK_ROWS / (s.token_tiles * TILE_ROWS));
  int64_t teams = num_teams(call->windows, call->threads);
  s.windows = at_most(s.windows, (call->windows + teams - 1) / teams);
  s.members = (call->threads + teams - 1) / teams;
  s.rows = s.windows * s.token_tiles * TILE_ROWS;
  // Whatever the number of windows, so that a window's values do not depend on the others, not even in their rounding.
  int64_t parts = (CHUNK_ROWS * s.hidden * 2 + HIDDEN_BYTES - 1) / HIDDEN_BYTES;
  s.part = rounded_up((s.hidden + parts - 1) / parts, 64);
  s.attention_bytes = 2 * TILE_ROWS * s.token_steps * PAIR * (4 + 2);
  return s;
}

// How many bytes it takes; without a base that is all.
static int64_t lay_out(const Shape* s, uint8_t* base, Scratch* scratch) {
  Memory memory = {base, 0};
  scratch->rounded = take(&memory, s->rows * s->dim * 2);
  scratch->q = take(&memory, s->rows * s->dim * 2);
  scratch->k = take(&memory, s->rows * s->dim * 2);
  scratch->v = take(&memory, s->windows * s->token_steps * 2 * TILE_ROWS * s->dim * 2);
  scratch->hidden = take(&memory, s->rows * s->part * 2);
  scratch->unquantized = take(&memory, s->quantized ? s->rows * at_least(s->dim, s->part) * 2 : 0);
  scratch->row_scales = take(&memory, s->quantized ? s->rows * 4 : 0);
  scratch->hidden_scales = take(&memory, s->quantized ? s->rows * 4 : 0);
  scratch->attention = take(&memory, s->members * s->attention_bytes);
  return memory.used;
}

// Bytes of scratch for a call.
static int64_t bytes_of_scratch(const Call* call) {
  Shape shape = shape_of(call);
  Scratch scratch;
  return num_teams(call->windows, call->threads) * lay_out(&shape, NULL, &scratch);
}

// --- products ------------------------------------------------------------------------------------------------------

// Where a layer's output goes.
typedef enum { TO_HEADS, TO_RESIDUAL, TO_HIDDEN } Destination;

typedef struct {
  const Shape* shape;
  const Scratch* scratch;
  Team team;
  float* x;         // of the chunk's first window
  int64_t windows;  // of this chunk
} Chunk;

enum { ROW_PAIRS = TILE_ROWS / 2 };

// What a layer multiplies with: all of its matrix, or what has to do with some of its inputs or outputs.
typedef struct {
  const uint8_t* weight;  // B tiles, those of a column `stride` bytes after the ones before
  int64_t stride, steps, outputs;
  const float *scales, *bias;  // bias as it is in the model, in float32 or bf16
  int bias_is_bf16;
} Matrix;

INLINE Matrix matrix_of(const Linear* linear, int64_t inputs, int64_t outputs, int is_int8) {
  int64_t steps = inputs / (is_int8 ? 64 : 32);
  return (Matrix){linear->weight, steps * TILE, steps, outputs, linear->scales, linear->bias, linear->bias_format == BFLOAT16};
}

// Those from one on, if there are any: int8 alone has them.
INLINE const float* scales_from(const float* scales, int64_t first) { return scales ? scales + first : NULL; }

INLINE Matrix outputs_from(Matrix m, int64_t first, int64_t count) {
  m.weight += first / 16 * m.stride, m.scales = scales_from(m.scales, first), m.outputs = count;
  if (m.bias) m.bias = (const float*)((const uint8_t*)m.bias + first * (m.bias_is_bf16 ? 2 : 4));
  return m;
}

// The bias is added to the product of the first inputs.
INLINE Matrix inputs_from(Matrix m, int64_t first, int64_t count, int is_int8) {
  int64_t values = is_int8 ? 64 : 32;
  m.weight += first / values * TILE, m.steps = count / values;
  if (first) m.bias = NULL;
  return m;
}

INLINE __m512 load_bias(const Matrix* m, int64_t column) {
  if (!m->bias) return _mm512_setzero_ps();
  return m->bias_is_bf16 ? load_bf16((const uint16_t*)m->bias + column) : _mm512_loadu_ps(m->bias + column);
}

// Which 32 columns of a layer's output.
typedef struct {
  int64_t pair;
  int part;             // of query, key and value
  int64_t head, step;   // and which columns of which head
  const float* scales;  // int8
  float bias[PAIR] __attribute__((aligned(64)));
  int32_t surplus[PAIR] __attribute__((aligned(64)));  // of sums of products with unsigned levels
} Columns;

// What 16 columns of B, a column of tiles, add to sums because levels are unsigned.
INLINE __m512i surplus_of(const uint8_t* b, int64_t steps);

INLINE void choose_columns(Columns* c, const Shape* s, const Matrix* m, Destination destination, int64_t pair) {
  c->pair = pair;
  if (LEVELS_ARE_UNSIGNED && s->quantized) {
    const uint8_t* b = m->weight + 2 * pair * m->stride;
    _mm512_store_si512(c->surplus, surplus_of(b, m->steps));
    _mm512_store_si512(c->surplus + 16, surplus_of(b + m->stride, m->steps));
  }
  c->scales = scales_from(m->scales, pair * PAIR);
  _mm512_store_ps(c->bias, load_bias(m, pair * PAIR));
  _mm512_store_ps(c->bias + 16, load_bias(m, pair * PAIR + 16));
  if (destination != TO_HEADS) return;
  int64_t column = pair * PAIR % s->dim;
  c->part = (int)(pair * PAIR / s->dim), c->head = column / s->head_dim, c->step = column % s->head_dim / PAIR;
}

// A product of 32 rows and 32 columns whose sums are known, and which is finished bit by bit beside the next product:
// the matrix unit and the vector units work at the same time.
typedef struct {
  float c[2][2][TILE_ROWS][16];  // [row tile][column tile], float32 or int32
  uint8_t keys[TILE_ROWS][64];   // before they are transposed
  Columns columns;
  const float* row_scales;  // int8: of the first row
  int done, total;          // pairs of rows
  struct {
    uint8_t *to, *to_high;  // A or B tiles; of values, those of the second 16 columns
    float* x;
    int valid;  // rows of x
    int ends;   // half of a tile of values is left over
  } halves[2];  // the row tiles
} __attribute__((aligned(64))) Pending;

// Which row tiles: the first of two.
typedef struct {
  int64_t tile;  // of the chunk
  int64_t window, token_tile;
} Rows;

INLINE Rows next_tile(Rows rows, const Shape* s) {
  rows.tile++;
  if (++rows.token_tile == s->token_tiles) rows.window++, rows.token_tile = 0;
  return rows;
}

// Those of the window in this row tile and those after it.
INLINE int64_t tokens_from(Rows rows, const Shape* s) { return s->tokens - rows.token_tile * TILE_ROWS; }

INLINE float* residual_of(const Chunk* chunk, Rows rows, int64_t pair) {
  const Shape* s = chunk->shape;
  return chunk->x + (rows.window * s->tokens + rows.token_tile * TILE_ROWS) * s->dim + pair * PAIR;
}

INLINE void prepare(Pending* p, const Chunk* chunk, const Columns* columns, Destination destination, Rows rows,
                    int row_tiles, const float* row_scales, int64_t outputs) {
  const Shape* s = chunk->shape;
  const Scratch* scratch = chunk->scratch;
  p->done = 0, p->total = row_tiles * ROW_PAIRS;
  p->columns = *columns;
  p->row_scales = scales_from(row_scales, rows.tile * TILE_ROWS);
  for (int i = 0; i < row_tiles; i++, rows = next_tile(rows, s)) {
    if (destination == TO_RESIDUAL) {
      p->halves[i].x = residual_of(chunk, rows, columns->pair);
      p->halves[i].valid = (int)at_most(TILE_ROWS, tokens_from(rows, s));
    } else if (destination == TO_HIDDEN) {
      uint8_t* hidden = s->quantized ? scratch->unquantized : scratch->hidden;
      p->halves[i].to = hidden + (rows.tile * (outputs / PAIR) + columns->pair) * TILE;
    } else {
      int64_t steps = s->head_dim / PAIR, head = rows.window * s->heads + columns->head;
      if (columns->part < 2) {
        uint8_t* to = columns->part == 0 ? scratch->q : scratch->k;
        p->halves[i].to = to + ((head * s->token_tiles + rows.token_tile) * steps + columns->step) * TILE;
      } else {
        int64_t to_next = s->token_steps * TILE;
        p->halves[i].to = scratch->v + (head * (s->head_dim / TILE_ROWS) + 2 * columns->step) * to_next +
                          rows.token_tile / 2 * TILE + rows.token_tile % 2 * (TILE / 2);
        p->halves[i].to_high = p->halves[i].to + to_next;
        p->halves[i].ends = rows.token_tile % 2 == 0 && rows.token_tile == s->token_tiles - 1;
      }
    }
  }
}

INLINE void finish_heads(Pending* p, int i, int r, const __m512 low[2], const __m512 high[2]) {
  uint8_t* to = p->halves[i].to;
  if (p->columns.part == 0) {
    _mm512_store_si512(to + 64 * r, as_bf16(low[0], high[0]));
    _mm512_store_si512(to + 64 * r + 64, as_bf16(low[1], high[1]));
  } else if (p->columns.part == 1) {
    _mm512_store_si512(p->keys[r], as_bf16(low[0], high[0]));
    _mm512_store_si512(p->keys[r + 1], as_bf16(low[1], high[1]));
    if (r + 2 == TILE_ROWS) transpose_tile(p->keys, to);
  } else {
    const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                                 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    uint8_t* to_high = p->halves[i].to_high;
    _mm512_store_si512(to + 32 * r, _mm512_permutexvar_epi16(interleaved, as_bf16(low[0], low[1])));
    _mm512_store_si512(to_high + 32 * r, _mm512_permutexvar_epi16(interleaved, as_bf16(high[0], high[1])));
    if (p->halves[i].ends) {  // the weights there are 0, but 0 * NaN is not
      _mm512_store_si512(to + TILE / 2 + 32 * r, _mm512_setzero_si512());
      _mm512_store_si512(to_high + TILE / 2 + 32 * r, _mm512_setzero_si512());
    }
  }
}

INLINE void finish_residual(Pending* p, int i, int r, int64_t dim, const __m512 low[2], const __m512 high[2]) {
  float* x = p->halves[i].x + r * dim;
  for (int j = 0; j < 2 && r + j < p->halves[i].valid; j++, x += dim) {
    _mm512_storeu_ps(x, _mm512_add_ps(_mm512_loadu_ps(x), low[j]));
    _mm512_storeu_ps(x + 16, _mm512_add_ps(_mm512_loadu_ps(x + 16), high[j]));
  }
}

INLINE void finish_hidden(Pending* p, int i, int r, const __m512 low[2], const __m512 high[2]) {
  uint8_t* to = p->halves[i].to + 64 * r;
  for (int j = 0; j < 2; j++) _mm512_store_si512(to + 64 * j, as_bf16(gelu(low[j]), gelu(high[j])));
}

INLINE __m512 sums_of_levels(__m512 bits, const int32_t* surplus) {
  __m512i sums = _mm512_castps_si512(bits);
  if (LEVELS_ARE_UNSIGNED) sums = _mm512_sub_epi32(sums, _mm512_load_si512(surplus));
  return _mm512_cvtepi32_ps(sums);
}

// The next two rows.
INLINE void finish_rows(Pending* p, int64_t dim, Destination destination, int is_int8) {
  int i = p->done / ROW_PAIRS, r = p->done % ROW_PAIRS * 2;
  __m512 low[2], high[2], bias_low = _mm512_load_ps(p->columns.bias), bias_high = _mm512_load_ps(p->columns.bias + 16);
  for (int j = 0; j < 2; j++) {
    low[j] = _mm512_load_ps(p->c[i][0][r + j]), high[j] = _mm512_load_ps(p->c[i][1][r + j]);
    if (is_int8) {
      __m512 scale = _mm512_set1_ps(p->row_scales[TILE_ROWS * i + r + j]);
      low[j] = _mm512_mul_ps(sums_of_levels(low[j], p->columns.surplus), scale);
      high[j] = _mm512_mul_ps(sums_of_levels(high[j], p->columns.surplus + 16), scale);
      low[j] = _mm512_fmadd_ps(low[j], _mm512_loadu_ps(p->columns.scales), bias_low);
      high[j] = _mm512_fmadd_ps(high[j], _mm512_loadu_ps(p->columns.scales + 16), bias_high);
    } else {
      low[j] = _mm512_add_ps(low[j], bias_low), high[j] = _mm512_add_ps(high[j], bias_high);
    }
  }
  if (destination == TO_HEADS) finish_heads(p, i, r, low, high);
  if (destination == TO_RESIDUAL) finish_residual(p, i, r, dim, low, high);
  if (destination == TO_HIDDEN) finish_hidden(p, i, r, low, high);
  p->done++;
}

// The pairs of columns of a layer's output that a member of a team computes.
INLINE Share pairs_of(Team team, int64_t outputs) { return share_of(team, outputs / PAIR); }

// Two columns of tiles of B, from `pair` of them to `stop`, or of the matrix that is used after it.
INLINE Ahead ahead_of(const Matrix* m, Share pairs, const Matrix* then, Team team, int64_t products) {
  if (pairs.first == pairs.stop && then) m = then, pairs = pairs_of(team, then->outputs);
  int64_t lines = m->steps * (TILE / LINE), runs = pairs.first < pairs.stop ? 2 : 0;
  int64_t at_once = (2 * lines + products - 1) / products;
  return (Ahead){m->weight + 2 * pairs.first * m->stride, lines, lines, runs, m->stride - m->steps * TILE, at_once};
}

// What a product is going to be added to, too, which is used when the next one is computed.
INLINE void fetch_residual(const Chunk* chunk, Rows rows, int row_tiles, int64_t pair) {
  for (int i = 0; i < row_tiles; i++, rows = next_tile(rows, chunk->shape)) {
    const float* x = residual_of(chunk, rows, pair);
    for (int r = 0; r < TILE_ROWS; r++, x += chunk->shape->dim) {  // beyond the last token this does nothing
      _mm_prefetch(x, _MM_HINT_T0);
      _mm_prefetch(x + 16, _MM_HINT_T0);
    }
  }
}

// What can go on beside a product: one piece of it for each step along the inner dimension.
typedef struct {
  Ahead* ahead;
  Pending* last;
  int64_t dim;
  Destination destination;
  int is_int8;
} Beside;

INLINE void finish_some(const Beside* beside) {
  Pending* last = beside->last;
  if (last->done < last->total) finish_rows(last, beside->dim, beside->destination, beside->is_int8);
}

// Row tiles of A, one after the other, and two column tiles of B.
typedef struct {
  const uint8_t *a, *b;
  int64_t b_stride, steps;  // bytes from one column tile to the next; tiles along the inner dimension
  int64_t rows[2];          // that hold tokens, of each row tile; it may be more than there are. Of the others any
                            // finite number may come
} Factors;

// Where sums go: bytes from a row to the next, a column tile to the next, a row tile to the next.
typedef struct {
  void* c;
  int64_t row, column_tile, row_tile;
} Sums;

INLINE Sums one_by_one(void* tiles) { return (Sums){tiles, 64, TILE, 2 * TILE}; }

// One or two row tiles of A times two column tiles of B, float32 or int32. Something may be done beside it, or nothing
// (NULL).
INLINE void multiply(Factors factors, int row_tiles, int is_int8, Sums sums, const Beside* beside);

INLINE void product(Factors factors, int row_tiles, Pending* next, const Beside* beside) {
  multiply(factors, row_tiles, beside->is_int8, one_by_one(next->c), beside);
  while (beside->last->done < beside->last->total) finish_some(beside);
}

// A layer, or part of it, for all rows of the chunk: a are their A tiles. While the last of it is multiplied, `then` is
// fetched, the matrix of the next layer, or NULL.
INLINE void layer(const Chunk* chunk, Matrix m, const uint8_t* a, const float* row_scales, Destination destination,
                  int is_int8, const Matrix* then) {
  const Shape* s = chunk->shape;
  Pending turns[2];
  turns[0].done = turns[0].total = turns[1].done = turns[1].total = 0;
  int turn = 0;
  int64_t tiles = chunk->windows * s->token_tiles;
  Share pairs = pairs_of(chunk->team, m.outputs);
  for (int64_t pair = pairs.first; pair < pairs.stop; pair++) {
    const uint8_t* b = m.weight + pair * 2 * m.stride;
    Ahead ahead = ahead_of(&m, (Share){pair + 1, pairs.stop}, then, chunk->team, m.steps * ((tiles + 1) / 2));
    Columns columns;
    choose_columns(&columns, s, &m, destination, pair);
    for (Rows rows = {0, 0, 0}; rows.tile < tiles; rows = next_tile(next_tile(rows, s), s)) {
      Pending *next = &turns[turn], *last = &turns[1 - turn];
      int row_tiles = rows.tile + 1 < tiles ? 2 : 1;
      if (destination == TO_RESIDUAL) fetch_residual(chunk, rows, row_tiles, pair);
      Beside beside = {&ahead, last, s->dim, destination, is_int8};
      int64_t here = tokens_from(rows, s), below = tokens_from(next_tile(rows, s), s);
      Factors factors = {a + rows.tile * m.steps * TILE, b, m.stride, m.steps, {here, below}};
      if (row_tiles == 2) {
        product(factors, 2, next, &beside);
      } else {
        product(factors, 1, next, &beside);
      }
      prepare(next, chunk, &columns, destination, rows, row_tiles, row_scales, m.outputs);
      turn = 1 - turn;
    }
  }
  for (Pending* last = &turns[1 - turn]; last->done < last->total;) finish_rows(last, s->dim, destination, is_int8);
}

// --- what is between products --------------------------------------------------------------------------------------

// Round 64 values to int8: to = value / step; if levels are unsigned, 128 stands for 0.
INLINE void round_to_int8(const __m512 values[4], __m512 reciprocal, uint8_t* to) {
  for (int i = 0; i < 4; i++) {
    __m128i levels = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(values[i], reciprocal)));
    if (LEVELS_ARE_UNSIGNED) levels = _mm_xor_si128(levels, _mm_set1_epi8((char)0x80));
    _mm_store_si128((__m128i*)(to + 16 * i), levels);
  }
}

// The scale of int8 for which `largest` is 127.
INLINE __m512 steps_of(__m512 largest) {
  return _mm512_mul_ps(_mm512_max_ps(largest, _mm512_set1_ps(1e-12f)), _mm512_set1_ps(1.0f / 127.0f));
}

INLINE __m512 normalized(__m512 x, const Norm* norm, int64_t column, __m512 mean, __m512 factor) {
  x = _mm512_mul_ps(_mm512_sub_ps(x, mean), factor);
  if (norm->weight) x = _mm512_mul_ps(x, _mm512_loadu_ps(norm->weight + column));
  return norm->bias ? _mm512_add_ps(x, _mm512_loadu_ps(norm->bias + column)) : x;
}

// Up to 16 rows of x, normalised, as a row tile of A; what is missing is 0.
INLINE void norm_tile(const float* x, int64_t rows, const Norm* norm, int64_t dim, uint8_t* to, int is_int8,
                      float* scales) {
  float means[TILE_ROWS], factors[TILE_ROWS], reciprocals[TILE_ROWS];
  __m512 v[TILE_ROWS];
  for (int r = 0; r < TILE_ROWS; r++) {
    v[r] = _mm512_setzero_ps();
    if (r >= rows) continue;
    for (int64_t i = 0; i < dim; i += 16) v[r] = _mm512_add_ps(v[r], _mm512_loadu_ps(x + r * dim + i));
  }
  __m512 share = _mm512_set1_ps(1.0f / dim);
  _mm512_storeu_ps(means, _mm512_mul_ps(reduce(v, 0), share));
  for (int r = 0; r < TILE_ROWS; r++) {
    v[r] = _mm512_setzero_ps();
    if (r >= rows) continue;
    __m512 mean = _mm512_set1_ps(means[r]);
    for (int64_t i = 0; i < dim; i += 16) {
      __m512 centred = _mm512_sub_ps(_mm512_loadu_ps(x + r * dim + i), mean);
      v[r] = _mm512_fmadd_ps(centred, centred, v[r]);
    }
  }
  __m512 deviation = _mm512_sqrt_ps(_mm512_fmadd_ps(reduce(v, 0), share, _mm512_set1_ps(norm->eps)));
  _mm512_storeu_ps(factors, _mm512_div_ps(_mm512_set1_ps(1.0f), deviation));
  if (is_int8) {
    for (int r = 0; r < TILE_ROWS; r++) {
      v[r] = _mm512_setzero_ps();
      if (r >= rows) continue;
      __m512 mean = _mm512_set1_ps(means[r]), factor = _mm512_set1_ps(factors[r]);
      for (int64_t i = 0; i < dim; i += 16) {
        v[r] = _mm512_max_ps(v[r], _mm512_abs_ps(normalized(_mm512_loadu_ps(x + r * dim + i), norm, i, mean, factor)));
      }
    }
    __m512 steps = steps_of(reduce(v, 1));
    _mm512_storeu_ps(scales, steps);
    _mm512_storeu_ps(reciprocals, _mm512_div_ps(_mm512_set1_ps(1.0f), steps));
  }
  for (int r = 0; r < TILE_ROWS; r++) {
    uint8_t* tile_row = to + 64 * r;
    if (r >= rows) {
      int64_t steps = dim / (is_int8 ? 64 : 32);
      for (int64_t k = 0; k < steps; k++) _mm512_store_si512(tile_row + k * TILE, _mm512_setzero_si512());
      continue;
    }
    __m512 mean = _mm512_set1_ps(means[r]), factor = _mm512_set1_ps(factors[r]), values[4];
    for (int64_t i = 0; i < dim; i += is_int8 ? 64 : 32, tile_row += TILE) {
      for (int j = 0; j < (is_int8 ? 4 : 2); j++) {
        values[j] = normalized(_mm512_loadu_ps(x + r * dim + i + 16 * j), norm, i + 16 * j, mean, factor);
      }
      if (is_int8) {
        round_to_int8(values, _mm512_set1_ps(reciprocals[r]), tile_row);
      } else {
        _mm512_store_si512(tile_row, as_bf16(values[0], values[1]));
      }
    }
  }
}

INLINE void norm_rows(const Chunk* chunk, const Norm* norm, int is_int8) {
  const Shape* s = chunk->shape;
  int64_t steps = s->dim / (is_int8 ? 64 : 32);
  Share tiles = share_of(chunk->team, chunk->windows * s->token_tiles);
  for (int64_t tile = tiles.first; tile < tiles.stop; tile++) {
    int64_t token = tile % s->token_tiles * TILE_ROWS;
    const float* x = chunk->x + (tile / s->token_tiles * s->tokens + token) * s->dim;
    float* scales = is_int8 ? chunk->scratch->row_scales + tile * TILE_ROWS : NULL;
    norm_tile(x, s->tokens - token, norm, s->dim, chunk->scratch->rounded + tile * steps * TILE, is_int8, scales);
  }
}

// bf16 in the order of A tiles -> int8 A tiles, with a scale for each row.
static void quantize_rows(const Chunk* chunk, int64_t columns, uint8_t* to, float* scales) {
  int64_t steps = columns / PAIR;
  Share share = share_of(chunk->team, chunk->windows * chunk->shape->token_tiles);
  for (int64_t tile = share.first; tile < share.stop; tile++) {
    const uint8_t* from = chunk->scratch->unquantized + tile * steps * TILE;
    uint8_t* out = to + tile * (steps / 2) * TILE;
    float reciprocals[TILE_ROWS];
    __m512 v[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; r++) {
      __m512i largest = _mm512_setzero_si512();  // without their signs, bf16 are in the order of whole numbers
      for (int64_t k = 0; k < steps; k++) {
        __m512i magnitudes = _mm512_and_si512(_mm512_load_si512(from + k * TILE + 64 * r), _mm512_set1_epi16(0x7fff));
        largest = _mm512_max_epu16(largest, magnitudes);
      }
      __m512i even = _mm512_slli_epi32(largest, 16), odd = _mm512_and_si512(largest, _mm512_set1_epi32(0xffff0000));
      v[r] = _mm512_castsi512_ps(_mm512_max_epu32(even, odd));
    }
    __m512 worth = steps_of(reduce(v, 1));
    _mm512_storeu_ps(scales + tile * TILE_ROWS, worth);
    _mm512_storeu_ps(reciprocals, _mm512_div_ps(_mm512_set1_ps(1.0f), worth));
    for (int r = 0; r < TILE_ROWS; r++) {
      __m512 reciprocal = _mm512_set1_ps(reciprocals[r]), values[4];
      for (int64_t k = 0; k < steps; k += 2) {
        for (int j = 0; j < 4; j++) {
          values[j] = load_bf16((const uint16_t*)(from + (k + j / 2) * TILE + 64 * r) + j % 2 * 16);
        }
        round_to_int8(values, reciprocal, out + k / 2 * TILE + 64 * r);
      }
    }
  }
}

// --- attention -----------------------------------------------------------------------------------------------------

// exp(score - greatest) of 16 queries, as a row tile of A; `reciprocals` are of their sums.
INLINE void softmax(const float* scores, int64_t tokens, int64_t width, float factor, uint8_t* to, float* reciprocals) {
  int64_t whole = tokens / PAIR, steps = width / PAIR;
  __mmask16 low = (__mmask16)((1u << at_most(16, tokens % PAIR)) - 1);
  __mmask16 high = (__mmask16)((1u << at_least(0, tokens % PAIR - 16)) - 1);
  float offsets[TILE_ROWS];
  __m512 v[TILE_ROWS];
  for (int r = 0; r < TILE_ROWS; r++) {
    const float* row = scores + r * width;
    __m512 greatest[2] = {_mm512_set1_ps(-__builtin_inff()), _mm512_set1_ps(-__builtin_inff())};
    for (int64_t i = 0; i < whole; i++) {
      greatest[0] = _mm512_max_ps(greatest[0], _mm512_load_ps(row + i * PAIR));
      greatest[1] = _mm512_max_ps(greatest[1], _mm512_load_ps(row + i * PAIR + 16));
    }
    if (whole < steps) {
      greatest[0] = _mm512_mask_max_ps(greatest[0], low, greatest[0], _mm512_load_ps(row + whole * PAIR));
      greatest[1] = _mm512_mask_max_ps(greatest[1], high, greatest[1], _mm512_load_ps(row + whole * PAIR + 16));
    }
    v[r] = _mm512_max_ps(greatest[0], greatest[1]);
  }
  __m512 scale = _mm512_set1_ps(factor);
  _mm512_storeu_ps(offsets, _mm512_mul_ps(reduce(v, 1), scale));
  for (int r = 0; r < TILE_ROWS; r++) {
    const float* row = scores + r * width;
    __m512 offset = _mm512_set1_ps(offsets[r]), e[2], sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < steps; i++) {
      for (int j = 0; j < 2; j++) {
        e[j] = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(row + i * PAIR + 16 * j), scale, offset));
        if (i == whole) e[j] = _mm512_maskz_mov_ps(j ? high : low, e[j]);
        sums[j] = _mm512_add_ps(sums[j], e[j]);
      }
      _mm512_store_si512(to + i * TILE + 64 * r, as_bf16(e[0], e[1]));
    }
    v[r] = _mm512_add_ps(sums[0], sums[1]);
  }
  _mm512_storeu_ps(reciprocals, _mm512_div_ps(_mm512_set1_ps(1.0f), reduce(v, 0)));
}

// Up to 32 queries of one head.
INLINE void attend(const Chunk* chunk, int64_t head, int64_t query_tile, int row_tiles, float* scores, uint8_t* weights,
                   uint8_t* to) {
  const Shape* s = chunk->shape;
  int64_t steps = s->head_dim / PAIR, width = s->token_steps * PAIR;
  const uint8_t* q = chunk->scratch->q + (head * s->token_tiles + query_tile) * steps * TILE;
  const uint8_t* k = chunk->scratch->k + head * s->token_tiles * steps * TILE;
  const uint8_t* v = chunk->scratch->v + head * (s->head_dim / TILE_ROWS) * s->token_steps * TILE;
  int64_t tokens = s->tokens - query_tile * TILE_ROWS, below = tokens - TILE_ROWS;
  for (int64_t step = 0; step < s->token_steps; step++) {
    Factors factors = {q, k + 2 * step * steps * TILE, steps * TILE, steps, {tokens, below}};
    multiply(factors, row_tiles, 0, (Sums){scores + step * PAIR, 4 * width, 64, 4 * TILE_ROWS * width}, NULL);
  }
  float reciprocals[2 * TILE_ROWS], factor = 1.44269504f / __builtin_sqrtf(s->head_dim);
  for (int i = 0; i < row_tiles; i++) {
    softmax(scores + i * TILE_ROWS * width, s->tokens, width, factor, weights + i * s->token_steps * TILE,
            reciprocals + i * TILE_ROWS);
  }
  float c[2][2][TILE_ROWS][16] __attribute__((aligned(64)));
  int64_t window = head / s->heads, first = head % s->heads * steps, all_steps = s->dim / PAIR;
  for (int64_t step = 0; step < steps; step++) {
    const uint8_t* columns = v + 2 * step * s->token_steps * TILE;
    Factors factors = {weights, columns, s->token_steps * TILE, s->token_steps, {tokens, below}};
    multiply(factors, row_tiles, 0, one_by_one(c), NULL);
    for (int i = 0; i < row_tiles; i++) {
      int64_t row = window * s->tokens + (query_tile + i) * TILE_ROWS;
      for (int r = 0; r < at_most(TILE_ROWS, tokens - i * TILE_ROWS); r++, row++) {
        __m512 factor = _mm512_set1_ps(reciprocals[i * TILE_ROWS + r]);
        __m512 low = _mm512_mul_ps(_mm512_load_ps(c[i][0][r]), factor);
        __m512 high = _mm512_mul_ps(_mm512_load_ps(c[i][1][r]), factor);
        uint8_t* tile = to + (row / TILE_ROWS * all_steps + first + step) * TILE;
        _mm512_store_si512(tile + row % TILE_ROWS * 64, as_bf16(low, high));
      }
    }
  }
}

static void attention(const Chunk* chunk, uint8_t* to) {
  const Shape* s = chunk->shape;
  uint8_t* own = chunk->scratch->attention + chunk->team.rank * s->attention_bytes;
  float* scores = (float*)own;
  uint8_t* weights = own + 2 * TILE_ROWS * s->token_steps * PAIR * 4;
  int64_t query_pairs = (s->token_tiles + 1) / 2;
  Share tasks = share_of(chunk->team, chunk->windows * s->heads * query_pairs);
  for (int64_t task = tasks.first; task < tasks.stop; task++) {
    int64_t head = task / query_pairs, query_tile = task % query_pairs * 2;
    if (query_tile + 1 < s->token_tiles) {
      attend(chunk, head, query_tile, 2, scores, weights, to);
    } else {
      attend(chunk, head, query_tile, 1, scores, weights, to);
    }
  }
}

// --- a block -------------------------------------------------------------------------------------------------------

// As if all tokens of a chunk were of one window.
INLINE Shape joined(const Chunk* chunk) {
  Shape s = *chunk->shape;
  s.tokens *= chunk->windows;
  s.token_tiles = rounded_up(s.tokens, TILE_ROWS) / TILE_ROWS;
  return s;
}

// A block, for the windows of a chunk. `then` is the one that is run next, or NULL.
INLINE void run_chunk(const Chunk* chunk, const Block* block, const Block* then, int is_int8) {
  const Shape *s = chunk->shape, all = joined(chunk);
  Chunk flat = {&all, chunk->scratch, chunk->team, chunk->x, 1};
  const Scratch* scratch = chunk->scratch;
  const float *scales = scratch->row_scales, *hidden_scales = scratch->hidden_scales;
  Matrix qkv = matrix_of(&block->qkv, s->dim, 3 * s->dim, is_int8), next_qkv;
  Matrix proj = matrix_of(&block->proj, s->dim, s->dim, is_int8);
  Matrix all_fc1 = matrix_of(&block->fc1, s->dim, s->hidden, is_int8);
  Matrix all_fc2 = matrix_of(&block->fc2, s->hidden, s->dim, is_int8);
  Matrix fc1 = outputs_from(all_fc1, 0, at_most(s->part, s->hidden));
  if (then) next_qkv = matrix_of(&then->qkv, s->dim, 3 * s->dim, is_int8);
  norm_rows(chunk, &block->norm1, is_int8);
  wait_for_all(chunk->team);
  layer(chunk, qkv, scratch->rounded, scales, TO_HEADS, is_int8, &proj);
  wait_for_all(chunk->team);
  attention(chunk, is_int8 ? scratch->unquantized : scratch->rounded);
  wait_for_all(chunk->team);
  if (is_int8) {
    quantize_rows(&flat, s->dim, scratch->rounded, scratch->row_scales);
    wait_for_all(chunk->team);
  }
  layer(&flat, proj, scratch->rounded, scales, TO_RESIDUAL, is_int8, &fc1);
  wait_for_all(chunk->team);
  norm_rows(&flat, &block->norm2, is_int8);
  wait_for_all(chunk->team);
  for (int64_t first = 0; first < s->hidden; first += s->part) {
    int64_t part = fc1.outputs, left = s->hidden - first - part;
    Matrix fc2 = inputs_from(all_fc2, first, part, is_int8);
    layer(&flat, fc1, scratch->rounded, scales, TO_HIDDEN, is_int8, &fc2);
    wait_for_all(chunk->team);
    if (is_int8) {
      quantize_rows(&flat, part, scratch->hidden, scratch->hidden_scales);
      wait_for_all(chunk->team);
    }
    if (left) fc1 = outputs_from(all_fc1, first + part, at_most(s->part, left));
    layer(&flat, fc2, scratch->hidden, hidden_scales, TO_RESIDUAL, is_int8, left ? &fc1 : then ? &next_qkv : NULL);
    wait_for_all(chunk->team);
  }
}

// Before a thread multiplies, and after it.
INLINE void begin_products(void);
INLINE void end_products(void);

static void run_windows(const Call* call, Team team, int64_t first, int64_t stop, uint8_t* base) {
  Shape shape = shape_of(call);
  Scratch scratch;
  lay_out(&shape, base, &scratch);
  begin_products();
  for (const Block *block = call->blocks, *last = block + call->num_blocks - 1; block <= last; block++) {
    for (int64_t window = first, end; window < stop; window = end) {
      end = end_of_chunk(window, stop, shape.windows);
      float* x = call->x + window * shape.tokens * shape.dim;
      Chunk chunk = {&shape, &scratch, team, x, end - window};
      const Block* then = end < stop ? block : block < last ? block + 1 : NULL;
      if (shape.quantized) {
        run_chunk(&chunk, block, then, 1);
      } else {
        run_chunk(&chunk, block, then, 0);
      }
      read_features(call, block, team, window, end);
    }
  }
  end_products();
}

static void run_blocks(const Call* call) {
  Shape shape = shape_of(call);
  Scratch scratch;
  run_in_teams(call, run_windows, lay_out(&shape, NULL, &scratch));
}

#endif
