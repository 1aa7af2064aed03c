// Transformer blocks, and in float32 tokens, on vectors: compiled once for each instruction set and kind of product.
//
//   M2D_NAME  what its functions are called by: m2d_<name>_run, m2d_<name>_scratch
//   M2D_INT8  products of int8 weights, whose rows have a scale each, with levels of rows of A; else of float32 with
//             weights that are stored in float32, bfloat16 or float16
//
// Float weights are used as they are, with no copy of them all: 64 rows of a matrix at a time are laid out for the
// product, in a cache of the core, and used for some hundred tokens. int8 weights come laid out ("packed"): in pieces of
// WIDTH outputs, [piece][unit][output], a unit being VALUES inputs. What is between products is float32, exp and erf to
// 2e-7.
// Each sum is one number that products are added to in the order of the inputs, whatever else is computed beside it: a
// window's values do not depend on the others.

#include <string.h>

#include "ahead.h"
#include "memory.h"
#include "outputs.h"
#include "probe.h"
#include "teams.h"
#include "vec.h"

enum {
  PANEL = 64,  // outputs that are laid out at a time
  VECTORS = WIDTH / LANES,
  NARROW = 32,       // the fewest columns that a thread gets, so that two have as many to do as can be
  HIDDEN = 768,      // values that are between the layers of the MLP at a time, at most
  CHUNK_ROWS = 384,  // tokens that go through a block together
  STEP = 16,         // units of a product between two fetches
};

// What products are computed of, 32 bits each: a float32, or PER_UNIT levels.
typedef float Unit __attribute__((may_alias));
#ifdef M2D_INT8
enum { VALUES = PER_UNIT };  // in a unit
typedef struct {
  int8_t values[VALUES];
} Weights;  // of a unit
#if PER_UNIT == 2
typedef int16_t Level;
#elif defined(LEVELS_ARE_UNSIGNED)
typedef uint8_t Level;
#else
typedef int8_t Level;
#endif
#else
enum { VALUES = 1 };
typedef Unit Weights;
#endif
#ifdef LEVELS_ARE_UNSIGNED
enum { OFFSET = 128 };  // of levels
#else
enum { OFFSET = 0 };
#endif

typedef struct {
  int64_t dim, hidden, heads, head_dim, tokens;
  int64_t width;          // tokens of a window, rounded up to whole panels
  int64_t windows;        // of a chunk
  int64_t members;        // of a team, at most
  int64_t part;           // hidden values that are between the layers of the MLP at a time
  int64_t member_floats;  // scratch of each member of a team
} Shape;

// Rows of what is multiplied with a matrix, and in int8 their levels, and the scale of each row.
typedef struct {
  float* values;  // [row][width]
  Unit* levels;   // [row][width / VALUES]
  float* scales;  // [row]
} Factor;

typedef struct {
  Factor normed;  // width is dim: of norm1, of attention, of norm2
  Factor hidden;  // width is part
  float* qkv;     // [row][3 dim]
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
  int64_t attention = (s.head_dim + rounded_up(s.head_dim, WIDTH) + ROWS) * s.width, panel = VALUES > 1 ? 0 : at_least(s.dim, s.part) * PANEL;
  s.member_floats = rounded_up(at_least(attention, panel), 16);
  return s;
}

static float* take_floats(Memory* memory, int64_t count) { return take(memory, count * (int64_t)sizeof(float)); }

static Factor take_factor(Memory* memory, int64_t rows, int64_t width) {
  int64_t levels = VALUES > 1 ? rows * width / VALUES : 0;
  return (Factor){take_floats(memory, rows * width), take_floats(memory, levels), take_floats(memory, levels ? rows : 0)};
}

// How many bytes it takes; without a base that is all.
static int64_t lay_out(const Shape* s, uint8_t* base, Scratch* scratch) {
  Memory memory = {base, 0};
  int64_t rows = s->windows * s->tokens;
  scratch->normed = take_factor(&memory, rows, s->dim);
  scratch->hidden = take_factor(&memory, rows, s->part);
  scratch->qkv = take_floats(&memory, rows * 3 * s->dim);
  scratch->members = take_floats(&memory, s->members * s->member_floats);
  return memory.used;
}

