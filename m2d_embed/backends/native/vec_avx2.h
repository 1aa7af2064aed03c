// AVX2, FMA and F16C. int8: AVX-VNNI, or without it weights of 7 bits, as AVX2's own products of 8 bits saturate.

#include <immintrin.h>

enum { LANES = 8, ROWS = 6, WIDTH = 16 };

typedef __m256 V;
typedef int32_t W __attribute__((vector_size(32), may_alias));

INLINE V v_load(const void* from) { return _mm256_loadu_ps(from); }
INLINE void v_store(void* to, V x) { _mm256_storeu_ps(to, x); }
INLINE V v_set1(float x) { return _mm256_set1_ps(x); }
INLINE V v_fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
INLINE V v_fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE V v_max(V a, V b) { return _mm256_max_ps(a, b); }
INLINE V v_min(V a, V b) { return _mm256_min_ps(a, b); }
INLINE V v_greater(V a, V b, V yes, V no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
INLINE V v_round(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE W v_to_int(V x) { return (W)_mm256_cvtps_epi32(x); }
INLINE V v_from_int(W x) { return _mm256_cvtepi32_ps((__m256i)x); }
INLINE V v_from_bf16(const void* from) {
  return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(from)), 16);
}
INLINE V v_from_fp16(const void* from) { return _mm256_cvtph_ps(_mm_loadu_si128(from)); }

INLINE void v_transpose(V r[LANES]) {
  V a[LANES];
  for (int i = 0; i < 4; i++) {
    a[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]), a[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    for (int j = 0; j < 2; j++) {
      __m256d x = (__m256d)a[4 * i + j], y = (__m256d)a[4 * i + 2 + j];
      r[4 * i + 2 * j] = (V)_mm256_unpacklo_pd(x, y), r[4 * i + 2 * j + 1] = (V)_mm256_unpackhi_pd(x, y);
    }
  }
  for (int i = 0; i < 4; i++) {  // r[4 g + i] has, in its half h, column 4 h + i of rows 4 g to 4 g + 3
    a[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20), a[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < LANES; i++) r[i] = a[i];
}

#ifdef __AVXVNNI__
#define LEVELS_ARE_UNSIGNED 1  // there is no instruction for two signed factors
#define PER_UNIT 4
INLINE W w_dot(W sum, W levels, W weights) {
  return (W)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)levels, (__m256i)weights);
}
INLINE V w_load_units(const void* from) { return v_load(from); }
#else
// Pairs of products are summed in 16 bits, with saturation: of 255 x 63 they are no more than 32,130.
#define LEVELS_ARE_UNSIGNED 1
#define PER_UNIT 4
INLINE W w_dot(W sum, W levels, W weights) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i pairs = _mm256_maddubs_epi16((__m256i)levels, (__m256i)weights);
  return sum + (W)_mm256_madd_epi16(pairs, ones);
}
INLINE V w_load_units(const void* from) { return v_load(from); }
#endif
