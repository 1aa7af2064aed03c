// What is read of a block's output.

#ifndef M2D_OUTPUTS_H
#define M2D_OUTPUTS_H

#include "blocks.h"
#include "vec.h"

INLINE void norm_row(const float* x, const Norm* norm, int64_t dim, float* to) {
  V sum = v_zero(), squares = v_zero();
  for (int64_t i = 0; i < dim; i += LANES) sum += v_load(x + i);
  V mean = v_set1(v_sum(sum) / dim);
  for (int64_t i = 0; i < dim; i += LANES) {
    V centred = v_load(x + i) - mean;
    squares = v_fma(centred, centred, squares);
  }
  V factor = v_set1(1.0f / __builtin_sqrtf(v_sum(squares) / dim + norm->eps));
  for (int64_t i = 0; i < dim; i += LANES) {
    V v = (v_load(x + i) - mean) * factor;
    if (norm->weight) v *= v_load(norm->weight + i);
    if (norm->bias) v += v_load(norm->bias + i);
    v_store(to + i, v);
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