#define JOINED(a, b, c) a##b##c
#define NAMED(name, what) JOINED(m2d_, name, what)

// Bytes of scratch for a call.
int64_t NAMED(M2D_NAME, _scratch)(const Call* call) {
  Shape shape = shape_of(call);
  Scratch scratch;
  return num_teams(call->windows, call->threads) * lay_out(&shape, NULL, &scratch);
}

// --- products ------------------------------------------------------------------------------------------------------

// x * Phi(x), with erf by Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: to 1.5e-7 |x|.
INLINE V gelu(V x) {
  V z = v_abs(x) * v_set1(0.707106781f);
  V t = v_set1(1.0f) / v_fma(z, v_set1(0.3275911f), v_set1(1.0f));
  V p = v_set1(1.061405429f);
  p = v_fma(p, t, v_set1(-1.453152027f));
  p = v_fma(p, t, v_set1(1.421413741f));
  p = v_fma(p, t, v_set1(-0.284496736f));
  p = v_fma(p, t, v_set1(0.254829592f));
  V tail = p * t * v_exp(v_fnma(z, z, v_zero()));  // erfc(z)
  // Phi(x) is half of erfc(z) below 0, and above it what is left of 1.
  V half = x * v_set1(0.5f) * tail;
  return v_greater(x, v_zero(), x - half, half);
}

// sums += a (rows x inner) b (inner x vectors)
#define ADD_PRODUCTS(name, Sum, Weights, load, product)                                                             \
  INLINE void name(const Unit* a, int64_t a_stride, const Weights* b, int64_t b_stride, int64_t inner, int rows,    \
                   int vectors, Sum sums[ROWS][VECTORS]) {                                                          \
    for (int64_t k = 0; k < inner; k++) {                                                                           \
      V v[VECTORS];                                                                                                 \
      UNROLLED(int j = 0; j < vectors; j++) v[j] = load(b + k * b_stride + LANES * j);                              \
      UNROLLED(int r = 0; r < rows; r++) {                                                                          \
        V value = v_set1(a[r * a_stride + k]);                                                                      \
        UNROLLED(int j = 0; j < vectors; j++) sums[r][j] = product(sums[r][j], value, v[j]);                        \
      }                                                                                                             \
    }                                                                                                               \
  }

INLINE V plus_product(V sum, V a, V b) { return v_fma(a, b, sum); }
ADD_PRODUCTS(add_products, V, Unit, v_load, plus_product)

#ifdef M2D_INT8
typedef W Sum;
INLINE W plus_levels(W sum, V a, V b) { return w_dot(sum, (W)a, (W)b); }
ADD_PRODUCTS(add_levels, W, Weights, w_load_units, plus_levels)
#else
typedef V Sum;
#define add_levels add_products
#endif

typedef enum { TO_OUTPUT, TO_RESIDUAL, TO_HIDDEN } Destination;

typedef struct {
  const Unit* a;
  const Weights* weights;  // [unit][WIDTH]
  const float *bias, *scales, *row_scales;  // scales: int8
  const int32_t* surplus;                   // of sums, as levels have an offset
  float* out;
  int64_t inner, out_stride;  // inner in units
  Destination destination;
  Ahead* ahead;
} Product;

INLINE V finished(const Product* p, Sum sum, int row, int column) {
#ifdef M2D_INT8
  if (OFFSET) sum -= (W)v_load(p->surplus + column);
  V x = v_from_int(sum) * v_load(p->scales + column) * v_set1(p->row_scales[row]);
#else
  V x = sum;
#endif
  x += v_load(p->bias + column);
  if (p->destination == TO_RESIDUAL) x += v_load(p->out + row * p->out_stride + column);
  return p->destination == TO_HIDDEN ? gelu(x) : x;
}

