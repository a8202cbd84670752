// SPDX-License-Identifier: Apache-2.0
// The inner product of tiled_linear by AVX-512. Included by tiled_linear.cpp.

#include "linear_product.h"

// Products of ROWS rows from a row of the block on; each prefetches its share of the next weights.
template <int ROWS>
static void multiply_rows(const Product& of, int64_t row) {
  __m512 sums[ROWS][2];
  float* kept = of.sums + row * BLOCK;
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
      sums[r][j] = of.fresh ? _mm512_setzero_ps() : _mm512_load_ps(kept + r * BLOCK + j * LANES);
  for (int64_t k = 0; k < of.steps; ++k) {
    of.prefetch_weights(k, row / ROWS_AT_ONCE * 32);
    multiply_tile(sums, of.rows + k * STEP + row * TILE_DEPTH, of.weights + k * STEP);
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) _mm512_store_ps(kept + r * BLOCK + j * LANES, sums[r][j]);
}

// The epilogue runs after the products: both use the same vector units.
template <typename PanelEpilogue>
static inline void multiply(const Product& of, PanelEpilogue&, int64_t) {
  using Rows = void (*)(const Product&, int64_t);
  constexpr Rows LAST[] = {multiply_rows<8>, multiply_rows<1>, multiply_rows<2>, multiply_rows<3>,
                           multiply_rows<4>, multiply_rows<5>, multiply_rows<6>, multiply_rows<7>};
  for (int64_t row = 0; row < of.count; row += ROWS_AT_ONCE) {
    int64_t left = of.count - row;
    LAST[left < ROWS_AT_ONCE ? left : 0](of, row);
  }
}
