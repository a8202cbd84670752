// SPDX-License-Identifier: Apache-2.0
// The arguments of tiled_linear, the task of a thread, and a reusable buffer.

#ifndef LINEAR_PROBLEM_H
#define LINEAR_PROBLEM_H

#include <cstdlib>
#include <memory>

#include "tiles.h"

constexpr int64_t BLOCK = 32;       // rows, and outputs, that are multiplied at a time
constexpr int64_t STEP = 32 * 32;   // elements of a block of either operand in a step

enum Epilogue { NONE, GELU_TANH, SWIGLU, RESIDUAL };

struct LinearProblem {
  const Element *x, *weight, *bias, *norm_weight, *norm_bias, *residual;
  Element* out;
  int64_t rows, width, outputs, x_row, out_row, residual_row;
  int64_t results;  // results of a panel: outputs, or gated values
  bool centered;
  float epsilon, scale;

  int64_t steps() const { return divide_up(width, 32); }
};

template <typename Number>
class Buffer {
 public:
  Number* of(size_t count) {
    if (count > count_) {
      numbers_.reset((Number*)std::aligned_alloc(64, (count * sizeof(Number) + 63) / 64 * 64));
      count_ = count;
    }
    return numbers_.get();
  }

 private:
  struct Free {
    void operator()(Number* numbers) const { std::free(numbers); }
  };
  std::unique_ptr<Number[], Free> numbers_;
  size_t count_ = 0;
};

// A task: rows [row, last_row), and the outputs of panels [panel, last_panel).
struct Task {
  int64_t row, last_row, panel, last_panel;
};

static inline void widen(__m512i bits, __m512 numbers[2]) {
  numbers[0] = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits)), 16);
  numbers[1] =
      (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1)), 16);
}

#endif
