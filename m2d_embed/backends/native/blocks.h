// What Python and the kernels agree on; native/library.py declares the same structures.

#ifndef M2D_BLOCKS_H
#define M2D_BLOCKS_H

#include <stdint.h>

#include "parallel.h"

// What a matrix or a bias is stored in; int8 matrices have scales.
enum { FLOAT32, BFLOAT16, FLOAT16 };

typedef struct {
  const void* weight;   // (outputs, inputs), tiles, or packed int8: see the file that reads it
  const float* scales;  // int8: the scale of each output's weights
  const void* bias;     // or NULL
  int32_t bias_format, weight_format;
} Linear;

typedef struct {
  const float *weight, *bias;  // each may be NULL
  float eps;
} Norm;

// A pre-norm transformer block: x + attention(norm1(x)), then x + mlp(norm2(x)).
typedef struct {
  int32_t dim, hidden, heads;
  int32_t quantized;
  Norm norm1, norm2;
  Linear qkv, proj, fc1, fc2;
} Block;

// Blocks of one shape, one after the other; x is (windows, tokens, dim) float32, changed in place. Of some blocks
// features are read: all tokens but the first, frequency-major in x, through a norm.
typedef struct {
  const Block* blocks;
  int64_t num_blocks;
  float* x;
  int64_t windows, tokens;
  uint8_t* scratch;
  const Runtime* runtime;
  int32_t threads;
  int32_t rows;            // tokens of a column of features
  float* const* features;  // of each block (windows, columns, rows, dim), or NULL; or NULL for all
  const Norm* norm;        // of features
} Call;

// What goes into the first block: the class token, then patches of a log-mel, embedded, each with its position added.
// Of the call, x is written, (windows, 1 + rows * columns, dim), and the blocks are not read.
typedef struct {
  Call call;
  const float* log_mel;  // (windows, rows * height, columns * width)
  int64_t window_stride, mel_stride;
  int32_t rows, columns, height, width;  // patches of a window, and values of a patch
  int32_t dim, grid_columns;             // of `positions`, which may be more
  Linear projection;
  const float *class_token, *positions;  // (dim), (1 + rows * grid_columns, dim)
} TokensCall;

#endif
