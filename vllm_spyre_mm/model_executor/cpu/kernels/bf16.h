// SPDX-License-Identifier: Apache-2.0
// AVX-512 helpers of the bf16 kernels: loads and stores, dot products of pairs, exp2, a transpose.
// AVX-512 BF16 has instructions for a dot product of pairs and for rounding; without them the same
// is computed in fp32.

#ifndef BF16_H
#define BF16_H

#include <immintrin.h>

#include "simd.h"

using Element = uint16_t;             // the bits of a bf16 number
constexpr Element BF16_ONE = 0x3f80;  // 1.0

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

// sums + a * b of 32 bf16 numbers each: both products of a pair are added to one lane.
static inline __m512 dot_pairs(__m512 sums, __m512i a, __m512i b) {
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b);
#else
  const __m512i upper = _mm512_set1_epi32(0xffff0000);
  auto even = [](__m512i pairs) { return (__m512)_mm512_slli_epi32(pairs, 16); };
  auto odd = [=](__m512i pairs) { return (__m512)_mm512_and_si512(pairs, upper); };
  return _mm512_fmadd_ps(odd(a), odd(b), _mm512_fmadd_ps(even(a), even(b), sums));
#endif
}

// Rounds 32 fp32 numbers to bf16, to nearest, ties to even; NaN stays NaN.
static inline __m512i round_to_bf16(__m512 high, __m512 low) {
#ifdef __AVX512BF16__
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
  auto round = [](__m512 values) {
    __m512i bits = (__m512i)values;
    __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
    __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    bits = _mm512_mask_set1_epi32(_mm512_srli_epi32(bits, 16), is_nan, 0x7fc0);
    return _mm512_cvtepi32_epi16(bits);
  };
  return _mm512_inserti64x4(_mm512_castsi256_si512(round(low)), round(high), 1);
#endif
}

// The sums over the lanes of 16 vectors: lane 4 r + o is that of vectors[o][r].
static inline __m512 sum_lanes(const __m512 vectors[4][4]) {
  __m512 fours[4];
  for (int o = 0; o < 4; ++o) {
    const __m512* v = vectors[o];
    auto fold = [](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    __m512 first = fold(v[0], v[1]), second = fold(v[2], v[3]);
    fours[o] = _mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0x88),
                             _mm512_shuffle_f32x4(first, second, 0xdd));
  }
  auto fold = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  };
  __m512 first = fold(fours[0], fours[1]), second = fold(fours[2], fours[3]);
  return _mm512_add_ps(_mm512_shuffle_ps(first, second, 0x88),
                       _mm512_shuffle_ps(first, second, 0xdd));
}

static inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// 2^x for x < 127, with a relative error of 4e-6; x is clamped to at least -126.
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

// Stores 32 sums in order: unpacking has put alternate groups of four into the two vectors.
static inline void store_unpacked(Floats low, Floats high, float* to) {
  store(to, __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22,
                                    23));
  store(to + LANES, __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15,
                                            28, 29, 30, 31));
}

// Transposes 16 rows of 16 pairs of bf16 numbers.
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

#endif
