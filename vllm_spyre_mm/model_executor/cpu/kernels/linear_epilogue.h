// SPDX-License-Identifier: Apache-2.0
// What follows a product of 32 outputs: a bias, then GELU, SwiGLU's gate or the sum with a residual.

#ifndef LINEAR_EPILOGUE_H
#define LINEAR_EPILOGUE_H

#include <algorithm>

#include "linear_problem.h"

constexpr int64_t AHEAD = 6;        // rows between the prefetch of an output and its store

// x / (1 + 2^power); bf16 keeps 8 bits of it.
static inline __m512 damp(Floats x, Floats power) {
  Floats divisor = exp2_bounded(-larger(Floats{} - 126.0f, -power)) + 1.0f;
  return _mm512_mul_ps((__m512)x, _mm512_rcp14_ps((__m512)divisor));
}
// By tanh, x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
static inline __m512 gelu_tanh(Floats x) {
  constexpr float scale = -2.0f * 0.7978845608f * 1.44269504f;  // to a power of 2
  return damp(x, x * (x * x * (0.044715f * scale) + scale));
}
static inline __m512 silu(Floats x) { return damp(x, x * -1.44269504f); }

// What is left to do for a panel whose sums are complete.
template <After AFTER>
struct Finish {
  const float* sums = nullptr;
  Element* out = nullptr;
  const Element* residual = nullptr;
  int64_t row = 0, rows = 0, stride = 0, residual_stride = 0;
  __mmask32 held = 0;  // results that there are
  __m512 bias[2], scale;

  void begin(const Problem& of, int64_t panel, int64_t first, int64_t last, const float* from) {
    int64_t left = of.outputs - panel * of.results;
    sums = from;
    out = of.out + first * of.out_row + panel * of.results;
    row = 0, rows = last - first, stride = of.out_row;
    if constexpr (AFTER == RESIDUAL) {
      residual = of.residual + first * of.residual_row + panel * of.results;
      residual_stride = of.residual_row;
      scale = _mm512_set1_ps(of.scale);
    }
    held = ~0u >> (BLOCK - std::min(left, of.results));
    __m512i bits = _mm512_setzero_si512();
    if (of.bias)
      bits = _mm512_maskz_loadu_epi16(AFTER == SWIGLU ? ~0u : held, of.bias + panel * BLOCK);
    widen(bits, bias);
  }
  void next() {
    if (row == rows) return;
    const float* from = sums + row * BLOCK;
    Element* to = out + row * stride;
    __builtin_prefetch(to + AHEAD * stride, 1);  // rows lie apart, which hides them from hardware
    __m512 low = _mm512_add_ps(_mm512_load_ps(from), bias[0]);
    __m512 high = _mm512_add_ps(_mm512_load_ps(from + 16), bias[1]);
    if constexpr (AFTER == SWIGLU) low = _mm512_mul_ps(silu((Floats)low), high);
    if constexpr (AFTER == GELU_TANH) {
      low = gelu_tanh((Floats)low);
      high = gelu_tanh((Floats)high);
    }
    if constexpr (AFTER == RESIDUAL) {
      const Element* beside = residual + row * residual_stride;
      __builtin_prefetch(beside + AHEAD * residual_stride);
      __builtin_prefetch(beside + BLOCK, 0, 2);  // the next panel's
      __m512 added[2];
      widen(_mm512_maskz_loadu_epi16(held, beside), added);
      low = _mm512_fmadd_ps(low, scale, added[0]);
      high = _mm512_fmadd_ps(high, scale, added[1]);
    }
    _mm512_mask_storeu_epi16(to, held, round_to_bf16(high, low));
    ++row;
  }
  void rest() {
    while (row < rows) next();
  }
};

#endif
