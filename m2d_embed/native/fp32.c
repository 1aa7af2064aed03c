// Tokens, and transformer blocks, in float32 on AVX-512.
//
// Weights are used as they are, with no copy of them all: 64 rows of a matrix at a time are laid out for the product,
// in a cache of the core, and used for some hundred tokens. All sums are of float32, exp and erf to 2e-7.

#include <string.h>

#include "ahead.h"
#include "memory.h"
#include "outputs.h"
#include "teams.h"
#include "vectors.h"

enum {
  ROWS = 6,    // of a product in registers
  WIDTH = 64,  // its columns, four vectors
  VECTORS = WIDTH / 16,
  NARROW = WIDTH / 2,  // the fewest columns that a thread gets, so that two have as many to do as can be
  HIDDEN = 768,        // values that are between the layers of the MLP at a time, at most
  CHUNK_ROWS = 384,    // tokens that go through a block together
};

typedef struct {
  int64_t dim, hidden, heads, head_dim, tokens;
  int64_t width;          // tokens of a window, rounded up to whole panels
  int64_t windows;        // of a chunk
  int64_t members;        // of a team, at most
  int64_t part;           // hidden values that are between the layers of the MLP at a time
  int64_t member_floats;  // scratch of each member of a team
} Shape;

typedef struct {
  float* normed;  // [row][dim]: of norm1, of attention, of norm2
  float* qkv;     // [row][3 dim]
  float* hidden;  // [row][part]
  float* members;
} Scratch;

typedef struct {
  const Shape* shape;
  const Scratch* scratch;
  Team team;
  float* x;
  int64_t windows;
} Chunk;

static Shape shape_of(const Call* call) {
  const Block* block = call->blocks;
  Shape s = {.dim = block->dim, .hidden = block->hidden, .heads = block->heads, .tokens = call->tokens};
  s.head_dim = s.dim / s.heads;
  s.width = rounded_up(s.tokens, WIDTH);
  int64_t teams = num_teams(call->windows, call->threads);
  s.windows = at_most(at_least(1, CHUNK_ROWS / s.tokens), (call->windows + teams - 1) / teams);
  s.members = (call->threads + teams - 1) / teams;
  s.part = at_most(HIDDEN, s.hidden);
  int64_t attention = (s.head_dim + ROWS) * s.width, panel = at_least(s.dim, s.part) * WIDTH;
  s.member_floats = rounded_up(at_least(attention, panel), 16);
  return s;
}

static float* take_floats(Memory* memory, int64_t count) { return take(memory, count * (int64_t)sizeof(float)); }

// How many bytes it takes; without a base that is all.
static int64_t lay_out(const Shape* s, uint8_t* base, Scratch* scratch) {
  Memory memory = {base, 0};
  int64_t rows = s->windows * s->tokens;
  scratch->normed = take_floats(&memory, rows * s->dim);
  scratch->qkv = take_floats(&memory, rows * 3 * s->dim);
  scratch->hidden = take_floats(&memory, rows * s->part);
  scratch->members = take_floats(&memory, s->members * s->member_floats);
  return memory.used;
}

// Bytes of scratch for a call.
int64_t m2d_fp32_scratch(const Call* call) {
  Shape shape = shape_of(call);
  Scratch scratch;
  return num_teams(call->windows, call->threads) * lay_out(&shape, NULL, &scratch);
}

// --- vectors -------------------------------------------------------------------------------------------------------

// e^x for x <= 0, to 2e-7.
INLINE __m512 exp_of(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-104.0f));
  __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x);
  rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), rest);
  __m512 p = _mm512_set1_ps(1.0f / 720);  // Taylor's series: beyond it 0.35^7 / 7!, 1e-7
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// x * Phi(x), with erf by Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: to 1.5e-7 |x|.
INLINE __m512 gelu(__m512 x) {
  __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.707106781f));
  __m512 t = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), _mm512_set1_ps(1.0f)));
  __m512 p = _mm512_set1_ps(1.061405429f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
  __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), exp_of(_mm512_fnmadd_ps(z, z, _mm512_setzero_ps())));  // erfc(z)
  // Phi(x) is half of erfc(z) below 0, and above it what is left of 1.
  __m512 half = _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.5f)), tail);
  __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
  return _mm512_mask_sub_ps(half, positive, x, half);
}

