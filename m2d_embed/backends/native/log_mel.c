// Log-mel spectrogram in float32, LANES frames at a time: each vector holds one sample, bin or band of so many frames.
// Compiled once for each instruction set, with M2D_NAME in its functions' names.
//
// The spectrum of n real samples is that of n / 2 complex ones, even samples real and odd ones imaginary, taken apart
// again (Press et al., Numerical Recipes, section 12.3). That one is Stockham's, which needs no bit reversal, with
// radices 2 to 5.

#include "log_mel.h"

#include "memory.h"
#include "vec.h"

typedef struct {
  V re, im;
} Complex;

INLINE Complex plus(Complex a, Complex b) { return (Complex){a.re + b.re, a.im + b.im}; }
INLINE Complex minus(Complex a, Complex b) { return (Complex){a.re - b.re, a.im - b.im}; }
INLINE Complex times_i(Complex a) { return (Complex){v_zero() - a.im, a.re}; }
INLINE Complex scaled(Complex a, float by) {
  return (Complex){a.re * v_set1(by), a.im * v_set1(by)};
}
// a + b * by
INLINE Complex plus_scaled(Complex a, Complex b, float by) {
  return (Complex){v_fma(b.re, v_set1(by), a.re), v_fma(b.im, v_set1(by), a.im)};
}
INLINE Complex times(Complex a, const float* w) {
  V re = v_set1(w[0]), im = v_set1(w[1]);
  return (Complex){v_fnma(a.im, im, a.re * re), v_fma(a.re, im, a.im * re)};
}

// The discrete Fourier transform of 2 to 5 values, in place.
INLINE void butterfly(Complex a[5], int radix) {
  if (radix == 2) {
    Complex sum = plus(a[0], a[1]);
    a[1] = minus(a[0], a[1]), a[0] = sum;
  } else if (radix == 3) {
    Complex sum = plus(a[1], a[2]), turned = times_i(scaled(minus(a[1], a[2]), 0.866025404f));
    Complex mean = plus_scaled(a[0], sum, -0.5f);
    a[0] = plus(a[0], sum), a[1] = minus(mean, turned), a[2] = plus(mean, turned);
  } else if (radix == 4) {
    Complex even = plus(a[0], a[2]), odd = plus(a[1], a[3]);
    Complex difference = minus(a[0], a[2]), turned = times_i(minus(a[1], a[3]));
    a[0] = plus(even, odd), a[2] = minus(even, odd), a[1] = minus(difference, turned), a[3] = plus(difference, turned);
  } else {
    const float c1 = 0.309016994f, c2 = -0.809016994f, s1 = 0.951056516f, s2 = 0.587785252f;
    Complex near = plus(a[1], a[4]), far = plus(a[2], a[3]), x = minus(a[1], a[4]), y = minus(a[2], a[3]);
    Complex first = plus_scaled(plus_scaled(a[0], near, c1), far, c2);
    Complex second = plus_scaled(plus_scaled(a[0], near, c2), far, c1);
    Complex turned1 = times_i(plus_scaled(scaled(x, s1), y, s2)), turned2 = times_i(plus_scaled(scaled(x, s2), y, -s1));
    a[0] = plus(a[0], plus(near, far));
    a[1] = minus(first, turned1), a[4] = plus(first, turned1);
    a[2] = minus(second, turned2), a[3] = plus(second, turned2);
  }
}

INLINE void stage(const Complex* x, Complex* y, int64_t n, int64_t stride, int radix, const float* twiddles) {
  int64_t m = n / radix;
  for (int64_t j = 0; j < m; j++, twiddles += 2 * (radix - 1)) {
    for (int64_t q = 0; q < stride; q++) {
      Complex a[5];
      for (int k = 0; k < radix; k++) a[k] = x[q + stride * (j + m * k)];
      butterfly(a, radix);
      y[q + stride * radix * j] = a[0];
      for (int k = 1; k < radix; k++) y[q + stride * (radix * j + k)] = times(a[k], twiddles + 2 * (k - 1));
    }
  }
}

