// SPDX-License-Identifier: Apache-2.0
// Attention of one query to a span of bf16 tokens, with AVX-512. Included by paged_decode.cpp.
//
// Scores are dot products of four queries and four tokens at a time. The values of two tokens are
// interleaved, so that a dot product of pairs weighs both. While the keys of a span are multiplied
// its values are prefetched, and then the next span's keys.

#include "bf16.h"

static_assert(HEAD_DIM % 32 == 0 && BLOCK_SIZE % 4 == 0);

class Attention {
 public:
  // query: (HEADS, HEAD_DIM); next: the span after this one, to prefetch, or null.
  void attend(const Element* query, const Span& span, const Span* next, float scale,
              Partial& result) {
    for (int64_t t = 0; t < span.count; t += FOUR) {
      for (int64_t i = t; i < std::min(span.count, t + FOUR); ++i)
        prefetch<3>(span.value(i), TOKEN);
      for (int head = 0; head < KV_HEADS; ++head)
        each_group([&]<int COUNT>(int first) {
          int member = head * GROUP + first;
          multiply_keys<COUNT>(query + member * HEAD_DIM, span.key(t) + head * HEAD_DIM, scale,
                               &scores[member][t]);
        });
    }
    for (int member = 0; member < HEADS; ++member) {
      float* row = scores[member];
      softmax(row, span.count, member, result);
      for (int64_t t = 0; t < span.count; t += LANES) store(weights[member] + t, load(row + t));
    }
    for (int head = 0; head < KV_HEADS; ++head)
      for (int dim = 0; dim < HEAD_DIM; dim += WIDTH)
        each_group([&]<int COUNT>(int first) {
          multiply_values<COUNT>(span, first ? nullptr : next, head * GROUP + first,
                                 head * HEAD_DIM + dim, dim, result);
        });
  }

 private:
  static constexpr int FOUR = 4;                                  // tokens, and queries at most
  static constexpr int WIDTH = HEAD_DIM % 64 == 0 ? 64 : 32;      // elements of a head at a time
  static constexpr int PAIRS = WIDTH / 32;                        // pairs of fp32 vectors
  alignas(64) float scores[HEADS][SPAN];
  alignas(64) Element weights[HEADS][SPAN];

  // Calls work.operator()<COUNT>(first) for the queries that share a KV head, COUNT at a time.
  template <typename Work>
  static void each_group(Work work) {
    for (int first = 0; first + FOUR <= GROUP; first += FOUR) work.template operator()<FOUR>(first);
    if constexpr (GROUP % FOUR) work.template operator()<GROUP % FOUR>(GROUP - GROUP % FOUR);
  }

  // Scores of four tokens; the last may lie beyond the span, in its last block.
  template <int COUNT>
  static void multiply_keys(const Element* query, const Element* keys, float scale, float* to) {
    __m512 products[FOUR][FOUR];
    for (auto& token : products)
      for (auto& part : token) part = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int k = 0; k < HEAD_DIM; k += 32) {
      __m512i queries[COUNT];
#pragma GCC unroll 4
      for (int g = 0; g < COUNT; ++g) queries[g] = _mm512_loadu_si512(query + g * HEAD_DIM + k);
#pragma GCC unroll 4
      for (int t = 0; t < FOUR; ++t) {
        __m512i key = _mm512_loadu_si512(keys + t * TOKEN + k);
#pragma GCC unroll 4
        for (int g = 0; g < COUNT; ++g) products[t][g] = dot_pairs(products[t][g], key, queries[g]);
      }
    }
    Floats sums = (Floats)sum_lanes(products) * scale;
    for (int g = 0; g < COUNT; ++g) std::memcpy(to + g * SPAN, (float*)&sums + g * FOUR, 16);
  }

  // Weighted values of WIDTH elements of a head, for COUNT queries from member on.
  template <int COUNT>
  void multiply_values(const Span& span, const Span* next, int member, int offset, int dim,
                       Partial& result) const {
    __m512 sums[COUNT][PAIRS][2];
    for (auto& query : sums)
      for (auto& pair : query) pair[0] = pair[1] = _mm512_setzero_ps();
    for (int64_t t = 0; t < span.count; t += 2) {
      const Element* value = span.value(t) + offset;
      if (next)
        for (int64_t i = t; i < std::min(next->count, t + 2); ++i)
          prefetch<3>(next->key(i) + offset, WIDTH);
      bool both = t + 1 < span.count;
      __m512i low[PAIRS], high[PAIRS];
#pragma GCC unroll 2
      for (int p = 0; p < PAIRS; ++p) {
        __m512i even = _mm512_loadu_si512(value + p * 32);
        __m512i odd = both ? _mm512_loadu_si512(value + TOKEN + p * 32) : _mm512_setzero_si512();
        low[p] = _mm512_unpacklo_epi16(even, odd);
        high[p] = _mm512_unpackhi_epi16(even, odd);
      }
#pragma GCC unroll 4
      for (int g = 0; g < COUNT; ++g) {
        int32_t pair;
        std::memcpy(&pair, &weights[member + g][t], sizeof(pair));
        __m512i weight = _mm512_set1_epi32(pair);
#pragma GCC unroll 2
        for (int p = 0; p < PAIRS; ++p) {
          sums[g][p][0] = dot_pairs(sums[g][p][0], weight, low[p]);
          sums[g][p][1] = dot_pairs(sums[g][p][1], weight, high[p]);
        }
      }
    }
    for (int g = 0; g < COUNT; ++g)
      for (int p = 0; p < PAIRS; ++p)
        store_unpacked((Floats)sums[g][p][0], (Floats)sums[g][p][1],
                       &result.values[member + g][dim + p * 32]);
  }
};
