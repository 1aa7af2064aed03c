// Vectors of LANES float32, on whatever instruction set a file is compiled for: the kernels are written once.
//
// A set's header defines V (float32) and W (int32 of the same size), both of which take the operators + - * / & | ^ << >>
// and comparisons of GCC and Clang; how large a product's sums in registers are (ROWS x WIDTH); and these functions:
//   v_load v_store v_set1, v_fma (a b + c), v_fnma (c - a b), v_max v_min (of a NaN second the NaN),
//   v_greater (a > b ? yes : no), v_round (to the nearest whole number), v_to_int (of whole numbers), v_from_int,
//   v_from_bf16, v_from_fp16, v_transpose (LANES vectors as rows of a matrix);
//   and for int8: LEVELS, what values of A are stored in; PER_UNIT, how many of them are in 32 bits; w_dot (sum + the
//   products of the LEVELS in each 32 bits, exact), w_load_units (LANES units of int8 weights).
// Nothing else is contracted to fused multiplications (-ffp-contract=off): the same numbers in every function.

#ifndef M2D_VEC_H
#define M2D_VEC_H

#include <stdint.h>
#include <string.h>

#ifdef __NO_INLINE__  // -O0, for sanitizers: with all that they add, inlining takes compilers minutes
#define INLINE static inline
#else
#define INLINE static inline __attribute__((always_inline))
#endif

#if defined(__AVX512F__) && !defined(M2D_GENERIC)
#include "vec_avx512.h"
#elif defined(__AVX2__) && !defined(M2D_GENERIC)
#include "vec_avx2.h"
#elif defined(__ARM_NEON) && !defined(M2D_GENERIC)
#include "vec_neon.h"
#else
#include "vec_generic.h"
#endif

#define UNROLLED(...) _Pragma("GCC unroll 16") for (__VA_ARGS__)

INLINE V v_zero(void) { return v_set1(0); }
INLINE V v_abs(V x) { return (V)((W)x & INT32_MAX); }

INLINE V v_lane_numbers(void) {
  float numbers[LANES];
  for (int i = 0; i < LANES; i++) numbers[i] = (float)i;
  return v_load(numbers);
}

// The first `count` lanes of x, the others of `rest`.
INLINE V v_first(V x, int64_t count, V rest) { return v_greater(v_set1((float)count), v_lane_numbers(), x, rest); }

INLINE void v_store_first(float* to, V x, int64_t count) {
  float all[LANES];
  v_store(all, x);
  memcpy(to, all, (size_t)count * sizeof(float));
}

INLINE float v_sum(V x) {
  float all[LANES];
  v_store(all, x);
  for (int half = LANES / 2; half; half /= 2) {
    for (int i = 0; i < half; i++) all[i] += all[i + half];
  }
  return all[0];
}

INLINE float v_greatest(V x) {
  float all[LANES];
  v_store(all, x);
  float found = all[0];
  for (int i = 1; i < LANES; i++) found = all[i] > found || all[i] != all[i] ? all[i] : found;
  return found;
}

// x 2^n for whole n from -126 to 127
INLINE V v_scale(V x, V n) { return x * (V)((v_to_int(n) + 127) << 23); }

// e^x for x <= 0, to 2e-7; 1e-38 stands for less.
INLINE V v_exp(V x) {
  x = v_max(v_set1(-87.0f), x);
  V whole = v_round(x * v_set1(1.44269504f));
  V rest = v_fnma(whole, v_set1(0.693359375f), x);
  rest = v_fnma(whole, v_set1(-2.12194440e-4f), rest);
  V p = v_set1(1.0f / 720);  // Taylor's series: beyond it 0.35^7 / 7!, 1e-7
  p = v_fma(p, rest, v_set1(1.0f / 120));
  p = v_fma(p, rest, v_set1(1.0f / 24));
  p = v_fma(p, rest, v_set1(1.0f / 6));
  p = v_fma(p, rest, v_set1(0.5f));
  p = v_fma(p, rest, v_set1(1.0f));
  p = v_fma(p, rest, v_set1(1.0f));
  return v_scale(p, whole);
}

// The natural logarithm of positive normal numbers, to 1e-7; of infinity and NaN themselves.
INLINE V v_log(V x) {
  V exponent = v_from_int(((W)x >> 23) - 127), mantissa = (V)(((W)x & 0x7fffff) | 0x3f800000), one = v_set1(1);
  V limit = v_set1(1.41421356f);  // so that the mantissa is around 1
  exponent = v_greater(mantissa, limit, exponent + one, exponent);
  mantissa = v_greater(mantissa, limit, mantissa * v_set1(0.5f), mantissa);
  V z = (mantissa - one) / (mantissa + one), z2 = z * z;
  V p = v_set1(2.0f / 9);  // log m = 2 artanh z
  p = v_fma(p, z2, v_set1(2.0f / 7));
  p = v_fma(p, z2, v_set1(2.0f / 5));
  p = v_fma(p, z2, v_set1(2.0f / 3));
  p = v_fma(p, z2, v_set1(2.0f));
  V found = v_fma(exponent, v_set1(0.693147181f), p * z);
  return v_greater(v_set1(__builtin_inff()), x, found, x);
}

#endif
