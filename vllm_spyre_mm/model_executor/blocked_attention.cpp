// SPDX-License-Identifier: Apache-2.0
// Attention of many bf16 queries, block by block; products of matrices by PyTorch's brgemm.
//
// Compiled with HEAD_DIM defined; see blocked_attention.py. A task is a run of query rows that share
// a KV head. It packs KEYS keys and values at a time as brgemm wants them, and goes through its rows
// ROWS at a time, so that all that it touches stays in the core's cache. The softmax is kept as it
// goes: a maximum and a sum of each row, in fp32.

#include <algorithm>
#include <cmath>
#include <memory>

#include <omp.h>

#include "matrices.h"

constexpr int DEPTH = (HEAD_DIM + 31) / 32 * 32;  // of a head, as a tile's operand
constexpr int WIDTH = (HEAD_DIM + 15) / 16 * 16;  // of a head, as a tile's result
constexpr int ROWS = 32;   // queries that are multiplied at a time
constexpr int KEYS = 768;  // keys that are packed at a time
constexpr int RUN = 768;   // queries that share the packed keys
constexpr int AHEAD = 32;  // keys between a prefetch and its use
static_assert(HEAD_DIM % 2 == 0);

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline Floats sum(Floats a, Floats b) { return a + b; }

template <typename Join>
static inline float across(Floats values, Join join) {
  values = join(values, __builtin_shufflevector(values, values, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1,
                                                2, 3, 4, 5, 6, 7));
  values = join(values, __builtin_shufflevector(values, values, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14,
                                                15, 8, 9, 10, 11));
  values = join(values, __builtin_shufflevector(values, values, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8,
                                                9, 14, 15, 12, 13));
  return join(values, __builtin_shufflevector(values, values, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10,
                                              13, 12, 15, 14))[0];
}

struct Scratch {
  alignas(64) Element keys[DEPTH / 2][KEYS][2];
  alignas(64) Element values[KEYS / 2][WIDTH][2];
  alignas(64) Element query[ROWS][DEPTH];
  alignas(64) float scores[ROWS][KEYS];
  alignas(64) Element weights[ROWS][KEYS];
  alignas(64) float joined[RUN][WIDTH];
  float maxima[RUN], sums[RUN];
};

// What the arguments of blocked_attention say.
struct Problem {
  const Element *query, *keys, *values;
  Element* out;
  const int32_t* blocks;
  int64_t block_size, tokens, num_keys, kv_heads, group;
  int64_t query_batch, query_token, keys_batch, keys_token, values_batch, values_token;  // strides
  float scale;

  // Keys that a row of queries sees: row r is query head r % group of token r / group.
  int64_t keys_seen(int64_t row) const {
    return blocks ? num_keys - tokens + row / group + 1 : num_keys;
  }
  // The row of a key among the keys of its batch, or in the cache.
  int64_t row_of_key(int64_t position) const {
    return blocks ? blocks[position / block_size] * block_size + position % block_size : position;
  }
  // Up to a multiple of this many keys are computed with: brgemm makes a program for each number.
  int64_t step() const { return blocks ? 128 : 32; }
};

// A row of a head before its use: heads lie a token's width apart, which hides them from hardware.
static inline void prefetch(const Element* row) {
  for (int i = 0; i < HEAD_DIM; i += 64 / sizeof(Element)) __builtin_prefetch(row + i);
  __builtin_prefetch(row + HEAD_DIM - 1);
}

