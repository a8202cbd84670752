// SPDX-License-Identifier: Apache-2.0
// What the bf16 kernels share: what prepares their operands, and powers of 2.

#include "vectors.h"

using Element = uint16_t;  // the bits of a bf16 number

template <typename Vector>
static inline Vector load(const void* from) {
  Vector values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}
template <typename Vector>
static inline void store(void* to, Vector values) {
  std::memcpy(to, &values, sizeof(values));
}

static inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// 2^x for x < 127, to 4e-6; 2^-126 for what is less than -126.
static inline Floats exp2_bounded(Floats x) {
  constexpr float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  x = larger(Floats{} - 126.0f, x);
  Floats shifted = x + shift;
  Floats r = x - (shifted - shift);
  Floats p = r * 9.6181291e-3f + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  return (Floats)((Bits)p + ((Bits)shifted << 23));
}

// Rows of 16 pairs of numbers to columns.
static inline void transpose(Bits rows[LANES]) {
  for (int round = 0; round < 4; ++round) {
    Bits next[LANES];
    for (int i = 0; i < LANES / 2; ++i) {
      Bits a = rows[i], b = rows[i + LANES / 2];
      next[2 * i] =
          __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29,
                                                14, 30, 15, 31);
    }
    std::memcpy(rows, next, sizeof(next));
  }
}
