// SPDX-License-Identifier: Apache-2.0
// Attention of one query per sequence to a paged KV cache, read where it lies.
//
// Compiled with HEAD_DIM, GROUP (query heads that share a KV head), KV_HEADS, BLOCK_SIZE and BF16
// defined; see paged_decode.py. A sequence is cut into spans of blocks, which the threads share.
// Each span leaves a partial softmax (maximum, sum, weighted values); a second pass joins them.

#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "vectors.h"

using Element = std::conditional_t<BF16, uint16_t, float>;
constexpr int HEADS = KV_HEADS * GROUP;
constexpr int SPAN = 4 * BLOCK_SIZE;  // tokens that one thread takes at a time
constexpr int AHEAD = 8;              // tokens between a prefetch and its use
constexpr int VECTORS = HEAD_DIM / LANES;
// Vectors of a head that are summed up at once: GROUP * TILE of them stay in registers.
constexpr int TILE = VECTORS % 4 == 0 && GROUP <= 4 ? 4 : 1;
static_assert(HEAD_DIM % LANES == 0);

typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

// A row of a head, some tokens ahead of its use: the blocks lie anywhere.
static inline void prefetch(const Element* row) {
  constexpr int line = 64 / sizeof(Element);
  for (int i = 0; i < HEAD_DIM; i += line) __builtin_prefetch(row + i);
}

static inline float sum_of(Floats values) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float Four __attribute__((vector_size(16)));
  Eight eight = __builtin_shufflevector(values, values, 0, 1, 2, 3, 4, 5, 6, 7) +
                __builtin_shufflevector(values, values, 8, 9, 10, 11, 12, 13, 14, 15);
  Four four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
              __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// exp(x) for x <= 0 to fp32 rounding: 2^n * e^r with |r| <= ln(2) / 2; 0 below -87.
static inline Floats exp_of_negative(Floats x) {
  Ints too_small = x < -87.0f;
  x = too_small ? Floats{} - 87.0f : x;
  Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
  Floats whole = __builtin_convertvector(n, Floats);
  Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Floats power = (Floats)((n + 127) << 23);
  return too_small ? Floats{} : p * power;
}
static inline float exp_of_negative(float x) { return exp_of_negative(Floats{} + x)[0]; }

struct Partial {
  float maximum[HEADS];
  float sum[HEADS];
  float values[HEADS][HEAD_DIM];
};

static void attend_span(const Element* query, const Element* keys, const Element* values,
                        const int32_t* blocks, int64_t count, float scale, Partial& result) {
  constexpr int64_t token = int64_t(KV_HEADS) * HEAD_DIM, block = token * BLOCK_SIZE;
  alignas(64) float weights[GROUP][SPAN];
  for (int head = 0; head < KV_HEADS; ++head) {
    const Element* own = query + head * GROUP * HEAD_DIM;
    Floats queries[GROUP][VECTORS];
    for (int g = 0; g < GROUP; ++g)
      for (int v = 0; v < VECTORS; ++v)
        queries[g][v] = load(own + g * HEAD_DIM + v * LANES) * scale;

    for (int64_t t = 0; t < count; ++t) {
      const Element* key =
          keys + blocks[t / BLOCK_SIZE] * block + t % BLOCK_SIZE * token + head * HEAD_DIM;
      prefetch(key + AHEAD * token);
      Floats dots[GROUP] = {};
      for (int v = 0; v < VECTORS; ++v) {
        Floats part = load(key + v * LANES);
        for (int g = 0; g < GROUP; ++g) dots[g] += queries[g][v] * part;
      }
      for (int g = 0; g < GROUP; ++g) weights[g][t] = sum_of(dots[g]);
    }

    for (int g = 0; g < GROUP; ++g) {
      float maximum = *std::max_element(weights[g], weights[g] + count);
      Floats sum = {};
      // The last vector reaches beyond the span's tokens: they weigh nothing.
      std::fill(weights[g] + count, weights[g] + (count + LANES - 1) / LANES * LANES, -INFINITY);
      for (int64_t t = 0; t < count; t += LANES) {
        Floats part;
        std::memcpy(&part, &weights[g][t], sizeof(part));
        part = exp_of_negative(part - maximum);
        std::memcpy(&weights[g][t], &part, sizeof(part));
        sum += part;
      }
      result.maximum[head * GROUP + g] = maximum;
      result.sum[head * GROUP + g] = sum_of(sum);
    }

    for (int first = 0; first < VECTORS; first += TILE) {
      Floats tile[GROUP][TILE] = {};
      for (int64_t t = 0; t < count; ++t) {
        const Element* value = values + blocks[t / BLOCK_SIZE] * block + t % BLOCK_SIZE * token +
                               head * HEAD_DIM + first * LANES;
        if (first == 0) prefetch(value + AHEAD * token);
        for (int v = 0; v < TILE; ++v) {
          Floats part = load(value + v * LANES);
          for (int g = 0; g < GROUP; ++g) tile[g][v] += weights[g][t] * part;
        }
      }
      for (int g = 0; g < GROUP; ++g)
        std::memcpy(&result.values[head * GROUP + g][first * LANES], tile[g], sizeof(tile[g]));
    }
  }
}

static void join(const Partial* partials, int64_t spans, int head, Element* out) {
  float maximum = -INFINITY, total = 0;
  for (int64_t s = 0; s < spans; ++s) maximum = std::max(maximum, partials[s].maximum[head]);
  Floats joined[VECTORS] = {};
  for (int64_t s = 0; s < spans; ++s) {
    float share = exp_of_negative(partials[s].maximum[head] - maximum);
    total += share * partials[s].sum[head];
    for (int v = 0; v < VECTORS; ++v) {
      Floats part;
      std::memcpy(&part, &partials[s].values[head][v * LANES], sizeof(part));
      joined[v] += share * part;
    }
  }
  for (int v = 0; v < VECTORS; ++v)
    store(out + v * LANES, spans ? joined[v] / total : Floats{});
}

// query and out: (rows, HEADS, HEAD_DIM); caches: (blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM);
// table: (rows, table_width), a sequence's blocks from the left; lengths: (rows,), tokens of each,
// 0 for a row of padding, which yields zeros.
extern "C" void paged_decode(const Element* query, const Element* keys, const Element* values,
                             Element* out, const int32_t* table, const int32_t* lengths,
                             int64_t rows, int64_t table_width, float scale) {
  std::vector<int64_t> first_span(rows + 1, 0);
  for (int64_t row = 0; row < rows; ++row)
    first_span[row + 1] = first_span[row] + (lengths[row] + SPAN - 1) / SPAN;
  std::unique_ptr<Partial[]> partials(new Partial[first_span[rows]]);
#pragma omp parallel
  {
#pragma omp for schedule(dynamic)
    for (int64_t span = 0; span < first_span[rows]; ++span) {
      int64_t row = std::upper_bound(first_span.begin(), first_span.end(), span) -
                    first_span.begin() - 1;
      int64_t start = (span - first_span[row]) * SPAN;
      attend_span(query + row * HEADS * HEAD_DIM, keys, values,
                  table + row * table_width + start / BLOCK_SIZE,
                  std::min<int64_t>(SPAN, lengths[row] - start), scale, partials[span]);
    }
#pragma omp for
    for (int64_t item = 0; item < rows * HEADS; ++item) {
      int64_t row = item / HEADS;
      join(&partials[first_span[row]], first_span[row + 1] - first_span[row], item % HEADS,
           out + item * HEAD_DIM);
    }
  }
}
