// SPDX-License-Identifier: Apache-2.0
// Interleaved RoPE (of neighbouring pairs) of one token's heads.

#ifndef ROPE_H
#define ROPE_H

#include <type_traits>

#include "simd.h"

using Element = std::conditional_t<BF16, uint16_t, float>;
static_assert(HEAD_DIM % LANES == 0);

// Row of a token in a table of angles; without positions each token has its own.
static inline int64_t angle_row(const int64_t* positions, int64_t token) {
  return positions ? positions[token] : token;
}

// angle: (HEAD_DIM / 2, 2), cos and sin of each pair; heads are contiguous.
static inline void rotate(const Element* from, Element* to, const float* angle, int64_t heads) {
  for (int d = 0; d < HEAD_DIM; d += LANES) {
    Floats pairs = load(angle + d);  // cos and sin of each pair
    Floats cosines = __builtin_shufflevector(pairs, pairs, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12,
                                             12, 14, 14);
    Floats sines = __builtin_shufflevector(-pairs, pairs, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27,
                                           13, 29, 15, 31);
    for (int64_t head = 0; head < heads; ++head) {
      Floats x = load(from + head * HEAD_DIM + d);
      Floats swapped =
          __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
      store(to + head * HEAD_DIM + d, x * cosines + swapped * sines);
    }
  }
}

#endif