INLINE void multiply(Product* p, int rows, int vectors) {
  Sum sums[ROWS][VECTORS] = {0};
  for (int64_t k = 0; k < p->inner; k += STEP) {
    fetch(p->ahead);
    add_levels(p->a + k, p->inner, p->weights + k * WIDTH, WIDTH, at_most(STEP, p->inner - k), rows, vectors, sums);
  }
  UNROLLED(int r = 0; r < rows; r++) {
    UNROLLED(int j = 0; j < vectors; j++) {
      v_store(p->out + r * p->out_stride + LANES * j, finished(p, sums[r][j], r, LANES * j));
    }
  }
}

// For each number of rows a function of its own, in which all sums are in registers.
#define FOR_EACH_NUMBER(define) define(1) define(2) define(3) define(4) define(5) define(6)
#define FUNCTIONS(name) {NULL, name##_1, name##_2, name##_3, name##_4, name##_5, name##_6}
#define MULTIPLY_ROWS(n)                                                                                  \
  static __attribute__((noinline)) void multiply_##n(Product* p) { multiply(p, at_most(n, ROWS), VECTORS); } \
  static __attribute__((noinline)) void multiply_narrow_##n(Product* p) {                                 \
    multiply(p, at_most(n, ROWS), at_least(1, VECTORS / 2));                                              \
  }
FOR_EACH_NUMBER(MULTIPLY_ROWS)

// Rows are dealt out as evenly as can be: few of them at a time leave the units waiting for sums.
INLINE int64_t num_strips(int64_t rows) { return (rows + ROWS - 1) / ROWS; }
INLINE int64_t strip(int64_t rows, int64_t number) { return rows * number / num_strips(rows); }

// --- layers --------------------------------------------------------------------------------------------------------

// A transposed matrix: `outputs` of its rows, which are `stride` values apart, and `inputs` of its columns.
typedef struct {
  const uint8_t *weight, *bias;
  const float* scales;
  int64_t stride, outputs, inputs;
  int bytes, format, bias_format;  // bytes: of a weight
} Matrix;

INLINE int bytes_of(int format) { return format == FLOAT32 ? 4 : 2; }

INLINE Matrix matrix_of(const Linear* l, int64_t inputs, int64_t outputs) {
  int bytes = VALUES > 1 ? 1 : bytes_of(l->weight_format);
  return (Matrix){l->weight, l->bias, l->scales, inputs, outputs, inputs, bytes, l->weight_format, l->bias_format};
}

INLINE Matrix outputs_from(Matrix m, int64_t first, int64_t count) {
  m.weight += first * m.stride * m.bytes, m.outputs = count;
  if (m.bias) m.bias += first * bytes_of(m.bias_format);
  if (m.scales) m.scales += first;
  return m;
}

// The bias is added to the product of the first inputs.
INLINE Matrix inputs_from(Matrix m, int64_t first, int64_t count) {
  m.weight += first * m.bytes * (VALUES > 1 ? WIDTH : 1), m.inputs = count;
  if (first) m.bias = NULL;
  return m;
}

// The columns of a layer's output that a member of a team computes.
INLINE Share columns_of(Team team, const Matrix* m) {
  Share share = share_of(team, m->outputs / NARROW);
  return (Share){share.first * NARROW, share.stop * NARROW};
}

INLINE V load_floats(const void* from, int format) {
  if (format == FLOAT32) return v_load(from);
  return format == BFLOAT16 ? v_from_bf16(from) : v_from_fp16(from);
}

#ifdef M2D_INT8
// int8: how weights are to be packed.
int32_t NAMED(M2D_NAME, _outputs_together)(void) { return WIDTH; }
int32_t NAMED(M2D_NAME, _inputs_together)(void) { return VALUES; }

// The weights of the outputs from one on, as far as their piece goes.
INLINE const Weights* weights_from(const Matrix* m, int64_t column) {
  return (const Weights*)m->weight + column / WIDTH * (m->stride / VALUES) * WIDTH + column % WIDTH;
}
#else
// `width` outputs, in pieces of WIDTH: [piece][input][output]
INLINE void lay_out_panel_of(const Matrix* m, int64_t column, int64_t width, int format, Unit* panel) {
  int64_t line = m->stride * m->bytes;
  for (int64_t j = 0; j < width; j += LANES) {
    const uint8_t* from = m->weight + (column + j) * line;
    Unit* to = panel + j / WIDTH * m->inputs * WIDTH + j % WIDTH;
    for (int64_t k = 0; k < m->inputs; k += LANES, from += LANES * m->bytes, to += LANES * WIDTH) {
      V r[LANES];
      for (int i = 0; i < LANES; i++) r[i] = load_floats(from + i * line, format);
      v_transpose(r);
      for (int i = 0; i < LANES; i++) v_store(to + i * WIDTH, r[i]);
    }
  }
}

