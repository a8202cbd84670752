// SPDX-License-Identifier: Apache-2.0
// What a product of a linear layer is given. Included by linear_amx.h and linear_avx512.h.

// Products of a block of rows and some steps of a panel of weights.
struct Product {
  const Element *rows, *weights, *next_weights;
  int64_t steps;
  float *sums, *next_sums;    // (32, 32); the next are null where they come from near
  bool fresh;                 // the sums are made, not added to
  int64_t count;              // rows that there are: the sums of others are not wanted
  int64_t fetch, fetch_step;  // of the next weights of a step: the first number, and how far apart

  void prefetch_weights(int64_t step, int64_t skip = 0) const {
    for (int64_t i = fetch + skip; i < STEP; i += fetch_step)
      __builtin_prefetch(next_weights + step * STEP + i, 0, 2);
  }
};