// 16 rows of 16 values, `stride` apart -> 16 rows of `to`, a panel, transposed.
INLINE void transpose_into(const float* from, int64_t stride, float* to) {
  __m512 r[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(from + i * stride);
  transpose(r);
  for (int i = 0; i < 16; i++) _mm512_storeu_ps(to + i * WIDTH, r[i]);
}

// --- products ------------------------------------------------------------------------------------------------------

typedef __m512 Sums[ROWS][VECTORS];

INLINE void clear(Sums sums, int rows, int vectors) {
  for (int r = 0; r < rows; r++) {
    for (int j = 0; j < vectors; j++) sums[r][j] = _mm512_setzero_ps();
  }
}

// sums += a (rows x inner) b (inner x 16 vectors)
INLINE void add_products(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t inner, int rows,
                         int vectors, Sums sums) {
  for (int64_t k = 0; k < inner; k++) {
    __m512 v[VECTORS];
    for (int j = 0; j < vectors; j++) v[j] = _mm512_loadu_ps(b + k * b_stride + 16 * j);
    for (int r = 0; r < rows; r++) {
      __m512 value = _mm512_set1_ps(a[r * a_stride + k]);
      for (int j = 0; j < vectors; j++) sums[r][j] = _mm512_fmadd_ps(value, v[j], sums[r][j]);
    }
  }
}

typedef enum { TO_OUTPUT, TO_RESIDUAL, TO_HIDDEN } Destination;

typedef struct {
  const float *a, *panel, *bias;
  float* out;
  int64_t inner, out_stride;
  Destination destination;
  Ahead ahead;
} Product;

INLINE void multiply(Product* p, int rows, int vectors) {
  Sums sums;
  clear(sums, rows, vectors);
  for (int64_t k = 0; k < p->inner; k += 16) {
    fetch(&p->ahead);
    add_products(p->a + k, p->inner, p->panel + k * WIDTH, WIDTH, 16, rows, vectors, sums);
  }
  for (int r = 0; r < rows; r++) {
    for (int j = 0; j < vectors; j++) {
      __m512 v = sums[r][j];
      if (p->bias) v = _mm512_add_ps(v, _mm512_loadu_ps(p->bias + 16 * j));
      float* to = p->out + r * p->out_stride + 16 * j;
      if (p->destination == TO_RESIDUAL) v = _mm512_add_ps(v, _mm512_loadu_ps(to));
      if (p->destination == TO_HIDDEN) v = gelu(v);
      _mm512_storeu_ps(to, v);
    }
  }
}

// For each number of rows a function of its own, in which all sums are in registers.
#define FOR_EACH_NUMBER(define) define(1) define(2) define(3) define(4) define(5) define(6)
#define MULTIPLY_ROWS(n)                                                                      \
  static __attribute__((noinline)) void multiply_##n(Product* p) { multiply(p, n, VECTORS); } \
  static __attribute__((noinline)) void multiply_narrow_##n(Product* p) { multiply(p, n, VECTORS / 2); }
FOR_EACH_NUMBER(MULTIPLY_ROWS)
#define FUNCTIONS(name) {NULL, name##_1, name##_2, name##_3, name##_4, name##_5, name##_6}

// A transposed matrix: `outputs` of its rows, which are `stride` apart, and `inputs` of its columns.
typedef struct {
  const float *weight, *bias;
  int64_t stride, outputs, inputs;
} Matrix;

INLINE Matrix matrix_of(const Linear* linear, int64_t inputs, int64_t outputs) {
  return (Matrix){linear->weight, linear->bias, inputs, outputs, inputs};
}

INLINE Matrix outputs_from(Matrix m, int64_t first, int64_t count) {
  m.weight += first * m.stride, m.outputs = count;
  if (m.bias) m.bias += first;
  return m;
}

// The bias is added to the product of the first inputs.
INLINE Matrix inputs_from(Matrix m, int64_t first, int64_t count) {
  m.weight += first, m.inputs = count;
  if (first) m.bias = NULL;
  return m;
}

// The columns of a layer's output that a member of a team computes.
INLINE Share columns_of(Team team, const Matrix* m) {
  Share share = share_of(team, m->outputs / NARROW);
  return (Share){share.first * NARROW, share.stop * NARROW};
}

// Rows of a matrix, from `column` of the output to `stop`, or of the one that is used after it.
INLINE Ahead ahead_of(const Chunk* chunk, const Matrix* m, int64_t column, int64_t stop, const Matrix* then,
                      int64_t products) {
  Share next = {column, stop};
  if (column == stop && then) m = then, next = columns_of(chunk->team, then);
  int64_t rows = at_most(WIDTH, next.stop - next.first), lines = m->inputs / 16;
  int64_t at_once = (rows + products - 1) / products;
  const uint8_t* from = (const uint8_t*)(m->weight + next.first * m->stride);
  return (Ahead){from, lines, lines, rows, (m->stride - m->inputs) * (int64_t)sizeof(float), at_once};
}

// out = a times a matrix. While the last of it is multiplied, `then` is fetched, the matrix of the next product, or
// NULL.
INLINE void layer(const Chunk* chunk, const float* a, Matrix m, float* out, int64_t out_stride, Destination destination,
                  const Matrix* then) {
  static void (*const wide[])(Product*) = FUNCTIONS(multiply);
  static void (*const narrow[])(Product*) = FUNCTIONS(multiply_narrow);
  int64_t rows = chunk->windows * chunk->shape->tokens, products = (rows + ROWS - 1) / ROWS, width;
  float* panel = chunk->scratch->members + chunk->team.rank * chunk->shape->member_floats;
  Share share = columns_of(chunk->team, &m);
  for (int64_t column = share.first; column < share.stop; column += width) {
    width = at_most(WIDTH, share.stop - column);
    for (int64_t k = 0; k < m.inputs; k += 16) {
      for (int64_t j = 0; j < width; j += 16) {
        transpose_into(m.weight + (column + j) * m.stride + k, m.stride, panel + k * WIDTH + j);
      }
    }
    Ahead ahead = ahead_of(chunk, &m, column + width, share.stop, then, products);
    const float* bias = m.bias ? m.bias + column : NULL;
    Product p = {a, panel, bias, out + column, m.inputs, out_stride, destination, ahead};
    void (*const* multiply_rows)(Product*) = width == WIDTH ? wide : narrow;
    for (int64_t row = 0; row < rows; row += ROWS, p.a += ROWS * m.inputs, p.out += ROWS * out_stride) {
      multiply_rows[at_most(ROWS, rows - row)](&p);
    }
  }
}

// --- what is between products --------------------------------------------------------------------------------------

static void norm_rows(const Chunk* chunk, const Norm* norm) {
  int64_t dim = chunk->shape->dim;
  Share rows = share_of(chunk->team, chunk->windows * chunk->shape->tokens);
  for (int64_t row = rows.first; row < rows.stop; row++) {
    norm_row(chunk->x + row * dim, norm, dim, chunk->scratch->normed + row * dim);
  }
}

// --- attention -----------------------------------------------------------------------------------------------------

// Scores of one query -> exp(score - greatest); returns their sum.
INLINE float softmax(float* scores, int64_t tokens, float factor) {
  __mmask16 rest = (__mmask16)((1u << tokens % 16) - 1);
  int64_t whole = tokens / 16 * 16;
  __m512 greatest = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps(), scale = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < whole; i += 16) greatest = _mm512_max_ps(greatest, _mm512_load_ps(scores + i));
  if (rest) greatest = _mm512_mask_max_ps(greatest, rest, greatest, _mm512_load_ps(scores + whole));
  __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(greatest));
  for (int64_t i = 0; i < tokens; i += 16) {
    __m512 e = exp_of(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(scores + i), most), scale));
    if (i == whole) e = _mm512_maskz_mov_ps(rest, e);
    sum = _mm512_add_ps(sum, e);
    _mm512_store_ps(scores + i, e);
  }
  return _mm512_reduce_add_ps(sum);
}

