// SPDX-License-Identifier: Apache-2.0
// Where the largest number of each row is; see largest.py.

#include <algorithm>
#include <limits>

#include "simd.h"

constexpr int64_t CHUNK = 64 * LANES;  // numbers of which only the largest is looked at
constexpr float LEAST = -std::numeric_limits<float>::infinity();

typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

static inline bool any(Ints values) {
  int32_t found = 0;
  for (int i = 0; i < LANES; ++i) found |= values[i];
  return found;
}

// The largest number of a chunk in each lane, and whether one is not a number.
struct Summary {
  Floats most;
  bool odd;
};

static inline Summary summary_of(const float* chunk) {
  constexpr int ways = 4;  // comparisons that do not wait for each other
  Floats most[ways];
  Ints odd[ways];
  for (int way = 0; way < ways; ++way) {
    most[way] = load(chunk + way * LANES);
    odd[way] = most[way] != most[way];
  }
  for (int64_t i = ways * LANES; i < CHUNK; i += ways * LANES)
    for (int way = 0; way < ways; ++way) {
      Floats part = load(chunk + i + way * LANES);
      odd[way] |= part != part;
      most[way] = part > most[way] ? part : most[way];
    }
  for (int way = 1; way < ways; ++way) {
    odd[0] |= odd[way];
    most[0] = most[way] > most[0] ? most[way] : most[0];
  }
  return {most[0], any(odd[0])};
}

// The first of the largest of one row; NaN is larger than all.
static int64_t largest_of(const float* row, int64_t width) {
  int64_t chosen = 0;
  float largest = LEAST;
  for (int64_t start = 0; start < width; start += CHUNK) {
    const float* chunk = row + start;
    float last[CHUNK];
    if (width - start < CHUNK) {
      std::fill(last, last + CHUNK, LEAST);
      chunk = std::copy(chunk, row + width, last) - (width - start);
    }
    Summary summary = summary_of(chunk);
    if (summary.odd) return std::find_if(row + start, row + width, [](float x) { return x != x; }) - row;
    if (any(summary.most > largest)) {
      chosen = start;
      for (int i = 0; i < LANES; ++i) largest = std::max(largest, summary.most[i]);
    }
  }
  return std::find(row + chosen, row + width, largest) - row;
}

// numbers: (rows, width), contiguous; out: (rows,).
extern "C" void largest(const float* numbers, int64_t* out, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows > 1)
  for (int64_t row = 0; row < rows; ++row) out[row] = largest_of(numbers + row * width, width);
}
