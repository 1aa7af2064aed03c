// What the processor's vector and matrix units do by themselves, from registers alone: no program can be faster.
//
//     unit_rates THREADS KIND:UNIT...        KIND: fp32, bf16, int8; UNIT: amx, avx512_bf16, avx512, avx_vnni, avx2
//
// Without AMX in the compiler's flags it is for AVX2 alone. A unit's products are those that its kernels are made of:
// bf16 of float32 where no instruction multiplies it, int8 on AVX2 of three instructions.
//
// Prints GFLOP/s of all threads together for each kind, one line each: the best of many short spells.

#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { SPELLS = 60, TILE_ROUNDS = 20000, VECTOR_ROUNDS = 100000, CHAINS = 12, MOST_THREADS = 256 };

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

#ifdef __AMX_TILE__
static void configure_tiles(void) {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
  } config = {.palette = 1};
  for (int i = 0; i < 8; i++) config.bytes_per_row[i] = 64, config.rows[i] = 16;
  __asm__ volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

#else
static void configure_tiles(void) {}
#define _tile_release() ((void)0)
#endif

// Each of many sums in registers, enough that none has to wait for itself, is `product` of itself, which multiplies so
// many values in each of 16 lanes.
#define VECTOR_SPELL(name, vector, lanes, product, values)                 \
  static double name(void) {                                               \
    vector sums[CHAINS], x;                                                \
    memset(&x, 0, sizeof x);                                               \
    __asm__ volatile("" : "+x"(x));                                        \
    _Pragma("GCC unroll 12") for (int i = 0; i < CHAINS; i++) sums[i] = x; \
    for (long round = 0; round < VECTOR_ROUNDS; round++) {                 \
      _Pragma("GCC unroll 12") for (int i = 0; i < CHAINS; i++) {          \
        __asm__ volatile("" : "+x"(x));                                    \
        sums[i] = product;                                                 \
        __asm__ volatile("" : "+v"(sums[i]));                              \
      }                                                                    \
    }                                                                      \
    return 2.0 * (lanes) * (values) * CHAINS * VECTOR_ROUNDS;              \
  }

VECTOR_SPELL(fp32_on_avx2, __m256, 8, _mm256_fmadd_ps(x, x, sums[i]), 1)
VECTOR_SPELL(int8_on_avx2, __m256i, 8,
             _mm256_add_epi32(sums[i], _mm256_madd_epi16(_mm256_maddubs_epi16(x, x), x)), 4)

#ifdef __AMX_TILE__
VECTOR_SPELL(int8_on_avx_vnni, __m256i, 8, _mm256_dpbusd_epi32(sums[i], x, x), 4)
VECTOR_SPELL(fp32_on_avx512, __m512, 16, _mm512_fmadd_ps(x, x, sums[i]), 1)
VECTOR_SPELL(bf16_on_avx512, __m512, 16, _mm512_dpbf16_ps(sums[i], (__m512bh)x, (__m512bh)x), 2)
VECTOR_SPELL(int8_on_avx512, __m512i, 16, _mm512_dpbusd_epi32(sums[i], x, x), 4)

// Two by two tiles, which multiply so many values for each sum.
#define TILE_SPELL(name, product, values)                \
  static double name(void) {                             \
    for (long round = 0; round < TILE_ROUNDS; round++) { \
      product(0, 4, 6);                                  \
      product(1, 4, 7);                                  \
      product(2, 5, 6);                                  \
      product(3, 5, 7);                                  \
    }                                                    \
    return 4.0 * TILE_ROUNDS * 2 * 16 * 16 * (values);   \
  }

TILE_SPELL(bf16_on_amx, _tile_dpbf16ps, 32)
TILE_SPELL(int8_on_amx, _tile_dpbssd, 64)
#endif

static const struct {
  const char* name;
  double (*spell)(void);
  int uses_tiles;
} units[] = {
    {"fp32:avx2", fp32_on_avx2, 0},
    {"bf16:avx2", fp32_on_avx2, 0},
    {"int8:avx2", int8_on_avx2, 0},
#ifdef __AMX_TILE__
    {"int8:avx_vnni", int8_on_avx_vnni, 0},
    {"fp32:avx512", fp32_on_avx512, 0},
    {"bf16:avx512", fp32_on_avx512, 0},
    {"int8:avx512", int8_on_avx512, 0},
    {"bf16:avx512_bf16", bf16_on_avx512, 0},
    {"int8:avx512_bf16", int8_on_avx512, 0},
    {"bf16:amx", bf16_on_amx, 1},
    {"int8:amx", int8_on_amx, 1},
#endif
};
enum { UNITS = sizeof units / sizeof units[0] };

static int unit;  // that is measured
static pthread_barrier_t together;

static void* run(void* best) {
  if (units[unit].uses_tiles) configure_tiles();
  for (int i = 0; i < SPELLS; i++) {
    pthread_barrier_wait(&together);
    double began = now(), operations = units[unit].spell(), rate = operations / (now() - began) / 1e9;
    if (rate > *(double*)best) *(double*)best = rate;
  }
  if (units[unit].uses_tiles) _tile_release();
  return NULL;
}

int main(int count, char** words) {
  int threads = count > 1 ? atoi(words[1]) : 0;
  if (threads < 1 || threads > MOST_THREADS) return 2;
  for (int i = 2; i < count; i++) {
    for (unit = 0; unit < UNITS && strcmp(words[i], units[unit].name);) unit++;
    if (unit == UNITS) return 2;
    if (units[unit].uses_tiles && syscall(SYS_arch_prctl, 0x1023, 18)) return 1;
    double best[MOST_THREADS] = {0}, sum = 0;
    pthread_t workers[MOST_THREADS];
    pthread_barrier_init(&together, NULL, threads);
    for (int t = 0; t < threads; t++) pthread_create(&workers[t], NULL, run, &best[t]);
    for (int t = 0; t < threads; t++) pthread_join(workers[t], NULL);
    pthread_barrier_destroy(&together);
    for (int t = 0; t < threads; t++) sum += best[t];
    printf("%.4s %.1f\n", words[i], sum);
  }
  return 0;
}
