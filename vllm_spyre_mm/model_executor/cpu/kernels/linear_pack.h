// SPDX-License-Identifier: Apache-2.0
// Packs the rows of a task into tiles, and applies the fused norm.

#ifndef LINEAR_PACK_H
#define LINEAR_PACK_H

#include <algorithm>
#include <cmath>

#include "linear_problem.h"

// The mean that a norm subtracts from a row, and the factor that it multiplies by.
struct Moments {
  float mean, factor;
};

// The variance of a row in two passes.
static float variance_about(const LinearProblem& of, const Element* row, float mean) {
  Floats squares = {};
  for (int64_t i = 0; i < of.width; i += LANES) {
    Floats deviations = load(row + i) - mean;
    squares += deviations * deviations;
  }
  return _mm512_reduce_add_ps((__m512)squares) / of.width;
}

static Moments moments_of(const LinearProblem& of, const Element* row) {
  __m512 sums = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < of.width; i += 32) {
    __m512i x = _mm512_loadu_si512(row + i);
    sums = dot_pairs(sums, x, _mm512_set1_epi16(BF16_ONE));
    squares = dot_pairs(squares, x, x);
  }
  float mean = of.centered ? _mm512_reduce_add_ps(sums) / of.width : 0;
  float variance = _mm512_reduce_add_ps(squares) / of.width - mean * mean;
  if (variance < mean * mean) variance = variance_about(of, row, mean);  // against cancellation
  return {mean, 1.0f / std::sqrt(variance + of.epsilon)};
}

// Converts a norm's weight and bias to fp32; zeros for no bias.
static void widen_norm(const LinearProblem& of, float* weight, float* bias) {
  for (int64_t i = 0; i < of.width; i += LANES) {
    store(weight + i, load(of.norm_weight + i));
    store(bias + i, of.norm_bias ? load(of.norm_bias + i) : Floats{});
  }
}

// A thread's memory.
struct Scratch {
  Buffer<Element> packed;
  Buffer<float> sums, norm_weight, norm_bias;
  Buffer<Moments> moments;
};

// Packs steps [step, last) of a task's rows as (blocks, steps, 32, 32), padded with zeros. The
// rows' moments are computed with the first step.
static Element* pack_rows(const LinearProblem& of, const Task& task, int64_t step, int64_t last,
                          Scratch& memory) {
  int64_t count = last - step, whole = std::min(last, of.width / 32) - step;
  uint32_t rest = (1u << of.width % 32) - 1;
  int64_t rows = task.last_row - task.row, blocks = divide_up(rows, BLOCK);
  Element* to = memory.packed.of(blocks * count * STEP);
  Moments* moments = memory.moments.of(rows);
  float *weight = memory.norm_weight.of(of.width), *bias = memory.norm_bias.of(of.width);
  if (of.norm_weight && step == 0) widen_norm(of, weight, bias);
  for (int64_t r = 0; r < blocks * BLOCK; ++r) {
    Element* packed = to + r / BLOCK * count * STEP + r % BLOCK * 32;
    const Element* row = of.x + (task.row + r) * of.x_row;
    if (of.norm_weight && r < rows) {
      if (step == 0) moments[r] = moments_of(of, row);
      __m512 factor = _mm512_set1_ps(moments[r].factor);
      __m512 mean = _mm512_set1_ps(moments[r].mean);
      for (int64_t k = 0; k < count; ++k) {
        __m512 x[2];
        widen(_mm512_loadu_si512(row + (step + k) * 32), x);
        for (int half = 0; half < 2; ++half) {
          int64_t i = (step + k) * 32 + half * LANES;
          __m512 deviations = _mm512_mul_ps(_mm512_sub_ps(x[half], mean), factor);
          x[half] = _mm512_fmadd_ps(deviations, _mm512_load_ps(weight + i),
                                    _mm512_load_ps(bias + i));
        }
        store(packed + k * STEP, round_to_bf16(x[1], x[0]));
      }
      continue;
    }
    for (int64_t k = 0; k < count; ++k)
      _mm512_store_si512(packed + k * STEP,
                         _mm512_maskz_loadu_epi16(r >= rows ? 0 : k < whole ? ~0u : rest,
                                                  row + (step + k) * 32));
  }
  compiler_barrier(to);
  return to;
}

#endif
