// SPDX-License-Identifier: Apache-2.0
// GELU by its tanh approximation, x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3), in place.

#include "matrices.h"

static inline Floats gelu(Floats x) {
  constexpr float scale = -2.0f * 0.7978845608f * 1.44269504f;  // to a power of 2
  Floats power = x * (x * x * (0.044715f * scale) + scale);
  Floats divisor = exp2_bounded(-larger(Floats{} - 126.0f, -power)) + 1.0f;
#ifdef __AVX512F__
  return x * (Floats)__builtin_ia32_rcp14ps512_mask(divisor, Floats{}, -1);  // bf16 keeps 8 bits
#else
  return x / divisor;
#endif
}

static inline Halves gelu(Halves x) {
  return round_to_bf16(gelu(widen(x)));
}

extern "C" void gelu_tanh(Element* values, int64_t count) {
  int64_t whole = count / LANES * LANES;
#pragma omp parallel for
  for (int64_t i = 0; i < whole; i += LANES) store(values + i, gelu(load<Halves>(values + i)));
  Halves rest = {};
  std::memcpy(&rest, values + whole, (count - whole) * sizeof(Element));
  rest = gelu(rest);
  std::memcpy(values + whole, &rest, (count - whole) * sizeof(Element));
}