// Some queries of one head: values are in qkv, keys in panels of [head_dim][WIDTH].
typedef struct {
  const Shape* shape;
  const float *q, *keys, *values;
  float *scores, *to;
} Head;

INLINE void weigh(const Head* h, int64_t first, int rows, int vectors, const float* reciprocals) {
  const Shape* s = h->shape;
  Sums sums;
  clear(sums, rows, vectors);
  add_products(h->scores, s->width, h->values + first, 3 * s->dim, s->tokens, rows, vectors, sums);
  for (int r = 0; r < rows; r++) {
    __m512 factor = _mm512_set1_ps(reciprocals[r]);
    for (int j = 0; j < vectors; j++) {
      _mm512_storeu_ps(h->to + r * s->dim + first + 16 * j, _mm512_mul_ps(sums[r][j], factor));
    }
  }
}

INLINE void attend(const Head* h, int rows) {
  const Shape* s = h->shape;
  for (int64_t first = 0; first < s->width; first += WIDTH) {
    Sums sums;
    clear(sums, rows, VECTORS);
    add_products(h->q, 3 * s->dim, h->keys + first * s->head_dim, WIDTH, s->head_dim, rows, VECTORS, sums);
    for (int r = 0; r < rows; r++) {
      for (int j = 0; j < VECTORS; j++) _mm512_store_ps(h->scores + r * s->width + first + 16 * j, sums[r][j]);
    }
  }
  float reciprocals[ROWS], factor = 1.0f / __builtin_sqrtf(s->head_dim);
  for (int r = 0; r < rows; r++) reciprocals[r] = 1.0f / softmax(h->scores + r * s->width, s->tokens, factor);
  int64_t first = 0;
  for (; first + WIDTH <= s->head_dim; first += WIDTH) weigh(h, first, rows, VECTORS, reciprocals);
  if (first < s->head_dim) weigh(h, first, rows, VECTORS / 2, reciprocals);
}

