// SPDX-License-Identifier: Apache-2.0
// A linear layer of a few rows by AVX-512. Included by rows_linear.cpp.
//
// Dot products along the rows of the weight, of four outputs and up to four rows of inputs at a
// time: the weight is read once from memory, and again from the L1 cache for more than four rows.

constexpr int64_t OUTPUTS = 32;  // outputs that are rounded together
constexpr int AT_ONCE = 4;       // outputs, and rows at most, of a step: 16 sums

// Sums of AT_ONCE outputs and ROWS rows, to sums[row][output]. The first rows prefetch weights.
template <int ROWS>
static void multiply(const Element* weight, const Element* x, int64_t width, bool fetch,
                     float (*sums)[OUTPUTS]) {
  __m512 products[AT_ONCE][AT_ONCE];
  for (auto& output : products)
    for (auto& part : output) part = _mm512_setzero_ps();
  for (int64_t k = 0; k < width; k += TILE_DEPTH) {
    __m512i inputs[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) inputs[r] = _mm512_loadu_si512(x + r * width + k);
#pragma GCC unroll 4
    for (int o = 0; o < AT_ONCE; ++o) {
      __m512i weights = _mm512_loadu_si512(weight + o * width + k);
      if (fetch) __builtin_prefetch(weight + (o + AT_ONCE) * width + k, 0, 2);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) products[o][r] = dot_pairs(products[o][r], weights, inputs[r]);
    }
  }
  Floats total = (Floats)sum_lanes(products);
  for (int r = 0; r < ROWS; ++r)
    std::memcpy(sums[r], (float*)&total + r * AT_ONCE, AT_ONCE * sizeof(float));
}

static void compute(const Element* x, const Element* weight, const Element* bias, Element* out,
                    int64_t rows, int64_t width, int64_t outputs) {
  using Multiply = void (*)(const Element*, const Element*, int64_t, bool, float (*)[OUTPUTS]);
  constexpr Multiply LAST[] = {multiply<4>, multiply<1>, multiply<2>, multiply<3>};
#pragma omp parallel for
  for (int64_t start = 0; start < outputs; start += OUTPUTS) {
    int64_t first = std::min(start, outputs - OUTPUTS);  // the last block overlaps the one before
    alignas(64) float sums[2 * LANES][OUTPUTS];
    for (int64_t o = 0; o < OUTPUTS; o += AT_ONCE)
      for (int64_t row = 0; row < rows; row += AT_ONCE) {
        auto multiply = LAST[rows - row < AT_ONCE ? rows - row : 0];
        float(*part)[OUTPUTS] = (float(*)[OUTPUTS])(&sums[row][o]);
        multiply(weight + (first + o) * width, x + row * width, width, row == 0, part);
      }
    Floats low = bias ? load(bias + first) : Floats{};
    Floats high = bias ? load(bias + first + LANES) : Floats{};
    __mmask32 own = ~0u << (start - first);  // the others belong to the block before
    for (int64_t row = 0; row < rows; ++row)
      _mm512_mask_storeu_epi16(out + row * outputs + first, own,
                               round_to_bf16((__m512)(load(&sums[row][LANES]) + high),
                                             (__m512)(load(&sums[row][0]) + low)));
  }
}