static void lay_out_panel(const Matrix* m, int64_t column, int64_t width, Unit* panel) {
  switch (m->format) {
    case BFLOAT16: lay_out_panel_of(m, column, width, BFLOAT16, panel); break;
    case FLOAT16: lay_out_panel_of(m, column, width, FLOAT16, panel); break;
    default: lay_out_panel_of(m, column, width, FLOAT32, panel);
  }
}
#endif

// What is added to the sums of a panel's outputs, and what they are multiplied with.
typedef struct {
  float bias[PANEL], scales[PANEL];
  int32_t surplus[PANEL];
} Outputs;

static void choose_outputs(Outputs* o, const Matrix* m, int64_t column, int64_t width) {
  for (int64_t j = 0; j < width; j += LANES) {
    v_store(o->bias + j, m->bias ? load_floats(m->bias + (column + j) * bytes_of(m->bias_format), m->bias_format) : v_zero());
#ifdef M2D_INT8
    v_store(o->scales + j, v_load(m->scales + column + j));
    W offset = {0}, surplus = {0};
    offset += (int32_t)(OFFSET * 0x01010101u);
    const Weights *b = weights_from(m, column + j), *stop = b + m->inputs / VALUES * WIDTH;
    for (; OFFSET > 0 && b < stop; b += WIDTH) surplus = w_dot(surplus, offset, (W)w_load_units(b));
    v_store(o->surplus + j, (V)surplus);
#endif
  }
}

// What is read of a matrix for its outputs from `column` to `stop`, or of the one that is used after it.
INLINE Ahead ahead_of(const Chunk* chunk, const Matrix* m, int64_t column, int64_t stop, const Matrix* then,
                      int64_t fetches) {
  Share next = {column, stop};
  if (column == stop && then) m = then, next = columns_of(chunk->team, then);
  int together = VALUES > 1 ? WIDTH : 1;  // outputs whose weights lie side by side
  int64_t outputs = at_most(PANEL, next.stop - next.first), runs = (outputs + together - 1) / together;
  int64_t lines = (m->inputs * m->bytes * together + LINE - 1) / LINE, stride = m->stride * m->bytes * together;
  int64_t at_once = (runs * lines + fetches - 1) / fetches;
  return (Ahead){m->weight + next.first / together * stride, lines, lines, runs, stride - lines * LINE, at_once};
}

// out = a times a matrix. While the last of it is multiplied, `then` is fetched, the matrix of the next product, or
// NULL.
static void layer(const Chunk* chunk, const Factor* a, Matrix m, float* out, int64_t out_stride,
                  Destination destination, const Matrix* then) {
  static void (*const wide[])(Product*) = FUNCTIONS(multiply);
  static void (*const narrow[])(Product*) = FUNCTIONS(multiply_narrow);
  const Unit* units = VALUES > 1 ? a->levels : a->values;
  int64_t rows = chunk->windows * chunk->shape->tokens, inner = m.inputs / VALUES, strips = num_strips(rows), width;
  Share share = columns_of(chunk->team, &m);
  for (int64_t column = share.first; column < share.stop; column += width) {
    width = at_most(PANEL - column % PANEL, share.stop - column);
#ifndef M2D_INT8
    Unit* panel = chunk->scratch->members + chunk->team.rank * chunk->shape->member_floats;
    lay_out_panel(&m, column, width, panel);
#endif
    Outputs o;
    choose_outputs(&o, &m, column, width);
    int64_t pieces = (width + WIDTH - 1) / WIDTH;
    Ahead ahead = ahead_of(chunk, &m, column + width, share.stop, then, strips * pieces * ((inner + STEP - 1) / STEP));
    for (int64_t i = 0; i < strips; i++) {
      int64_t row = strip(rows, i), next = strip(rows, i + 1);
      const float* row_scales = VALUES > 1 ? a->scales + row : NULL;
      for (int64_t j = 0; j < width; j += WIDTH) {
#ifdef M2D_INT8
        const Weights* weights = weights_from(&m, column + j);
#else
        const Weights* weights = panel + j * inner;
#endif
        Product p = {units + row * inner, weights, o.bias + j, o.scales + j, row_scales, o.surplus + j,
                     out + row * out_stride + column + j, inner, out_stride, destination, &ahead};
        (width - j < WIDTH ? narrow : wide)[next - row](&p);
      }
    }
  }
}

