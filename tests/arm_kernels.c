// Every kernel on fixed inputs, and what comes of them in files. tests/test_arm.py compiles it twice, for an emulated
// processor and in generic vectors for this one, and compares.
//
//   FLOAT, LOG_MEL, INT8, INT8_DOT  what the kernels' functions are called by
//
// Arguments: a folder, and "all", or "oldest" for what runs without instructions for dot products.
//
// Windows together, in several threads, must be what they are alone, to the last bit: else it fails.

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "blocks.h"
#include "log_mel.h"

#define JOINED(a, b, c) a##b##c
#define NAMED(name, what) JOINED(m2d_, name, what)
#define DECLARE(name, call)                  \
  int64_t NAMED(name, _scratch)(const call*); \
  void NAMED(name, _run)(const call*);
#define DECLARE_PACKING(name)                 \
  int32_t NAMED(name, _outputs_together)(void); \
  int32_t NAMED(name, _inputs_together)(void);
DECLARE_PACKING(INT8)
DECLARE_PACKING(INT8_DOT)
DECLARE(FLOAT, Call)
DECLARE(INT8, Call)
DECLARE(INT8_DOT, Call)
int64_t NAMED(FLOAT, _tokens_scratch)(const TokensCall*);
void NAMED(FLOAT, _tokens_run)(const TokensCall*);
int64_t NAMED(LOG_MEL, _log_mel_scratch)(const LogMelCall*);
void NAMED(LOG_MEL, _log_mel_run)(const LogMelCall*);

static const char* folder;

static void fail(const char* why) {
  fprintf(stderr, "%s\n", why);
  exit(1);
}

// --- threads -------------------------------------------------------------------------------------------------------

enum { MOST_THREADS = 8 };

typedef struct {
  void (*work)(void*);
  void* data;
  int number;
} Member;

static _Thread_local int number_of_this;
static int num_members;

static void* run_member(void* pointer) {
  Member* member = pointer;
  number_of_this = member->number;
  member->work(member->data);
  return NULL;
}

static void parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags) {
  (void)flags;
  pthread_t ids[MOST_THREADS];
  Member members[MOST_THREADS];
  num_members = (int)threads;
  for (int i = 0; i < num_members; i++) {
    members[i] = (Member){work, data, i};
    if (i && pthread_create(&ids[i], NULL, run_member, &members[i])) fail("no thread");
  }
  run_member(&members[0]);
  for (int i = 1; i < num_members; i++) pthread_join(ids[i], NULL);
}

static int thread_number(void) { return number_of_this; }
static int num_threads(void) { return num_members; }
static const Runtime runtime = {parallel, thread_number, num_threads};

// --- inputs --------------------------------------------------------------------------------------------------------

static uint32_t state = 1;

static uint32_t random_bits(void) {
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

// In [-1, 1), the same on all processors.
static float uniform(void) { return (float)random_bits() / (1 << 23) - 1; }

static void* memory(size_t bytes) {
  void* found = aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!found) fail("no memory");
  memset(found, 0xff, bytes);  // NaN: what is not written must not be read
  return found;
}

static float* floats(int64_t count, float size, float mean) {
  float* found = memory(count * sizeof(float));
  for (int64_t i = 0; i < count; i++) found[i] = uniform() * size + mean;
  return found;
}

static uint16_t* bfloat16s(int64_t count, float size) {
  uint16_t* found = memory(count * sizeof(uint16_t));
  for (int64_t i = 0; i < count; i++) {
    float value = uniform() * size;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    found[i] = bits >> 16;
  }
  return found;
}

static int8_t* int8s(int64_t count) {
  int8_t* found = memory(count);
  for (int64_t i = 0; i < count; i++) found[i] = (int8_t)(random_bits() % 255 - 127);
  return found;
}

// How the kernel that runs wants its int8 weights.
static int32_t outputs_together, inputs_together;

