// AVX-512: F, BW, VL and DQ. int8: VNNI.

#include <immintrin.h>

enum { LANES = 16, ROWS = 6, WIDTH = 64 };

typedef __m512 V;
typedef int32_t W __attribute__((vector_size(64), may_alias));

INLINE V v_load(const void* from) { return _mm512_loadu_ps(from); }
INLINE void v_store(void* to, V x) { _mm512_storeu_ps(to, x); }
INLINE V v_set1(float x) { return _mm512_set1_ps(x); }
INLINE V v_fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
INLINE V v_fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }
INLINE V v_max(V a, V b) { return _mm512_max_ps(a, b); }
INLINE V v_min(V a, V b) { return _mm512_min_ps(a, b); }
INLINE V v_greater(V a, V b, V yes, V no) { return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), yes); }
INLINE V v_round(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE W v_to_int(V x) { return (W)_mm512_cvtps_epi32(x); }
INLINE V v_from_int(W x) { return _mm512_cvtepi32_ps((__m512i)x); }
INLINE V v_from_bf16(const void* from) {
  return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from)), 16);
}
INLINE V v_from_fp16(const void* from) { return _mm512_cvtph_ps(_mm256_loadu_si256(from)); }

INLINE void v_transpose(V r[LANES]) {
  V a[LANES];
  for (int i = 0; i < 8; i++) {
    a[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]), a[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    for (int j = 0; j < 2; j++) {
      __m512d x = (__m512d)a[4 * i + j], y = (__m512d)a[4 * i + 2 + j];
      r[4 * i + 2 * j] = (V)_mm512_unpacklo_pd(x, y), r[4 * i + 2 * j + 1] = (V)_mm512_unpackhi_pd(x, y);
    }
  }
  for (int i = 0; i < 4; i++) {  // r[4 g + i] has, in its lane l, column 4 l + i of rows 4 g to 4 g + 3
    V x = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x44), y = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xee);
    V z = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x44), w = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xee);
    a[i] = _mm512_shuffle_f32x4(x, z, 0x88), a[i + 4] = _mm512_shuffle_f32x4(x, z, 0xdd);
    a[i + 8] = _mm512_shuffle_f32x4(y, w, 0x88), a[i + 12] = _mm512_shuffle_f32x4(y, w, 0xdd);
  }
  for (int i = 0; i < LANES; i++) r[i] = a[i];
}

#ifdef __AVX512VNNI__
#define LEVELS_ARE_UNSIGNED 1  // there is no instruction for two signed factors
#define PER_UNIT 4
INLINE W w_dot(W sum, W levels, W weights) {
  return (W)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)levels, (__m512i)weights);
}
INLINE V w_load_units(const void* from) { return v_load(from); }
#endif
