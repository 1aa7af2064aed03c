// The blocks of tiles.h on vectors: AVX-512's dot products of 2 bf16 (AVX512_BF16) and of 4 int8 (VNNI).

enum {
  HIDDEN_BYTES = 640 << 10,
  CHUNK_ROWS = 192,
  LEVELS_ARE_UNSIGNED = 1,  // there is no instruction for two signed factors
};

#include "tiles.h"

INLINE void begin_products(void) {}
INLINE void end_products(void) {}

typedef int32_t __attribute__((may_alias)) Group;  // of the values that a dot product adds up

// Half of a row tile of A times two column tiles of B: 16 vectors of sums leave room for the factors, and for what is
// done beside it. Of what is beyond a window's tokens, a quarter of a tile is computed at most.
enum { HALF = TILE_ROWS / 2, QUARTER = TILE_ROWS / 4 };

#define ADD_PRODUCT(sums, a, b)                                                              \
  sums = is_int8 ? _mm512_castsi512_ps(_mm512_dpbusd_epi32(_mm512_castps_si512(sums), a, b)) \
                 : _mm512_dpbf16_ps(sums, (__m512bh)(a), (__m512bh)(b))

// Something may be done beside it, or nothing (NULL).
INLINE void multiply_rows(const uint8_t* a, const Factors* f, int rows, int is_int8, uint8_t* c, const Sums* sums,
                          const Beside* beside) {
  __m512 s[HALF][2];
  for (int r = 0; r < rows; r++) s[r][0] = s[r][1] = _mm512_setzero_ps();
  int64_t to_second = f->b_stride;
  for (const uint8_t *b = f->b, *stop = b + f->steps * TILE; b < stop; a += TILE, b += TILE) {
    if (beside) fetch(beside->ahead), finish_some(beside);
#pragma GCC unroll 4
    for (int i = 0; i < TILE_ROWS; i++) {
      __m512i b0 = _mm512_load_si512(b + 64 * i), b1 = _mm512_load_si512(b + to_second + 64 * i);
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++) {
        __m512i group = _mm512_set1_epi32(*(const Group*)(a + 64 * r + 4 * i));
#ifdef __AVX512F__
        __asm__("" : "+v"(group));  // without it Clang 16 crashes
#endif
        ADD_PRODUCT(s[r][0], group, b0);
        ADD_PRODUCT(s[r][1], group, b1);
      }
    }
  }
  for (int r = 0; r < rows; r++) {
    _mm512_store_ps(c + r * sums->row, s[r][0]);
    _mm512_store_ps(c + r * sums->row + sums->column_tile, s[r][1]);
  }
}

// For each kind and number of rows, and whatever is done beside it, a function of its own, in which all sums are in
// registers.
#define MULTIPLY_ROWS(name, rows, is_int8)                                                                       \
  static __attribute__((noinline)) void name(const uint8_t* a, const Factors* f, uint8_t* c, const Sums* sums) { \
    multiply_rows(a, f, rows, is_int8, c, sums, NULL);                                                           \
  }
MULTIPLY_ROWS(multiply_half_bf16, HALF, 0)
MULTIPLY_ROWS(multiply_half_int8, HALF, 1)
MULTIPLY_ROWS(multiply_quarter_bf16, QUARTER, 0)
MULTIPLY_ROWS(multiply_quarter_int8, QUARTER, 1)

#define MULTIPLY_BESIDE(name, destination, is_int8)                                                            \
  static __attribute__((noinline)) void name(const uint8_t* a, const Factors* f, uint8_t* c, const Sums* sums, \
                                             const Beside* beside) {                                           \
    Beside known = {beside->ahead, beside->last, beside->dim, destination, is_int8};                           \
    multiply_rows(a, f, HALF, is_int8, c, sums, &known);                                                       \
  }
MULTIPLY_BESIDE(multiply_beside_heads_bf16, TO_HEADS, 0)
MULTIPLY_BESIDE(multiply_beside_heads_int8, TO_HEADS, 1)
MULTIPLY_BESIDE(multiply_beside_residual_bf16, TO_RESIDUAL, 0)
MULTIPLY_BESIDE(multiply_beside_residual_int8, TO_RESIDUAL, 1)
MULTIPLY_BESIDE(multiply_beside_hidden_bf16, TO_HIDDEN, 0)
MULTIPLY_BESIDE(multiply_beside_hidden_int8, TO_HIDDEN, 1)

INLINE void multiply_beside(const uint8_t* a, const Factors* f, int is_int8, uint8_t* c, const Sums* sums,
                            const Beside* beside) {
  switch (beside->destination) {
    case TO_HEADS:
      (is_int8 ? multiply_beside_heads_int8 : multiply_beside_heads_bf16)(a, f, c, sums, beside);
      break;
    case TO_RESIDUAL:
      (is_int8 ? multiply_beside_residual_int8 : multiply_beside_residual_bf16)(a, f, c, sums, beside);
      break;
    case TO_HIDDEN:
      (is_int8 ? multiply_beside_hidden_int8 : multiply_beside_hidden_bf16)(a, f, c, sums, beside);
      break;
  }
}

INLINE void clear_rows(uint8_t* c, Sums sums, int first) {
  for (int r = first; r < HALF; r++) {
    _mm512_store_ps(c + r * sums.row, _mm512_setzero_ps());
    _mm512_store_ps(c + r * sums.row + sums.column_tile, _mm512_setzero_ps());
  }
}

INLINE void multiply(Factors f, int row_tiles, int is_int8, Sums sums, const Beside* beside) {
  for (int half = 0; half < 2 * row_tiles; half++) {
    const uint8_t* a = f.a + half / 2 * f.steps * TILE + half % 2 * (TILE / 2);
    uint8_t* c = (uint8_t*)sums.c + half / 2 * sums.row_tile + half % 2 * HALF * sums.row;
    int64_t rows = f.rows[half / 2] - half % 2 * HALF;
    if (rows > QUARTER && beside) {
      multiply_beside(a, &f, is_int8, c, &sums, beside);
      continue;
    }
    if (rows > QUARTER) {
      (is_int8 ? multiply_half_int8 : multiply_half_bf16)(a, &f, c, &sums);
      continue;
    }
    if (rows > 0) (is_int8 ? multiply_quarter_int8 : multiply_quarter_bf16)(a, &f, c, &sums);
    clear_rows(c, sums, rows > 0 ? QUARTER : 0);
  }
}

// 128 times the sum of each column.
INLINE __m512i surplus_of(const uint8_t* b, int64_t steps) {
  __m512i sums = _mm512_setzero_si512(), levels = _mm512_set1_epi8((char)0x80);
  for (int64_t i = 0; i < steps * TILE_ROWS; i++) sums = _mm512_dpbusd_epi32(sums, levels, _mm512_load_si512(b + 64 * i));
  return sums;
}

int64_t m2d_avx512_tiles_scratch(const Call* call) { return bytes_of_scratch(call); }
void m2d_avx512_tiles_run(const Call* call) { run_blocks(call); }
int m2d_avx512_tiles_probe(int bytes) { return probe_blocks(m2d_avx512_tiles_scratch, m2d_avx512_tiles_run, bytes); }
