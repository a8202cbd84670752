// SPDX-License-Identifier: Apache-2.0
// Products of bf16 tiles with fp32 sums, by AMX or by AVX-512.
//
// A tile of the left operand is 16 rows of 32 numbers. One of the right operand is 32 rows of 16
// columns, interleaved by pairs of rows: (pair of k, column, 2). Tiles are multiplied 2 x 2 at a
// time.

#ifndef TILES_H
#define TILES_H

#include "bf16.h"

constexpr int TILE_ROWS = 16;
constexpr int TILE_DEPTH = 32;  // bf16 numbers in a row
constexpr int TILE = TILE_ROWS * TILE_DEPTH;

struct alignas(64) Operand {
  Element rows[TILE_ROWS][TILE_DEPTH];
};
struct alignas(64) Sums {
  float rows[TILE_ROWS][TILE_ROWS];
};

// No vector work beside the products.
struct NoWork {
  void next() {}
};

#ifdef __AMX_BF16__
#include "amx.h"
#else
#include "avx512.h"
#endif

#endif