// --- what is between products --------------------------------------------------------------------------------------

// A row -> its levels, which are next to its largest value at most `largest`.
INLINE void quantize_row(const Factor* f, int64_t row, int64_t width) {
#ifdef M2D_INT8
  // Sums of products with weights of up to 127 stay below 2^31.
  const float largest = PER_UNIT == 4 ? 127 : (float)at_most(2047, INT32_MAX / (128 * width));
  const float* x = f->values + row * width;
  V most = v_zero(), poison = v_zero();
  for (int64_t i = 0; i < width; i += LANES) {
    V v = v_load(x + i);
    most = v_max(most, v_abs(v)), poison = v_fma(v, v_zero(), poison);
  }
  // What is not finite makes the scale a NaN, and so all outputs of the row.
  float scale = at_least_float(v_greatest(most) / largest, 1e-12f) + v_sum(poison);
  V factor = v_set1(1 / scale);
  Level* to = (Level*)(f->levels + row * (width / VALUES));
  for (int64_t i = 0; i < width; i += LANES) {
    int32_t levels[LANES];
    v_store(levels, (V)(v_to_int(v_load(x + i) * factor) + OFFSET));
    for (int j = 0; j < LANES; j++) to[i + j] = (Level)levels[j];
  }
  f->scales[row] = scale;
#else
  (void)f, (void)row, (void)width;
#endif
}

static void norm_rows(const Chunk* chunk, const Norm* norm) {
  int64_t dim = chunk->shape->dim;
  Share rows = share_of(chunk->team, chunk->windows * chunk->shape->tokens);
  for (int64_t row = rows.first; row < rows.stop; row++) {
    norm_row(chunk->x + row * dim, norm, dim, chunk->scratch->normed.values + row * dim);
    quantize_row(&chunk->scratch->normed, row, dim);
  }
}

// Of what was computed by several members; all wait for one another before and after.
static void quantize_rows(const Chunk* chunk, const Factor* f, int64_t width) {
  if (VALUES == 1) return;
  Share rows = share_of(chunk->team, chunk->windows * chunk->shape->tokens);
  for (int64_t row = rows.first; row < rows.stop; row++) quantize_row(f, row, width);
  wait_for_all(chunk->team);
}

// --- attention -----------------------------------------------------------------------------------------------------

// Scores of one query -> exp(score - greatest); returns their sum.
INLINE float softmax(float* scores, int64_t tokens, float factor) {
  int64_t whole = tokens / LANES * LANES, left = tokens - whole;
  V lowest = v_set1(-__builtin_inff()), greatest = lowest, sum = v_zero(), scale = v_set1(factor);
  for (int64_t i = 0; i < whole; i += LANES) greatest = v_max(greatest, v_load(scores + i));
  if (left) greatest = v_max(greatest, v_first(v_load(scores + whole), left, lowest));
  V most = v_set1(v_greatest(greatest));
  for (int64_t i = 0; i < tokens; i += LANES) {
    V e = v_exp((v_load(scores + i) - most) * scale);
    if (i == whole) e = v_first(e, left, v_zero());
    sum += e;
    v_store(scores + i, e);
  }
  return v_sum(sum);
}

// Some queries of one head: keys in panels of [head_dim][WIDTH], values in panels of [token][WIDTH].
typedef struct {
  const Shape* shape;
  const float *q, *keys, *values;
  float *scores, *to;
} Head;

