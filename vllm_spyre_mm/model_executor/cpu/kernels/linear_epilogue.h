// SPDX-License-Identifier: Apache-2.0
// The epilogue of a panel of 32 outputs: a bias, then GELU, SwiGLU's gating or a residual.

#ifndef LINEAR_EPILOGUE_H
#define LINEAR_EPILOGUE_H

#include <algorithm>

#include "linear_problem.h"

constexpr int64_t AHEAD = 6;        // rows between the prefetch of an output and its store

// x / (1 + 2^power), to the 8 bits that bf16 keeps.
static inline __m512 times_sigmoid(Floats x, Floats power) {
  Floats divisor = exp2_bounded(-larger(Floats{} - 126.0f, -power)) + 1.0f;
  return _mm512_mul_ps((__m512)x, _mm512_rcp14_ps((__m512)divisor));
}
// By tanh, x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
static inline __m512 gelu_tanh(Floats x) {
  constexpr float scale = -2.0f * 0.7978845608f * 1.44269504f;  // to a power of 2
  return times_sigmoid(x, x * (x * x * (0.044715f * scale) + scale));
}
static inline __m512 silu(Floats x) {
  return times_sigmoid(x, x * -1.44269504f);
}

// The epilogue of a panel whose sums are complete, a row at a time.
template <Epilogue EPILOGUE>
struct PanelEpilogue {
  const float* sums = nullptr;
  Element* out = nullptr;
  const Element* residual = nullptr;
  int64_t row = 0, rows = 0, stride = 0, residual_stride = 0;
  __mmask32 held = 0;  // valid results of a row
  __m512 bias[2], scale;

  void begin(const LinearProblem& of, int64_t panel, int64_t first, int64_t last,
             const float* from) {
    int64_t left = of.outputs - panel * of.results;
    sums = from;
    out = of.out + first * of.out_row + panel * of.results;
    row = 0, rows = last - first, stride = of.out_row;
    if constexpr (EPILOGUE == RESIDUAL) {
      residual = of.residual + first * of.residual_row + panel * of.results;
      residual_stride = of.residual_row;
      scale = _mm512_set1_ps(of.scale);
    }
    held = ~0u >> (BLOCK - std::min(left, of.results));
    __m512i bits = _mm512_setzero_si512();
    if (of.bias)
      bits = _mm512_maskz_loadu_epi16(EPILOGUE == SWIGLU ? ~0u : held, of.bias + panel * BLOCK);
    widen(bits, bias);
  }
  void next() {
    if (row == rows) return;
    const float* from = sums + row * BLOCK;
    Element* to = out + row * stride;
    __builtin_prefetch(to + AHEAD * stride, 1);  // too far apart for the hardware prefetcher
    __m512 low = _mm512_add_ps(_mm512_load_ps(from), bias[0]);
    __m512 high = _mm512_add_ps(_mm512_load_ps(from + 16), bias[1]);
    if constexpr (EPILOGUE == SWIGLU) low = _mm512_mul_ps(silu((Floats)low), high);
    if constexpr (EPILOGUE == GELU_TANH) {
      low = gelu_tanh((Floats)low);
      high = gelu_tanh((Floats)high);
    }
    if constexpr (EPILOGUE == RESIDUAL) {
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