// (outputs, inputs) -> what lies side by side in the kernel.
static int8_t* packed(const int8_t* weights, int64_t inputs, int64_t outputs) {
  int8_t *found = memory(inputs * outputs), *to = found;
  for (int64_t piece = 0; piece < outputs; piece += outputs_together) {
    for (int64_t unit = 0; unit < inputs; unit += inputs_together) {
      for (int64_t output = piece; output < piece + outputs_together; output++, to += inputs_together) {
        memcpy(to, weights + output * inputs + unit, inputs_together);
      }
    }
  }
  return found;
}

typedef int Stored;  // as blocks.h numbers it, or
enum { INTEGER = 3 };

static Linear linear(int64_t inputs, int64_t outputs, Stored stored) {
  float size = 1.7f / sqrtf(inputs);
  Linear found = {.bias = floats(outputs, 0.2f, 0)};
  if (stored == FLOAT32) found.weight = floats(inputs * outputs, size, 0);
  if (stored == BFLOAT16) {
    found.weight = bfloat16s(inputs * outputs, size), found.weight_format = BFLOAT16;
    found.bias = bfloat16s(outputs, 0.2f), found.bias_format = BFLOAT16;
  }
  if (stored == INTEGER) found.weight = packed(int8s(inputs * outputs), inputs, outputs), found.scales = floats(outputs, size / 1000, size / 127);
  return found;
}

static Norm norm(int64_t dim) { return (Norm){floats(dim, 0.2f, 1), floats(dim, 0.2f, 0), 1e-5f}; }

static Block block_of(int64_t dim, int64_t heads, int64_t hidden, Stored stored) {
  Block found = {.dim = dim, .hidden = hidden, .heads = heads, .quantized = stored == INTEGER};
  found.norm1 = norm(dim), found.norm2 = norm(dim);
  found.qkv = linear(dim, 3 * dim, stored), found.proj = linear(dim, dim, stored);
  found.fc1 = linear(dim, hidden, stored), found.fc2 = linear(hidden, dim, stored);
  return found;
}

// --- kernels -------------------------------------------------------------------------------------------------------

typedef struct {
  int64_t (*scratch)(const Call*);
  void (*run)(const Call*);
} Kernel;

static void write_floats(const char* kernel, const char* name, const float* values, int64_t count) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s %s", folder, kernel, name);
  FILE* file = fopen(path, "wb");
  if (!file || fwrite(values, sizeof(float), count, file) != (size_t)count || fclose(file)) fail("cannot write");
}

static void run(Kernel kernel, Call* call) {
  call->scratch = memory(kernel.scratch(call));
  call->runtime = &runtime;
  kernel.run(call);
  free(call->scratch);
}

static float* copy_of(const float* values, int64_t count) {
  return memcpy(memory(count * sizeof(float)), values, count * sizeof(float));
}

static void expect_equal(const float* a, const float* b, int64_t count, const char* what) {
  if (memcmp(a, b, count * sizeof(float))) fail(what);
}

enum { WINDOWS = 3, ROWS = 4, COLUMNS = 5, TOKENS = 1 + ROWS * COLUMNS };

// Two blocks, and features of the second.
static void run_blocks(Kernel kernel, const char* name, Stored stored, int64_t dim, int64_t heads, int64_t hidden) {
  Block blocks[] = {block_of(dim, heads, hidden, stored), block_of(dim, heads, hidden, stored)};
  Norm last = norm(dim);
  int64_t count = TOKENS * dim, all = WINDOWS * count;
  float *x = floats(all, 1, 0), *features[] = {NULL, memory(all * sizeof(float))}, *together = copy_of(x, all);
  Call call = {blocks, 2, together, WINDOWS, TOKENS, .threads = 1, .rows = ROWS, .features = features, .norm = &last};
  run(kernel, &call);
  char label[64];
  snprintf(label, sizeof label, "x %d", (int)dim);
  write_floats(name, label, together, all);
  snprintf(label, sizeof label, "features %d", (int)dim);
  write_floats(name, label, features[1], WINDOWS * (TOKENS - 1) * dim);
  call.features = NULL;
  for (int threads = 2; threads <= 5; threads += 3) {
    call.x = copy_of(x, all), call.threads = threads;
    run(kernel, &call);
    expect_equal(call.x, together, all, "threads change what comes of windows");
  }
  for (int window = 0; window < WINDOWS; window++) {
    call.x = copy_of(x + window * count, count), call.windows = 1, call.threads = 1 + window;
    run(kernel, &call);
    expect_equal(call.x, together + window * count, count, "a window depends on the others");
  }
}