// Keys [first, first + count) as (DEPTH / 2, keys, 2), values as (keys / 2, WIDTH, 2); zeros up to
// the next multiple of step() keys.
static void pack(const Problem& of, int64_t batch, int head, int64_t first, int64_t count,
                 Scratch& to) {
  const Element* keys = of.keys + batch * of.keys_batch + head * HEAD_DIM;
  const Element* values = of.values + batch * of.values_batch + head * HEAD_DIM;
  for (int64_t n = 0; n < round_up(count, of.step()); n += LANES) {
    for (int64_t i = n + AHEAD; i < std::min(count, n + AHEAD + LANES); ++i) {
      int64_t row = of.row_of_key(first + i);
      prefetch(keys + row * of.keys_token);
      prefetch(values + row * of.values_token);
    }
    const Element *key[LANES] = {}, *value[LANES] = {};
    for (int i = 0; i < std::min<int64_t>(LANES, count - n); ++i) {
      int64_t row = of.row_of_key(first + n + i);
      key[i] = keys + row * of.keys_token;
      value[i] = values + row * of.values_token;
    }
    auto pack_keys = [&]<int COUNT>(int d) {
      Bits pairs[LANES];
      for (int i = 0; i < LANES; ++i) pairs[i] = key[i] ? load<Bits, COUNT>(key[i] + d) : Bits{};
      transpose(pairs);
      for (int i = 0; i < LANES; ++i) store(to.keys[d / 2 + i][n], pairs[i]);
    };
    auto pack_values = [&]<int COUNT>(int d) {
      for (int i = 0; i < LANES; i += 2) {
        Halves a = value[i] ? load<Halves, COUNT>(value[i] + d) : Halves{};
        Halves b = value[i + 1] ? load<Halves, COUNT>(value[i + 1] + d) : Halves{};
        store(to.values[(n + i) / 2][d],
              __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
      }
    };
    constexpr int whole_pairs = HEAD_DIM / (2 * LANES) * 2 * LANES;
    for (int d = 0; d < whole_pairs; d += 2 * LANES) pack_keys.template operator()<2 * LANES>(d);
    if constexpr (whole_pairs < HEAD_DIM)
      pack_keys.template operator()<HEAD_DIM - whole_pairs>(whole_pairs);
    constexpr int whole = HEAD_DIM / LANES * LANES;
    for (int d = 0; d < whole; d += LANES) pack_values.template operator()<LANES>(d);
    if constexpr (whole < HEAD_DIM) pack_values.template operator()<HEAD_DIM - whole>(whole);
  }
}

// Turn a row of scores into weights; returns what the weights before are to be multiplied with.
static inline float weigh(float* scores, Element* weights, int64_t count, int64_t width,
                          float scale, float& maximum, float& weight_sum) {
  int64_t whole = (count + 31) / 32 * 32;
  std::fill(scores + count, scores + whole, -INFINITY);
  Floats most[2] = {Floats{} - INFINITY, Floats{} - INFINITY};
  for (int64_t n = 0; n < whole; n += 2 * LANES)
    for (int i = 0; i < 2; ++i)
      most[i] = larger(most[i], load<Floats>(scores + n + i * LANES));
  float top = std::max(maximum, across(larger(most[0], most[1]), larger) * scale);
  float kept = maximum == top ? 1.0f : exp2_bounded(Floats{} + (maximum - top))[0];
  Floats total = {};
  for (int64_t n = 0; n < whole; n += 2 * LANES) {
    Floats low = exp2_bounded(load<Floats>(scores + n) * scale - top);
    Floats high = exp2_bounded(load<Floats>(scores + n + LANES) * scale - top);
    total += low + high;
    // The upper halves, rounded.
    TwoHalves a = (TwoHalves)((Bits)low + 0x8000), b = (TwoHalves)((Bits)high + 0x8000);
    store(weights + n, __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25,
                                               27, 29, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51,
                                               53, 55, 57, 59, 61, 63));
  }
  std::fill(weights + whole, weights + width, 0);
  maximum = top;
  weight_sum = weight_sum * kept + across(total, sum);
  return kept;
}

static inline void store_row(Element* to, const float* row, float factor) {
  Element rounded[WIDTH];
  for (int d = 0; d < WIDTH; d += LANES)
    store(rounded + d, round_to_bf16(load<Floats>(row + d) * factor));
  std::memcpy(to, rounded, HEAD_DIM * sizeof(Element));
}