#define ATTEND_ROWS(n) \
  static __attribute__((noinline)) void attend_##n(const Head* h) { attend(h, n); }
FOR_EACH_NUMBER(ATTEND_ROWS)

static void attention(const Chunk* chunk) {
  static void (*const attend_rows[])(const Head*) = FUNCTIONS(attend);
  const Shape* s = chunk->shape;
  float *keys = chunk->scratch->members + chunk->team.rank * s->member_floats, *scores = keys + s->head_dim * s->width;
  int64_t stride = 3 * s->dim;
  Share tasks = share_of(chunk->team, chunk->windows * s->heads);
  for (int64_t task = tasks.first; task < tasks.stop; task++) {
    int64_t window = task / s->heads, column = task % s->heads * s->head_dim;
    const float *q = chunk->scratch->qkv + window * s->tokens * stride + column, *k = q + s->dim, *v = k + s->dim;
    for (int64_t token = 0; token < s->width; token += 16) {
      for (int64_t i = 0; i < s->head_dim; i += 16) {
        float* to = keys + token / WIDTH * WIDTH * s->head_dim + i * WIDTH + token % WIDTH;
        if (token + 16 <= s->tokens) {
          transpose_into(k + token * stride + i, stride, to);
        } else {  // what is beyond the tokens is masked, but must be a number
          for (int64_t f = 0; f < 16; f++) {
            for (int64_t t = 0; t < 16; t++)
              to[f * WIDTH + t] = token + t < s->tokens ? k[(token + t) * stride + i + f] : 0;
          }
        }
      }
    }
    float* to = chunk->scratch->normed + window * s->tokens * s->dim + column;
    Head h = {s, q, keys, v, scores, to};
    for (int64_t token = 0; token < s->tokens; token += ROWS, h.q += ROWS * stride, h.to += ROWS * s->dim) {
      attend_rows[at_most(ROWS, s->tokens - token)](&h);
    }
  }
}

// --- a block -------------------------------------------------------------------------------------------------------

// A block, for the windows of a chunk. `then` is the one that is run next, or NULL.
static void run_chunk(const Chunk* chunk, const Block* block, const Block* then) {
  const Shape* s = chunk->shape;
  const Scratch* scratch = chunk->scratch;
  Matrix qkv = matrix_of(&block->qkv, s->dim, 3 * s->dim), next_qkv, proj = matrix_of(&block->proj, s->dim, s->dim);
  Matrix all_fc1 = matrix_of(&block->fc1, s->dim, s->hidden), all_fc2 = matrix_of(&block->fc2, s->hidden, s->dim);
  Matrix fc1 = outputs_from(all_fc1, 0, s->part);
  if (then) next_qkv = matrix_of(&then->qkv, s->dim, 3 * s->dim);
  norm_rows(chunk, &block->norm1);
  wait_for_all(chunk->team);
  layer(chunk, scratch->normed, qkv, scratch->qkv, 3 * s->dim, TO_OUTPUT, &proj);
  wait_for_all(chunk->team);
  attention(chunk);
  wait_for_all(chunk->team);
  layer(chunk, scratch->normed, proj, chunk->x, s->dim, TO_RESIDUAL, &fc1);
  wait_for_all(chunk->team);
  norm_rows(chunk, &block->norm2);
  wait_for_all(chunk->team);
  for (int64_t first = 0; first < s->hidden; first += s->part) {
    int64_t part = fc1.outputs, left = s->hidden - first - part;
    Matrix fc2 = inputs_from(all_fc2, first, part);
    layer(chunk, scratch->normed, fc1, scratch->hidden, part, TO_HIDDEN, &fc2);
    wait_for_all(chunk->team);
    if (left) fc1 = outputs_from(all_fc1, first + part, at_most(s->part, left));
    layer(chunk, scratch->hidden, fc2, chunk->x, s->dim, TO_RESIDUAL, left ? &fc1 : then ? &next_qkv : NULL);
    wait_for_all(chunk->team);
  }
}