static Linear zeros(int64_t inputs, int64_t outputs) {
  Linear found = {.weight = memset(memory(inputs * outputs), 0, inputs * outputs), .scales = floats(outputs, 0, 1)};
  return found;
}

// Sums of the largest levels, as in test_native.py: what the second layer multiplies are the biases of the first.
static void run_largest(Kernel kernel, const char* name) {
  enum { DIM = 3072, HEADS = 48, FEW = 4 };
  Norm plain = {.eps = 1e-5f};
  Block block = {.dim = DIM, .hidden = 64, .heads = HEADS, .quantized = 1, .norm1 = plain, .norm2 = plain};
  block.qkv = zeros(DIM, 3 * DIM), block.proj = zeros(DIM, DIM);
  block.fc1 = zeros(DIM, 64), block.fc2 = zeros(64, DIM);
  float *bias = floats(3 * DIM, 0, 0), *x = memory(FEW * DIM * sizeof(float));
  int8_t* weights = memory(DIM * DIM);
  block.qkv.bias = bias;
  for (int64_t i = 0; i < (int64_t)DIM * DIM; i++) {
    int64_t row = i / DIM, column = i % DIM;
    int is_negative = row == 0 ? 0 : row == 1 ? 1 : row < 8 ? column >> (row - 2) & 1 : random_bits() >> 23;
    weights[i] = is_negative ? -127 : 127;
  }
  block.proj.weight = packed(weights, DIM, DIM);
  for (int pattern = 0; pattern < 4; pattern++) {
    for (int i = 0; i < DIM; i++) {
      int is_negative = pattern == 0 ? 0 : pattern == 1 ? 1 : pattern == 2 ? i & 1 : random_bits() >> 23;
      bias[2 * DIM + i] = is_negative ? -1 : 1;
    }
    memset(x, 0, FEW * DIM * sizeof(float));
    run(kernel, &(Call){&block, 1, x, 1, FEW, .threads = 1});
    char label[64];
    snprintf(label, sizeof label, "largest %d", pattern);
    write_floats(name, label, x, FEW * DIM);
  }
}

static void run_int8(Kernel kernel, const char* name) {
  run_blocks(kernel, name, INTEGER, 64, 2, 832);
  run_blocks(kernel, name, INTEGER, 192, 3, 192);
  run_largest(kernel, name);
}

static void run_tokens(void) {
  enum { DIM = 96, SIDE = 16, GRID_COLUMNS = 7, STRIDE = GRID_COLUMNS * SIDE, WINDOW = ROWS * SIDE * STRIDE };
  float *log_mel = floats(WINDOWS * WINDOW, 1, 0), *x = memory(WINDOWS * TOKENS * DIM * sizeof(float));
  TokensCall call = {{.x = x, .windows = WINDOWS, .tokens = TOKENS, .runtime = &runtime},
                     log_mel, WINDOW, STRIDE, ROWS, COLUMNS, SIDE, SIDE, DIM, GRID_COLUMNS,
                     linear(SIDE * SIDE, DIM, FLOAT32), floats(DIM, 1, 0), floats((1 + ROWS * GRID_COLUMNS) * DIM, 1, 0)};
  for (int threads = 1; threads <= 3; threads += 2) {
    call.call.threads = threads;
    call.call.scratch = memory(NAMED(FLOAT, _tokens_scratch)(&call));
    NAMED(FLOAT, _tokens_run)(&call);
    if (threads > 1) expect_equal(x, call.call.x, WINDOWS * TOKENS * DIM, "threads change tokens");
    call.call.x = memory(WINDOWS * TOKENS * DIM * sizeof(float));
  }
  write_floats("tokens", "x", x, WINDOWS * TOKENS * DIM);
}

