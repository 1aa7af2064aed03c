// What is read of a block's output.

#ifndef M2D_OUTPUTS_H
#define M2D_OUTPUTS_H

#include "blocks.h"
#include "vectors.h"

INLINE void norm_row(const float* x, const Norm* norm, int64_t dim, float* to) {
  __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < dim; i += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + i));
  __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / dim);
  for (int64_t i = 0; i < dim; i += 16) {
    __m512 centred = _mm512_sub_ps(_mm512_loadu_ps(x + i), mean);
    squares = _mm512_fmadd_ps(centred, centred, squares);
  }
  __m512 factor = _mm512_set1_ps(1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / dim + norm->eps));
  for (int64_t i = 0; i < dim; i += 16) {
    __m512 v = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), mean), factor);
    if (norm->weight) v = _mm512_mul_ps(v, _mm512_loadu_ps(norm->weight + i));
    if (norm->bias) v = _mm512_add_ps(v, _mm512_loadu_ps(norm->bias + i));
    _mm512_storeu_ps(to + i, v);
  }
}

// A team's share of the features of some windows, if any are read of this block. What the members do next reads x, and
// none of them writes to it before all are done here.
static inline void read_features(const Call* call, const Block* block, Team team, int64_t first, int64_t stop) {
  float* features = call->features ? call->features[block - call->blocks] : NULL;
  if (!features) return;
  int64_t patches = call->tokens - 1, columns = patches / call->rows, dim = block->dim;
  Share share = share_of(team, (stop - first) * patches);
  for (int64_t i = share.first; i < share.stop; i++) {
    int64_t window = first + i / patches, patch = i % patches, row = patch / columns, column = patch % columns;
    const float* x = call->x + (window * call->tokens + 1 + patch) * dim;
    norm_row(x, call->norm, dim, features + ((window * columns + column) * call->rows + row) * dim);
  }
}

#endif
