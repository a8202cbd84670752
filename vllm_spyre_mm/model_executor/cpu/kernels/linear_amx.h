// SPDX-License-Identifier: Apache-2.0
// The inner product of tiled_linear by AMX. Included by tiled_linear.cpp.

#include "linear_product.h"

// The epilogue of earlier sums is interleaved with the products.
template <Epilogue EPILOGUE>
static inline void multiply(const Product& of, PanelEpilogue<EPILOGUE>& epilogue,
                            int64_t rows_a_step) {
  if (of.fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, of.sums, 128);
    _tile_loadd(1, of.sums + 16, 128);
    _tile_loadd(2, of.sums + 512, 128);
    _tile_loadd(3, of.sums + 528, 128);
  }
  for (int64_t k = 0; k < of.steps; ++k) {
    for (int64_t i = 0; i < rows_a_step; ++i) epilogue.next();
    of.prefetch_weights(k);
    if (of.next_sums)
      for (int64_t i = 0; i < 64; i += 16) __builtin_prefetch(of.next_sums + k * 64 + i, 1);
    _tile_loadd(6, of.weights + k * STEP, 64);
    _tile_loadd(7, of.weights + k * STEP + TILE, 64);
    _tile_stream_loadd(4, of.rows + k * STEP, 64);  // spares the L1 cache for the weights
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (of.count <= TILE_ROWS) continue;
    _tile_stream_loadd(5, of.rows + k * STEP + TILE, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, of.sums, 128);
  _tile_stored(1, of.sums + 16, 128);
  _tile_stored(2, of.sums + 512, 128);
  _tile_stored(3, of.sums + 528, 128);
}