// Cosines and sines of -2 pi j k / n for the stages of a transform.
static float* twiddles_of(const int32_t* radices, int stages, int n) {
  int64_t at = 0;
  float* found = memory(64 * n * sizeof(float));
  for (int i = 0; i < stages; i++) {
    for (int j = 0; j < n / radices[i]; j++) {
      for (int k = 1; k < radices[i]; k++) {
        double angle = -2 * M_PI * (j * k % n) / n;
        found[at++] = (float)cos(angle), found[at++] = (float)sin(angle);
      }
    }
    n /= radices[i];
  }
  return found;
}

static void run_log_mel(void) {
  enum { N_FFT = 480, HOP = 160, MELS = 20, FRAMES = 21, CLIPS = 2, SAMPLES = N_FFT + (FRAMES - 1) * HOP, BINS = 30 };
  static const int32_t radices[] = {5, 4, 4, 3};
  int32_t first_bins[MELS], num_bins[MELS];
  for (int i = 0; i < MELS; i++) first_bins[i] = 11 * i, num_bins[i] = i == 3 ? 0 : BINS;
  float* split = memory(2 * (N_FFT / 2 + 1) * sizeof(float));
  for (int k = 0; k <= N_FFT / 2; k++) {
    double angle = -2 * M_PI * k / N_FFT;
    split[2 * k] = (float)cos(angle), split[2 * k + 1] = (float)sin(angle);
  }
  LogMel settings = {N_FFT, HOP, MELS, 4, floats(N_FFT, 0.5f, 0.5f), radices, twiddles_of(radices, 4, N_FFT / 2), split,
                     first_bins, num_bins, floats(MELS * BINS, 0.5f, 0.5f), 1e-7f, 1.5f, 2.5f};
  float *samples = floats(CLIPS * SAMPLES, 1, 0), *out = memory(CLIPS * MELS * FRAMES * sizeof(float));
  float* alone = memory(MELS * FRAMES * sizeof(float));
  LogMelCall call = {&settings, samples, CLIPS, SAMPLES, FRAMES, out, &runtime, .threads = 3};
  call.scratch = memory(NAMED(LOG_MEL, _log_mel_scratch)(&call));
  NAMED(LOG_MEL, _log_mel_run)(&call);
  call.samples = samples + SAMPLES, call.clips = 1, call.out = alone, call.threads = 1;
  NAMED(LOG_MEL, _log_mel_run)(&call);
  expect_equal(alone, out + MELS * FRAMES, MELS * FRAMES, "a clip depends on the others");
  write_floats("log-mel", "out", out, CLIPS * MELS * FRAMES);
}

int main(int count, char** arguments) {
  if (count != 3) return 2;
  folder = arguments[1];
  Kernel on_floats = {NAMED(FLOAT, _scratch), NAMED(FLOAT, _run)};
  run_log_mel();
  run_tokens();
  run_blocks(on_floats, "fp32", FLOAT32, 64, 2, 832);
  run_blocks(on_floats, "fp32", FLOAT32, 96, 3, 160);
  run_blocks(on_floats, "bf16", BFLOAT16, 192, 3, 192);
  outputs_together = NAMED(INT8, _outputs_together)(), inputs_together = NAMED(INT8, _inputs_together)();
  run_int8((Kernel){NAMED(INT8, _scratch), NAMED(INT8, _run)}, "int8");
  if (strcmp(arguments[2], "all")) return 0;
  outputs_together = NAMED(INT8_DOT, _outputs_together)(), inputs_together = NAMED(INT8_DOT, _inputs_together)();
  run_int8((Kernel){NAMED(INT8_DOT, _scratch), NAMED(INT8_DOT, _run)}, "int8 dot");
  return 0;
}
