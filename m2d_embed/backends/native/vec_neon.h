// NEON of 64-bit ARM. int8: the dot products of ARMv8.2, or without them products of 16 bits.

#include <arm_neon.h>

enum { LANES = 4, ROWS = 6, WIDTH = 16 };

typedef float32x4_t V;
typedef int32_t W __attribute__((vector_size(16), may_alias));

INLINE V v_load(const void* from) { return vld1q_f32(from); }
INLINE void v_store(void* to, V x) { vst1q_f32(to, x); }
INLINE V v_set1(float x) { return vdupq_n_f32(x); }
INLINE V v_fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
INLINE V v_fnma(V a, V b, V c) { return vfmsq_f32(c, a, b); }
INLINE V v_max(V a, V b) { return vmaxq_f32(a, b); }
INLINE V v_min(V a, V b) { return vminq_f32(a, b); }
INLINE V v_greater(V a, V b, V yes, V no) { return vbslq_f32(vcgtq_f32(a, b), yes, no); }
INLINE V v_round(V x) { return vrndnq_f32(x); }
INLINE W v_to_int(V x) { return (W)vcvtnq_s32_f32(x); }
INLINE V v_from_int(W x) { return vcvtq_f32_s32((int32x4_t)x); }
INLINE V v_from_bf16(const void* from) { return (V)vshll_n_u16(vld1_u16(from), 16); }
INLINE V v_from_fp16(const void* from) { return vcvt_f32_f16((float16x4_t)vld1_u16(from)); }

INLINE void v_transpose(V r[LANES]) {
  float32x4_t a = vtrn1q_f32(r[0], r[1]), b = vtrn2q_f32(r[0], r[1]);
  float32x4_t c = vtrn1q_f32(r[2], r[3]), d = vtrn2q_f32(r[2], r[3]);
  r[0] = (V)vtrn1q_f64((float64x2_t)a, (float64x2_t)c), r[1] = (V)vtrn1q_f64((float64x2_t)b, (float64x2_t)d);
  r[2] = (V)vtrn2q_f64((float64x2_t)a, (float64x2_t)c), r[3] = (V)vtrn2q_f64((float64x2_t)b, (float64x2_t)d);
}

#ifdef __ARM_FEATURE_DOTPROD
#define PER_UNIT 4
INLINE W w_dot(W sum, W levels, W weights) {
  return (W)vdotq_s32((int32x4_t)sum, (int8x16_t)levels, (int8x16_t)weights);
}
INLINE V w_load_units(const void* from) { return v_load(from); }
#else
#define PER_UNIT 2
INLINE W w_dot(W sum, W levels, W weights) {
  int16x8_t a = (int16x8_t)levels, b = (int16x8_t)weights;
  return sum + (W)vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b));
}
INLINE V w_load_units(const void* from) { return (V)vmovl_s8(vld1_s8(from)); }
#endif
