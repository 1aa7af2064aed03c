// The AVX-512 instructions that the kernels are written in, in the compiler's own vectors (GCC 12, Clang): the kernels
// compile for any processor. Far from fast, as no register is this wide; it is what tests run where there is no AVX-512, and
// under sanitizers.

#ifndef M2D_GENERIC_H
#define M2D_GENERIC_H

#include <stdint.h>
#include <string.h>

#define VECTOR(type, bytes) type __attribute__((vector_size(bytes), may_alias))
typedef VECTOR(float, 64) __m512;
typedef VECTOR(double, 64) __m512d;
typedef VECTOR(int32_t, 64) __m512i;
typedef VECTOR(uint16_t, 64) __m512bh;
typedef VECTOR(int8_t, 16) __m128i;
typedef VECTOR(uint16_t, 32) __m256i;
typedef uint16_t __mmask16;

typedef VECTOR(uint32_t, 64) Unsigned;
typedef VECTOR(uint16_t, 64) Halves;
#undef VECTOR

#define EACH(i) for (int i = 0; i < 16; i++)

// --- memory, constants, casts --------------------------------------------------------------------------------------

enum { _MM_HINT_T0 };
#define _mm_prefetch(address, hint) ((void)(hint), __builtin_prefetch(address))

#define LOAD(type, name)                 \
  INLINE type name(const void* from) {  \
    type v;                              \
    memcpy(&v, from, sizeof v);          \
    return v;                            \
  }
LOAD(__m512, _mm512_loadu_ps)
LOAD(__m512, _mm512_load_ps)
LOAD(__m512i, _mm512_load_si512)
LOAD(__m256i, _mm256_loadu_si256)
#undef LOAD

INLINE void _mm512_storeu_ps(void* to, __m512 v) { memcpy(to, &v, sizeof v); }
INLINE void _mm512_store_ps(void* to, __m512 v) { memcpy(to, &v, sizeof v); }
INLINE void _mm512_store_si512(void* to, __m512i v) { memcpy(to, &v, sizeof v); }
INLINE void _mm_store_si128(void* to, __m128i v) { memcpy(to, &v, sizeof v); }

#define ALL_16(x) {x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}
INLINE __m512 _mm512_set1_ps(float x) { return (__m512)ALL_16(x); }
INLINE __m512i _mm512_set1_epi32(int32_t x) { return (__m512i)ALL_16(x); }
INLINE __m512i _mm512_set1_epi16(int16_t x) { return _mm512_set1_epi32((int32_t)((uint16_t)x * 0x10001u)); }
INLINE __m512i _mm512_set1_epi8(int8_t x) { return _mm512_set1_epi32((int32_t)((uint8_t)x * 0x1010101u)); }
INLINE __m128i _mm_set1_epi8(int8_t x) { return (__m128i)ALL_16(x); }
INLINE __m512 _mm512_setzero_ps(void) { return _mm512_set1_ps(0); }
INLINE __m512i _mm512_setzero_si512(void) { return _mm512_set1_epi32(0); }
#define _mm512_set_epi16(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v, w, x, y, z, A, B, C, D, E, F) \
  ((__m512i)(Halves){F, E, D, C, B, A, z, y, x, w, v, u, t, s, r, q, p, o, n, m, l, k, j, i, h, g, f, e, d, c, b, a})

INLINE __m512d _mm512_castps_pd(__m512 v) { return (__m512d)v; }
INLINE __m512 _mm512_castpd_ps(__m512d v) { return (__m512)v; }
INLINE __m512i _mm512_castps_si512(__m512 v) { return (__m512i)v; }
INLINE __m512 _mm512_castsi512_ps(__m512i v) { return (__m512)v; }

// --- masks ---------------------------------------------------------------------------------------------------------

INLINE __m512i lanes_of(__mmask16 mask) {
  const __m512i bits = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  return (_mm512_set1_epi32(mask) & bits) == bits;
}
INLINE __m512 blend(__m512i lanes, __m512 yes, __m512 no) {
  return (__m512)((lanes & (__m512i)yes) | (~lanes & (__m512i)no));
}


// --- arithmetic ----------------------------------------------------------------------------------------------------

