// The compiler's own vectors, for any processor: what tests run where a set is not there, and under sanitizers. As large
// as those of AVX-512. int8: levels of 16 bits, as on AVX2 and NEON, or of 8.

enum { LANES = 16, ROWS = 6, WIDTH = 64 };

typedef float V __attribute__((vector_size(64), may_alias));
typedef int32_t W __attribute__((vector_size(64), may_alias));

INLINE V v_load(const void* from) {
  V x;
  memcpy(&x, from, sizeof x);
  return x;
}
INLINE void v_store(void* to, V x) { memcpy(to, &x, sizeof x); }
INLINE V v_set1(float x) {  // of any bits: no arithmetic, which changes some NaNs
  return (V){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}
INLINE V v_fma(V a, V b, V c) { return a * b + c; }
INLINE V v_fnma(V a, V b, V c) { return c - a * b; }
INLINE V v_pick(W which, V yes, V no) { return (V)((which & (W)yes) | (~which & (W)no)); }
INLINE V v_greater(V a, V b, V yes, V no) { return v_pick(a > b, yes, no); }
INLINE V v_max(V a, V b) { return v_greater(a, b, a, b); }
INLINE V v_min(V a, V b) { return v_greater(b, a, a, b); }
INLINE V v_round(V x) {  // numbers from 2^23 on, infinity and NaN are what they were
  V size = (V)((W)x & INT32_MAX), large = v_set1(8388608.0f), shift = (V)((W)large | ((W)x & INT32_MIN));
  return v_greater(large, size, (x + shift) - shift, x);
}
INLINE W v_to_int(V x) {  // what does not fit becomes the lowest number
  V size = (V)((W)x & INT32_MAX);
  W fits = size < 2147483648.0f, whole = __builtin_convertvector(v_pick(fits, v_round(x), (V){0}), W);
  return (fits & whole) | (~fits & INT32_MIN);
}
INLINE V v_from_int(W x) { return __builtin_convertvector(x, V); }
INLINE V v_from_bf16(const void* from) {
  uint16_t narrow[LANES];
  uint32_t wide[LANES];
  memcpy(narrow, from, sizeof narrow);
  for (int i = 0; i < LANES; i++) wide[i] = (uint32_t)narrow[i] << 16;
  return v_load(wide);
}
INLINE V v_from_fp16(const void* from) {
  uint16_t narrow[LANES];
  uint32_t sizes[LANES], signs[LANES];
  memcpy(narrow, from, sizeof narrow);
  for (int i = 0; i < LANES; i++) {
    sizes[i] = (uint32_t)(narrow[i] & 0x7fff) << 13, signs[i] = (uint32_t)(narrow[i] & 0x8000) << 16;
  }
  V size = v_load(sizes), scaled = size * v_set1(0x1p112f);  // the exponents are 112 apart
  scaled = v_greater(v_set1(0x1p16f), scaled, scaled, (V)((W)size | 0x7f800000));  // infinity and NaN
  return (V)((W)scaled | (W)v_load(signs));
}

INLINE void v_transpose(V r[LANES]) {
  float rows[LANES][LANES], columns[LANES][LANES];
  memcpy(rows, r, sizeof rows);
  for (int i = 0; i < LANES; i++) {
    for (int j = 0; j < LANES; j++) columns[j][i] = rows[i][j];
  }
  memcpy(r, columns, sizeof columns);
}

typedef uint32_t Bits __attribute__((vector_size(64), may_alias));

#ifdef M2D_BYTES  // levels of 8 bits, as NEON's dot products take them
#define PER_UNIT 4
INLINE W w_dot(W sum, W levels, W weights) {
  for (int shift = 0; shift < 32; shift += 8) {
    sum += ((W)((Bits)levels << shift) >> 24) * ((W)((Bits)weights << shift) >> 24);
  }
  return sum;
}
INLINE V w_load_units(const void* from) { return v_load(from); }
#else
#define PER_UNIT 2
INLINE W w_dot(W sum, W levels, W weights) {
  return sum + (levels << 16 >> 16) * (weights << 16 >> 16) + (levels >> 16) * (weights >> 16);
}
INLINE V w_load_units(const void* from) {
  const int8_t* bytes = from;
  int16_t wide[PER_UNIT * LANES];
  for (int i = 0; i < PER_UNIT * LANES; i++) wide[i] = bytes[i];
  return v_load(wide);
}
#endif