// The rows [first, last) of one KV head.
static void attend(const Problem& of, int64_t batch, int head, int64_t first, int64_t last,
                   Scratch& scratch) {
  constexpr float log2_e = 1.44269504f;
  auto offset = [&](int64_t row) { return (head * of.group + row % of.group) * HEAD_DIM; };
  std::fill_n(scratch.sums, RUN, 0.0f);
  std::fill_n(scratch.maxima, RUN, -INFINITY);
  for (int64_t start = 0; start < of.keys_seen(last - 1); start += KEYS) {
    pack(of, batch, head, start, std::min<int64_t>(KEYS, of.keys_seen(last - 1) - start), scratch);
    for (int64_t block = first; block < last; block += ROWS) {
      int64_t end = std::min(last, block + ROWS);
      int64_t seen = std::min<int64_t>(KEYS, of.keys_seen(end - 1) - start);
      if (seen <= 0) continue;
      int64_t width = round_up(seen, of.step());
      for (int64_t row = block; row < end; ++row)
        std::memcpy(scratch.query[row - block],
                    of.query + batch * of.query_batch + row / of.group * of.query_token + offset(row),
                    HEAD_DIM * sizeof(Element));
      brgemm(ROWS, width, DEPTH, DEPTH, KEYS, KEYS, false, tile(scratch.query[0]),
             tile(scratch.keys[0][0]), scratch.scores[0], true);
      for (int64_t row = block; row < end; ++row) {
        int64_t i = row - first;
        float kept = weigh(scratch.scores[row - block], scratch.weights[row - block],
                           std::clamp<int64_t>(of.keys_seen(row) - start, 0, seen), width,
                           of.scale * log2_e, scratch.maxima[i], scratch.sums[i]);
        if (start && kept != 1.0f)
          for (int d = 0; d < WIDTH; d += LANES)
            store(scratch.joined[i] + d, load<Floats>(scratch.joined[i] + d) * kept);
      }
      brgemm(ROWS, WIDTH, width, KEYS, WIDTH, WIDTH, start > 0, tile(scratch.weights[0]),
             tile(scratch.values[0][0]), scratch.joined[block - first], true);
    }
  }
  for (int64_t row = first; row < last; ++row)
    store_row(of.out + (batch * of.tokens + row / of.group) * of.kv_heads * of.group * HEAD_DIM +
                  offset(row),
              scratch.joined[row - first], 1.0f / scratch.sums[row - first]);
}

// query: (batch, tokens, kv_heads * group, HEAD_DIM), heads side by side; out: the same, contiguous.
// keys and values: (batch, num_keys, kv_heads, HEAD_DIM), heads side by side. With blocks, those of
// one sequence, they are a cache, (blocks, block_size, kv_heads, HEAD_DIM), contiguous; the queries
// are the last tokens then, and see no later ones.
extern "C" void blocked_attention(const Element* query, const Element* keys, const Element* values,
                                  Element* out, const int32_t* blocks, int64_t block_size,
                                  int64_t batch, int64_t tokens, int64_t num_keys,
                                  int64_t kv_heads, int64_t group, int64_t query_batch,
                                  int64_t query_token, int64_t keys_batch, int64_t keys_token,
                                  int64_t values_batch, int64_t values_token, float scale) {
  Problem of{query,       keys,        values,     out,        blocks,       block_size,
             tokens,      num_keys,    kv_heads,   group,      query_batch,  query_token,
             keys_batch,  keys_token,  values_batch, values_token, scale};
  // Several tasks for each thread, and no more queries in one than there is room for.
  int64_t rows = tokens * group, heads = batch * kv_heads;
  int64_t splits = round_up(4 * omp_get_max_threads(), heads) / heads;
  int64_t run = std::min<int64_t>(round_up(round_up(rows, splits) / splits, ROWS), RUN);
  splits = round_up(rows, run) / run;
#pragma omp parallel
  {
    thread_local std::unique_ptr<Scratch> scratch(new Scratch());
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < heads * splits; ++task) {
      // The last tokens of a prompt see the most keys: they come first.
      int64_t first = (splits - 1 - task / heads) * run;
      attend(of, task % heads / kv_heads, int(task % kv_heads), first, std::min(rows, first + run),
             *scratch);
    }
    brgemm_release(true);
  }
}
