// What the processor's vector and matrix units do by themselves, from registers alone: no program can be faster.
//
//     unit_rates THREADS UNIT...        UNIT: fp32, bf16, int8
//
// Prints GFLOP/s of all threads together for each unit, one line each: the best of many short spells.

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

static double fp32_spell(void) {
  __m512 sums[CHAINS], x = _mm512_set1_ps(0.5f);
#pragma GCC unroll 12
  for (int i = 0; i < CHAINS; i++) sums[i] = x;
  for (long round = 0; round < VECTOR_ROUNDS; round++) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++) {
      sums[i] = _mm512_fmadd_ps(sums[i], x, x);
      __asm__ volatile("" : "+v"(sums[i]));
    }
  }
  return 2.0 * 16 * CHAINS * VECTOR_ROUNDS;
}

static double bf16_spell(void) {
  for (long round = 0; round < TILE_ROUNDS; round++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  return 4.0 * TILE_ROUNDS * 2 * 16 * 16 * 32;
}

static double int8_spell(void) {
  for (long round = 0; round < TILE_ROUNDS; round++) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  return 4.0 * TILE_ROUNDS * 2 * 16 * 16 * 64;
}

static double (*spell)(void);
static int uses_tiles;
static pthread_barrier_t together;

static void* run(void* best) {
  if (uses_tiles) configure_tiles();
  for (int i = 0; i < SPELLS; i++) {
    pthread_barrier_wait(&together);
    double began = now(), operations = spell(), rate = operations / (now() - began) / 1e9;
    if (rate > *(double*)best) *(double*)best = rate;
  }
  if (uses_tiles) _tile_release();
  return NULL;
}

int main(int count, char** words) {
  int threads = count > 1 ? atoi(words[1]) : 0;
  if (threads < 1 || threads > MOST_THREADS) return 2;
  for (int i = 2; i < count; i++) {
    uses_tiles = strcmp(words[i], "fp32") != 0;
    spell = !uses_tiles ? fp32_spell : strcmp(words[i], "bf16") == 0 ? bf16_spell : int8_spell;
    if (uses_tiles && syscall(SYS_arch_prctl, 0x1023, 18)) return 1;
    double best[MOST_THREADS] = {0}, sum = 0;
    pthread_t workers[MOST_THREADS];
    pthread_barrier_init(&together, NULL, threads);
    for (int t = 0; t < threads; t++) pthread_create(&workers[t], NULL, run, &best[t]);
    for (int t = 0; t < threads; t++) pthread_join(workers[t], NULL);
    pthread_barrier_destroy(&together);
    for (int t = 0; t < threads; t++) sum += best[t];
    printf("%s %.1f\n", words[i], sum);
  }
  return 0;
}
