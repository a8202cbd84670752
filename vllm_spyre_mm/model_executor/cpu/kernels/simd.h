// SPDX-License-Identifier: Apache-2.0
// SIMD vectors of 16 fp32 lanes for any CPU, loaded from and stored to bf16 or fp32 memory.

#ifndef SIMD_H
#define SIMD_H

#include <cstdint>
#include <cstring>

constexpr int LANES = 16;

// GCC's and Clang's vector types: one register with AVX-512, two or four with less.
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));  // the bits of bf16 numbers

static inline Floats widen(Halves bits) {
  return (Floats)(__builtin_convertvector(bits, Bits) << 16);
}
// Rounds to nearest, ties to even.
static inline Halves round_to_bf16(Floats values) {
  Bits bits = (Bits)values;
  return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
}

static inline Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}
static inline Floats load(const uint16_t* from) {
  Halves bits;
  std::memcpy(&bits, from, sizeof(bits));
  return widen(bits);
}
static inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof(values)); }
static inline void store(uint16_t* to, Floats values) {
  Halves rounded = round_to_bf16(values);
  std::memcpy(to, &rounded, sizeof(rounded));
}

#endif