// The spectrum of `x`, which is in the buffer that is returned; both are written to.
static Complex* transform(const LogMel* s, Complex* x, Complex* y) {
  const float* twiddles = s->twiddles;
  int64_t n = s->n_fft / 2, stride = 1;
  for (int i = 0; i < s->stages; i++) {
    int radix = s->radices[i];
    if (radix == 2) stage(x, y, n, stride, 2, twiddles);
    if (radix == 3) stage(x, y, n, stride, 3, twiddles);
    if (radix == 4) stage(x, y, n, stride, 4, twiddles);
    if (radix == 5) stage(x, y, n, stride, 5, twiddles);
    n /= radix, stride *= radix;
    twiddles += 2 * (radix - 1) * n;
    Complex* swap = x;
    x = y, y = swap;
  }
  return x;
}

// What is between the stages of a transform, for one thread: its scratch is as large as two of these.
static int64_t bytes_of_buffer(const LogMel* s) { return (s->n_fft / 2 + 1) * (int64_t)sizeof(Complex); }

#define JOINED(a, b, c) a##b##c
#define NAMED(name, what) JOINED(m2d_, name, what)

int64_t NAMED(M2D_NAME, _log_mel_scratch)(const LogMelCall* call) { return 2 * call->threads * bytes_of_buffer(call->settings); }

// Up to 16 frames; the missing ones are the last one again.
static void log_mel_of(const LogMel* s, const float* samples, int64_t frames, float* out, int64_t out_stride,
                       uint8_t* scratch) {
  Complex *first = (Complex*)scratch, *second = (Complex*)(scratch + bytes_of_buffer(s));
  const float* from[LANES];
  for (int i = 0; i < LANES; i++) from[i] = samples + (i < frames ? i : frames - 1) * s->hop;
  for (int64_t n = 0; n < s->n_fft; n += LANES) {
    V r[LANES];
    for (int i = 0; i < LANES; i++) r[i] = v_load(from[i] + n);
    v_transpose(r);
    for (int i = 0; i < LANES; i += 2) {
      Complex* x = &first[(n + i) / 2];
      x->re = r[i] * v_set1(s->window[n + i]);
      x->im = r[i + 1] * v_set1(s->window[n + i + 1]);
    }
  }
  Complex* z = transform(s, first, second);
  V* power = (V*)(z == first ? second : first);
  int64_t half = s->n_fft / 2;
  z[half] = z[0];
  for (int64_t k = 0; k <= half; k++) {
    Complex a = z[k], b = z[half - k];
    Complex even = {a.re + b.re, a.im - b.im};  // twice what it should be, as is odd
    Complex odd = {a.im + b.im, b.re - a.re};
    Complex x = plus(even, times(odd, s->split + 2 * k));
    power[k] = v_fma(x.re, x.re, x.im * x.im) * v_set1(0.25f);
  }
  const float* weight = s->weights;
  for (int64_t mel = 0; mel < s->mels; mel++) {
    V sum = v_zero();
    const V* bins = power + s->first_bins[mel];
    for (int64_t i = 0; i < s->num_bins[mel]; i++) sum = v_fma(bins[i], v_set1(*weight++), sum);
    V log_mel = v_log(sum + v_set1(s->eps));
    log_mel = (log_mel - v_set1(s->mean)) / v_set1(s->std);
    v_store_first(out + mel * out_stride, log_mel, frames);
  }
}

static void run_member(void* pointer) {
  const LogMelCall* call = pointer;
  const LogMel* s = call->settings;
  Team team = {call->runtime->thread_number(), call->runtime->num_threads(), NULL};
  int64_t per_clip = (call->frames + LANES - 1) / LANES;
  Share share = share_of(team, call->clips * per_clip);
  uint8_t* scratch = call->scratch + 2 * team.rank * bytes_of_buffer(s);
  for (int64_t i = share.first; i < share.stop; i++) {
    int64_t clip = i / per_clip, frame = i % per_clip * LANES, left = call->frames - frame;
    const float* samples = call->samples + clip * call->clip_stride + frame * s->hop;
    float* out = call->out + clip * s->mels * call->frames + frame;
    log_mel_of(s, samples, left < LANES ? left : LANES, out, call->frames, scratch);
  }
}

void NAMED(M2D_NAME, _log_mel_run)(const LogMelCall* call) { call->runtime->parallel(run_member, (void*)call, call->threads, 0); }