static void run_windows(const Call* call, Team team, int64_t first, int64_t stop, uint8_t* base) {
  Shape shape = shape_of(call);
  Scratch scratch;
  lay_out(&shape, base, &scratch);
  for (const Block *block = call->blocks, *last = block + call->num_blocks - 1; block <= last; block++) {
    for (int64_t window = first, end; window < stop; window = end) {
      end = end_of_chunk(window, stop, shape.windows);
      float* x = call->x + window * shape.tokens * shape.dim;
      const Block* then = end < stop ? block : block < last ? block + 1 : NULL;
      run_chunk(&(Chunk){&shape, &scratch, team, x, end - window}, block, then);
      read_features(call, block, team, window, end);
    }
  }
}

void m2d_fp32_run(const Call* call) {
  Shape shape = shape_of(call);
  Scratch scratch;
  run_in_teams(call, run_windows, lay_out(&shape, NULL, &scratch));
}

// --- tokens --------------------------------------------------------------------------------------------------------

static Shape shape_of_tokens(const TokensCall* call) {
  Shape s = {.dim = call->dim, .tokens = 1 + (int64_t)call->rows * call->columns};
  s.part = (int64_t)call->height * call->width;  // values of a patch
  int64_t windows = call->call.windows, teams = num_teams(windows, call->call.threads);
  s.windows = at_most(at_least(1, CHUNK_ROWS / s.tokens), (windows + teams - 1) / teams);
  s.members = (call->call.threads + teams - 1) / teams;
  s.member_floats = s.part * WIDTH;
  return s;
}

// The patches of a chunk's windows are in `hidden`.
static int64_t lay_out_tokens(const Shape* s, uint8_t* base, Scratch* scratch) {
  Memory memory = {base, 0};
  scratch->hidden = take_floats(&memory, s->windows * s->tokens * s->part);
  scratch->members = take_floats(&memory, s->members * s->member_floats);
  return memory.used;
}

int64_t m2d_tokens_scratch(const TokensCall* call) {
  Shape shape = shape_of_tokens(call);
  Scratch scratch;
  return num_teams(call->call.windows, call->call.threads) * lay_out_tokens(&shape, NULL, &scratch);
}

// A patch, and in its token's place its position; the class token is a patch of zeros.
static void cut_patch(const TokensCall* call, const float* log_mel, int64_t token, float* patch, float* x) {
  int64_t row = (token - 1) / call->columns, column = (token - 1) % call->columns, values = call->height * call->width;
  const float* position = call->positions;
  if (token == 0) {
    memset(patch, 0, values * sizeof(float));
  } else {
    const float* from = log_mel + row * call->height * call->mel_stride + column * call->width;
    for (int64_t i = 0; i < call->height; i++) {
      memcpy(patch + i * call->width, from + i * call->mel_stride, call->width * sizeof(float));
    }
    position += (1 + row * call->grid_columns + column) * call->dim;
  }
  memcpy(x, position, call->dim * sizeof(float));
}

static void make_tokens(const Call* pointer, Team team, int64_t first, int64_t stop, uint8_t* base) {
  const TokensCall* call = (const TokensCall*)pointer;
  Shape s = shape_of_tokens(call);
  Scratch scratch;
  lay_out_tokens(&s, base, &scratch);
  for (int64_t window = first, end; window < stop; window = end) {
    end = end_of_chunk(window, stop, s.windows);
    Chunk chunk = {&s, &scratch, team, pointer->x + window * s.tokens * s.dim, end - window};
    Share tokens = share_of(team, chunk.windows * s.tokens);
    for (int64_t i = tokens.first; i < tokens.stop; i++) {
      const float* log_mel = call->log_mel + (window + i / s.tokens) * call->window_stride;
      cut_patch(call, log_mel, i % s.tokens, scratch.hidden + i * s.part, chunk.x + i * s.dim);
    }
    wait_for_all(team);
    layer(&chunk, scratch.hidden, matrix_of(&call->projection, s.part, s.dim), chunk.x, s.dim, TO_RESIDUAL, NULL);
    wait_for_all(team);
    Share windows = share_of(team, chunk.windows);
    for (int64_t i = windows.first; i < windows.stop; i++) {
      float* x = chunk.x + i * s.tokens * s.dim;
      for (int64_t j = 0; j < s.dim; j++) x[j] = call->class_token[j] + call->positions[j];
    }
  }
}

void m2d_tokens_run(const TokensCall* call) {
  Shape shape = shape_of_tokens(call);
  Scratch scratch;
  run_in_teams(&call->call, make_tokens, lay_out_tokens(&shape, NULL, &scratch));
}
