// SPDX-License-Identifier: Apache-2.0
// Arguments of the inner product of tiled_linear. Included by linear_amx.h and linear_avx512.h.

// The product of a block of rows and some steps of a panel of weights.
struct Product {
  const Element *rows, *weights, *next_weights;
  int64_t steps;
  float *sums, *next_sums;    // (32, 32); next_sums, to prefetch, is null if they are in cache
  bool fresh;                 // start from zero instead of adding to sums
  int64_t count;              // valid rows; the sums of others are not used
  int64_t fetch, fetch_step;  // next weights to prefetch in a step: first element, and stride

  void prefetch_weights(int64_t step, int64_t skip = 0) const {
    for (int64_t i = fetch + skip; i < STEP; i += fetch_step)
      __builtin_prefetch(next_weights + step * STEP + i, 0, 2);
  }
};