INLINE __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
INLINE __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
INLINE __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
INLINE __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
INLINE __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) { return a * b + c; }
INLINE __m512 _mm512_fmsub_ps(__m512 a, __m512 b, __m512 c) { return a * b - c; }
INLINE __m512 _mm512_max_ps(__m512 a, __m512 b) { return blend(a > b, a, b); }
INLINE __m512 _mm512_min_ps(__m512 a, __m512 b) { return blend(a < b, a, b); }
INLINE __m512 _mm512_abs_ps(__m512 a) { return (__m512)((__m512i)a & 0x7fffffff); }
INLINE __m512 _mm512_sqrt_ps(__m512 a) {
  EACH(i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
INLINE __m512 _mm512_mask_max_ps(__m512 from, __mmask16 m, __m512 a, __m512 b) {
  return blend(lanes_of(m), _mm512_max_ps(a, b), from);
}
INLINE __m512 _mm512_maskz_mov_ps(__mmask16 m, __m512 a) { return blend(lanes_of(m), a, _mm512_setzero_ps()); }

INLINE __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
INLINE __m512i _mm512_sub_epi32(__m512i a, __m512i b) { return (__m512i)((Unsigned)a - (Unsigned)b); }
INLINE __m512i _mm512_slli_epi32(__m512i a, int by) { return (__m512i)((Unsigned)a << by); }
INLINE __m512i _mm512_max_epu32(__m512i a, __m512i b) {
  __m512i greater = (__m512i)((Unsigned)a > (Unsigned)b);
  return (greater & a) | (~greater & b);
}
INLINE __m512i _mm512_max_epu16(__m512i a, __m512i b) {
  __m512i greater = (__m512i)((Halves)a > (Halves)b);
  return (greater & a) | (~greater & b);
}
INLINE __m128i _mm_xor_si128(__m128i a, __m128i b) { return a ^ b; }

// --- whole numbers and powers of two -------------------------------------------------------------------------------

// The nearest whole numbers; those from 2^23 on, infinity and NaN are what they were.
enum { _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_NO_EXC = 8 };
INLINE __m512 _mm512_roundscale_ps(__m512 a, int mode) {
  (void)mode;
  __m512 shift = blend(a < 0.0f, _mm512_set1_ps(-8388608.0f), _mm512_set1_ps(8388608.0f));
  return blend(_mm512_abs_ps(a) < 8388608.0f, (a + shift) - shift, a);
}
INLINE __m512i _mm512_cvtps_epi32(__m512 a) {  // what does not fit becomes the lowest number
  __m512i fits = _mm512_abs_ps(a) < 2147483648.0f;
  __m512i whole = __builtin_convertvector(blend(fits, _mm512_roundscale_ps(a, 0), _mm512_setzero_ps()), __m512i);
  return (fits & whole) | (~fits & INT32_MIN);
}
INLINE __m512 _mm512_cvtepi32_ps(__m512i a) { return __builtin_convertvector(a, __m512); }
INLINE __m512i _mm512_cvtepu16_epi32(__m256i a) {
  __m512i wide;
  EACH(i) wide[i] = a[i];
  return wide;
}
INLINE __m128i _mm512_cvtsepi32_epi8(__m512i a) {
  __m128i narrow;
  EACH(i) narrow[i] = (int8_t)(a[i] < -128 ? -128 : a[i] > 127 ? 127 : a[i]);
  return narrow;
}

// a 2^whole, in two steps: 2^whole may be no float32 where the product is one.
INLINE __m512 _mm512_scalef_ps(__m512 a, __m512 whole) {
  __m512 limited = _mm512_max_ps(_mm512_min_ps(whole, _mm512_set1_ps(250)), _mm512_set1_ps(-250));
  __m512i power = _mm512_cvtps_epi32(limited), half = power >> 1;
  __m512 scaled = a * (__m512)((half + 127) << 23) * (__m512)((power - half + 127) << 23);
  return blend(whole == whole, scaled, whole);
}

// --- the order of values -------------------------------------------------------------------------------------------

#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
INLINE __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {
  return SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
}
INLINE __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
  return SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}
INLINE __m512d _mm512_unpacklo_pd(__m512d a, __m512d b) { return SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14); }
INLINE __m512d _mm512_unpackhi_pd(__m512d a, __m512d b) { return SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15); }
#define QUARTER_OF(i) 4 * (i), 4 * (i) + 1, 4 * (i) + 2, 4 * (i) + 3
#define _mm512_shuffle_f32x4(a, b, which)                                                \
  SHUFFLE(a, b, QUARTER_OF((which) & 3), QUARTER_OF((which) >> 2 & 3), QUARTER_OF(4 + ((which) >> 4 & 3)), \
          QUARTER_OF(4 + ((which) >> 6 & 3)))
INLINE __m512 _mm512_permutex2var_ps(__m512 a, __m512i which, __m512 b) {
  __m512 found;
  EACH(i) found[i] = which[i] & 16 ? b[which[i] & 15] : a[which[i] & 15];
  return found;
}
INLINE __m512i _mm512_permutexvar_epi16(__m512i which, __m512i a) {
  Halves found;
  for (int i = 0; i < 32; i++) found[i] = ((Halves)a)[((Halves)which)[i] & 31];
  return (__m512i)found;
}

// --- bf16 and int8 -------------------------------------------------------------------------------------------------

// Rounded to bf16, which are the upper halves of float32; NaN stays NaN.
INLINE Unsigned rounded_to_bf16(__m512 a) {
  Unsigned bits = (Unsigned)a, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  Unsigned is_number = (Unsigned)(a == a);
  return (is_number & rounded) | (~is_number & (bits >> 16 | 0x40));
}
INLINE __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  Halves a = (Halves)rounded_to_bf16(low), b = (Halves)rounded_to_bf16(high);
  return (__m512bh)SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42, 44,
                           46, 48, 50, 52, 54, 56, 58, 60, 62);
}
INLINE __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const Unsigned odd = (Unsigned)_mm512_set1_epi32((int32_t)0xffff0000);
  sum = (__m512)((Unsigned)a & odd) * (__m512)((Unsigned)b & odd) + sum;
  return (__m512)((Unsigned)a << 16) * (__m512)((Unsigned)b << 16) + sum;
}
INLINE __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  for (int shift = 0; shift < 32; shift += 8) {
    __m512i left = (__m512i)((Unsigned)a >> shift & 0xff);
    __m512i right = (__m512i)((Unsigned)b << (24 - shift)) >> 24;  // with its sign
    sum += left * right;
  }
  return sum;
}

#undef EACH
#undef ALL_16
#endif