INLINE void weigh(const Head* h, int64_t first, int rows, int vectors, const float* reciprocals) {
  const Shape* s = h->shape;
  V sums[ROWS][VECTORS] = {0};
  add_products(h->scores, s->width, h->values + first * s->tokens, WIDTH, s->tokens, rows, vectors, sums);
  UNROLLED(int r = 0; r < rows; r++) {
    V factor = v_set1(reciprocals[r]);
    UNROLLED(int j = 0; j < vectors; j++) v_store(h->to + r * s->dim + first + LANES * j, sums[r][j] * factor);
  }
}

INLINE void attend(const Head* h, int rows) {
  const Shape* s = h->shape;
  for (int64_t first = 0; first < s->width; first += WIDTH) {
    V sums[ROWS][VECTORS] = {0};
    add_products(h->q, 3 * s->dim, h->keys + first * s->head_dim, WIDTH, s->head_dim, rows, VECTORS, sums);
    UNROLLED(int r = 0; r < rows; r++) {
      UNROLLED(int j = 0; j < VECTORS; j++) v_store(h->scores + r * s->width + first + LANES * j, sums[r][j]);
    }
  }
  float reciprocals[ROWS], factor = 1.0f / __builtin_sqrtf(s->head_dim);
  UNROLLED(int r = 0; r < rows; r++) reciprocals[r] = 1.0f / softmax(h->scores + r * s->width, s->tokens, factor);
  int64_t first = 0;
  for (; first + WIDTH <= s->head_dim; first += WIDTH) weigh(h, first, rows, VECTORS, reciprocals);
  if (first < s->head_dim) weigh(h, first, rows, at_least(1, VECTORS / 2), reciprocals);
}

#define ATTEND_ROWS(n) \
  static __attribute__((noinline)) void attend_##n(const Head* h) { attend(h, at_most(n, ROWS)); }
FOR_EACH_NUMBER(ATTEND_ROWS)

// Keys of a head -> [panel][head_dim][WIDTH]. What is beyond the tokens is masked, but must be a number.
static void lay_out_keys(const Shape* s, const float* k, float* keys) {
  int64_t stride = 3 * s->dim;
  for (int64_t token = 0; token < s->width; token += LANES) {
    for (int64_t i = 0; i < s->head_dim; i += LANES) {
      V r[LANES];
      for (int j = 0; j < LANES; j++) r[j] = token + j < s->tokens ? v_load(k + (token + j) * stride + i) : v_zero();
      v_transpose(r);
      float* to = keys + token / WIDTH * WIDTH * s->head_dim + i * WIDTH + token % WIDTH;
      for (int j = 0; j < LANES; j++) v_store(to + j * WIDTH, r[j]);
    }
  }
}

static void lay_out_values(const Shape* s, const float* v, float* values) {
  for (int64_t first = 0; first < s->head_dim; first += WIDTH) {
    int64_t width = at_most(WIDTH, s->head_dim - first);
    for (int64_t token = 0; token < s->tokens; token++) {
      memcpy(values + (first * s->tokens + token * WIDTH), v + token * 3 * s->dim + first, (size_t)width * sizeof(float));
    }
  }
}

