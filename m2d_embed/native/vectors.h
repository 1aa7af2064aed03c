// What the kernels do alike with vectors of 16 float32.

#ifndef M2D_VECTORS_H
#define M2D_VECTORS_H

#ifdef __NO_INLINE__  // -O0, for sanitizers: with all that they add, inlining takes compilers minutes
#define INLINE static inline
#else
#define INLINE static inline __attribute__((always_inline))
#endif

#ifdef __AVX512F__
#include <immintrin.h>
#else
#include "generic.h"
#endif

// 16 vectors as the rows of a matrix, transposed.
INLINE void transpose(__m512 r[16]) {
  __m512 a[16];
  for (int i = 0; i < 8; i++) {
    a[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    for (int j = 0; j < 2; j++) {
      __m512d x = _mm512_castps_pd(a[4 * i + j]), y = _mm512_castps_pd(a[4 * i + 2 + j]);
      r[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      r[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  }
  for (int i = 0; i < 4; i++) {  // r[4 g + i] has, in its lane l, column 4 l + i of rows 4 g to 4 g + 3
    __m512 x = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x44), y = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xee);
    __m512 z = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x44), w = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xee);
    a[i] = _mm512_shuffle_f32x4(x, z, 0x88), a[i + 4] = _mm512_shuffle_f32x4(x, z, 0xdd);
    a[i + 8] = _mm512_shuffle_f32x4(y, w, 0x88), a[i + 12] = _mm512_shuffle_f32x4(y, w, 0xdd);
  }
  for (int i = 0; i < 16; i++) r[i] = a[i];
}

#endif
