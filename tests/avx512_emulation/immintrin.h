// In the place of the compiler's own header: AVX-512 in its vectors, so that native/vec_avx512.h is tested on any
// processor. See native/generic.h.

#ifndef M2D_AVX512_EMULATION_H
#define M2D_AVX512_EMULATION_H

#include "generic.h"

enum { _CMP_GT_OQ = 30 };

INLINE __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) { return c - a * b; }
INLINE __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
  (void)how;
  int mask = 0;
  for (int i = 0; i < 16; i++) mask |= (a[i] > b[i]) << i;
  return (__mmask16)mask;
}
INLINE __m512 _mm512_mask_mov_ps(__m512 from, __mmask16 m, __m512 a) { return blend(lanes_of(m), a, from); }
INLINE __m512 _mm512_cvtph_ps(__m256i a) {
  _Float16 narrow[16];
  __m512 wide;
  memcpy(narrow, &a, sizeof narrow);
  for (int i = 0; i < 16; i++) wide[i] = (float)narrow[i];
  return wide;
}

#endif
