// What Python and the log-mel kernel agree on; native/log_mel.py declares the same structures.

#ifndef M2D_LOG_MEL_H
#define M2D_LOG_MEL_H

#include <stdint.h>

#include "parallel.h"

typedef struct {
  int32_t n_fft, hop, mels, stages;
  const float* window;        // [n_fft]
  const int32_t* radices;     // [stages], their product is n_fft / 2
  const float* twiddles;      // for each stage and j: radix - 1 pairs of (cos, sin) of -2 pi j k / n, k from 1 on
  const float* split;         // [n_fft / 2 + 1] pairs of (cos, sin) of -2 pi k / n_fft
  const int32_t* first_bins;  // [mels]
  const int32_t* num_bins;    // [mels], those from the first to the last that are not 0
  const float* weights;       // of all these bins, one band after the other
  float eps, mean, std;
} LogMel;

typedef struct {
  const LogMel* settings;
  const float* samples;  // clips of frames that overlap
  int64_t clips, clip_stride, frames;
  float* out;  // [clip][mel][frame]
  const Runtime* runtime;
  uint8_t* scratch;
  int32_t threads;
} LogMelCall;

#endif