static void attention(const Chunk* chunk) {
  static void (*const attend_rows[])(const Head*) = FUNCTIONS(attend);
  const Shape* s = chunk->shape;
  float *keys = chunk->scratch->members + chunk->team.rank * s->member_floats;
  float *values = keys + s->head_dim * s->width, *scores = values + rounded_up(s->head_dim, WIDTH) * s->width;
  int64_t stride = 3 * s->dim;
  Share tasks = share_of(chunk->team, chunk->windows * s->heads);
  for (int64_t task = tasks.first; task < tasks.stop; task++) {
    int64_t window = task / s->heads, column = task % s->heads * s->head_dim;
    const float *q = chunk->scratch->qkv + window * s->tokens * stride + column, *k = q + s->dim, *v = k + s->dim;
    float* to = chunk->scratch->normed.values + window * s->tokens * s->dim + column;
    lay_out_keys(s, k, keys);
    lay_out_values(s, v, values);
    for (int64_t i = 0; i < num_strips(s->tokens); i++) {
      int64_t token = strip(s->tokens, i), next = strip(s->tokens, i + 1);
      attend_rows[next - token](&(Head){s, q + token * stride, keys, values, scores, to + token * s->dim});
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
  layer(chunk, &scratch->normed, qkv, scratch->qkv, 3 * s->dim, TO_OUTPUT, &proj);
  wait_for_all(chunk->team);
  attention(chunk);
  wait_for_all(chunk->team);
  quantize_rows(chunk, &scratch->normed, s->dim);
  layer(chunk, &scratch->normed, proj, chunk->x, s->dim, TO_RESIDUAL, &fc1);
  wait_for_all(chunk->team);
  norm_rows(chunk, &block->norm2);
  wait_for_all(chunk->team);
  for (int64_t first = 0; first < s->hidden; first += s->part) {
    int64_t part = fc1.outputs, left = s->hidden - first - part;
    Matrix fc2 = inputs_from(all_fc2, first, part);
    layer(chunk, &scratch->normed, fc1, scratch->hidden.values, part, TO_HIDDEN, &fc2);
    wait_for_all(chunk->team);
    quantize_rows(chunk, &scratch->hidden, part);
    if (left) fc1 = outputs_from(all_fc1, first + part, at_most(s->part, left));
    layer(chunk, &scratch->hidden, fc2, chunk->x, s->dim, TO_RESIDUAL, left ? &fc1 : then ? &next_qkv : NULL);
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

void NAMED(M2D_NAME, _run)(const Call* call) {
  Shape shape = shape_of(call);
  Scratch scratch;
  run_in_teams(call, run_windows, lay_out(&shape, NULL, &scratch));
}

#ifndef M2D_INT8
// --- tokens --------------------------------------------------------------------------------------------------------

static Shape shape_of_tokens(const TokensCall* call) {
  Shape s = {.dim = call->dim, .tokens = 1 + (int64_t)call->rows * call->columns};
  s.part = (int64_t)call->height * call->width;  // values of a patch
  int64_t windows = call->call.windows, teams = num_teams(windows, call->call.threads);
  s.windows = at_most(at_least(1, CHUNK_ROWS / s.tokens), (windows + teams - 1) / teams);
  s.members = (call->call.threads + teams - 1) / teams;
  s.member_floats = s.part * PANEL;
  return s;
}

// The patches of a chunk's windows are in `hidden`.
static int64_t lay_out_tokens(const Shape* s, uint8_t* base, Scratch* scratch) {
  Memory memory = {base, 0};
  scratch->hidden = take_factor(&memory, s->windows * s->tokens, s->part);
  scratch->members = take_floats(&memory, s->members * s->member_floats);
  return memory.used;
}

int64_t NAMED(M2D_NAME, _tokens_scratch)(const TokensCall* call) {
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
      cut_patch(call, log_mel, i % s.tokens, scratch.hidden.values + i * s.part, chunk.x + i * s.dim);
    }
    wait_for_all(team);
    layer(&chunk, &scratch.hidden, matrix_of(&call->projection, s.part, s.dim), chunk.x, s.dim, TO_RESIDUAL, NULL);
    wait_for_all(team);
    Share windows = share_of(team, chunk.windows);
    for (int64_t i = windows.first; i < windows.stop; i++) {
      float* x = chunk.x + i * s.tokens * s.dim;
      for (int64_t j = 0; j < s.dim; j++) x[j] = call->class_token[j] + call->positions[j];
    }
  }
}

void NAMED(M2D_NAME, _tokens_run)(const TokensCall* call) {
  Shape shape = shape_of_tokens(call);
  Scratch scratch;
  run_in_teams(&call->call, make_tokens, lay_out_tokens(&shape, NULL, &scratch));
}
#endif

// A self-test: see probe.h.
int NAMED(M2D_NAME, _probe)(int bytes) { return probe_blocks(NAMED(M2D_NAME, _scratch), NAMED(M2D_NAME, _run), bytes); }
