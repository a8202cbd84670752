// SPDX-License-Identifier: Apache-2.0
// Attention of one query to a span of tokens, with AMX. Included by paged_decode.cpp.
//
// Keys are the left operand, unpacked, 16 tokens in a register; the queries that share them are the
// right one. The values of two tokens are interleaved to be the right operand of the weights. While
// the keys of a span are multiplied its values are prefetched, and then the next span's keys, so
// that memory is never idle.

#include "tiles.h"

static_assert(BLOCK_SIZE % (4 * TILE_ROWS) == 0 && HEAD_DIM % TILE_DEPTH == 0);
static_assert(GROUP <= TILE_ROWS);

class Attention {
 public:
  // query: (HEADS, HEAD_DIM); next: the span after this one, to prefetch, or null.
  void attend(const Element* query, const Span& span, const Span* next, float scale,
              Partial& result) {
    pair_queries(query);
    for (int64_t t = 0; t < span.count; t += 4 * TILE_ROWS)
      for (int head = 0; head < KV_HEADS; ++head) multiply_keys(span, t, head, scale);
    for (int head = 0; head < KV_HEADS; ++head) {
      for (int g = 0; g < GROUP; ++g) {
        float* row = scores[head * GROUP + g];
        softmax(row, span.count, head * GROUP + g, result);
        for (int64_t t = 0; t < padded(span.count); t += LANES)
          store(weights[g] + t, t < span.count ? load(row + t) : Floats{});
      }
      compiler_barrier(weights);
      for (int first = 0; first < HEAD_DIM; first += WIDTH)
        multiply_values(span, next, head, first, result);
    }
  }

 private:
  // Elements of a head that are computed together, in two or four accumulators.
  static constexpr int WIDTH = HEAD_DIM % (2 * TILE_DEPTH) == 0 ? 2 * TILE_DEPTH : TILE_DEPTH;
  using Pairs = Element[TILE_ROWS][TILE_ROWS][2];  // (pair of k, column, 2)
  Tiles tiles;
  alignas(64) Pairs queries[KV_HEADS][HEAD_DIM / TILE_DEPTH] = {};  // columns beyond GROUP are 0
  alignas(64) float scores[HEADS][SPAN];
  alignas(64) Element weights[TILE_ROWS][SPAN] = {};  // rows beyond GROUP are 0
  alignas(64) float block[4][TILE_ROWS][TILE_ROWS];
  alignas(64) Pairs values[4];

  static int64_t padded(int64_t count) {
    return (count + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH;
  }

  void pair_queries(const Element* query) {
    for (int head = 0; head < KV_HEADS; ++head)
      for (int g = 0; g < GROUP; ++g, query += HEAD_DIM)
        for (int k = 0; k < HEAD_DIM; k += 2)
          std::memcpy(queries[head][k / TILE_DEPTH][k % TILE_DEPTH / 2][g], query + k, 4);
    compiler_barrier(queries);
  }

  // Scores of four registers of tokens from t on, without tokens beyond the span.
  void multiply_keys(const Span& span, int64_t t, int head, float scale) {
    const Element* keys = span.key(t) + head * HEAD_DIM;
    int64_t left = (span.count - t + TILE_ROWS - 1) / TILE_ROWS;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    // Values are prefetched a few tokens at a time: many at once would delay the tile loads.
    constexpr int STEPS = HEAD_DIM / TILE_DEPTH, AT_ONCE = (TILE_ROWS + STEPS - 1) / STEPS;
    const Element* values = span.value(t) + head * HEAD_DIM;
    int64_t there = std::min<int64_t>(4 * TILE_ROWS, span.count - t), prefetched = 0;
    auto prefetch_values = [&] {
      for (int i = 0; i < AT_ONCE && prefetched < there; ++i, ++prefetched)
        prefetch<1>(values + prefetched * TOKEN, HEAD_DIM);
    };
    for (int k = 0; k < STEPS; ++k, keys += TILE_DEPTH) {
      constexpr int64_t stride = TOKEN * sizeof(Element);
      prefetch_values();
      _tile_loadd(6, queries[head][k], 64);
      _tile_loadd(4, keys, stride);
      _tile_dpbf16ps(0, 4, 6);
      prefetch_values();
      if (left > 1) {
        _tile_loadd(5, keys + TILE_ROWS * TOKEN, stride);
        _tile_dpbf16ps(1, 5, 6);
      }
      prefetch_values();
      if (left > 2) {
        _tile_loadd(4, keys + 2 * TILE_ROWS * TOKEN, stride);
        _tile_dpbf16ps(2, 4, 6);
      }
      prefetch_values();
      if (left > 3) {
        _tile_loadd(5, keys + 3 * TILE_ROWS * TOKEN, stride);
        _tile_dpbf16ps(3, 5, 6);
      }
    }
    _tile_stored(0, block[0], 64);
    _tile_stored(1, block[1], 64);
    _tile_stored(2, block[2], 64);
    _tile_stored(3, block[3], 64);
    for (int64_t i = 0; i < there; ++i)
      for (int g = 0; g < GROUP; ++g)
        scores[head * GROUP + g][t + i] = block[i / TILE_ROWS][i % TILE_ROWS][g] * scale;
  }

  // Weighted values of WIDTH elements of a head, from first on.
  void multiply_values(const Span& span, const Span* next, int head, int first, Partial& result) {
    int offset = head * HEAD_DIM + first;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t t = 0; t < span.count; t += TILE_DEPTH) {
      for (int part = 0; part < WIDTH / TILE_DEPTH; ++part)
        pair_values(span.value(t) + offset + part * TILE_DEPTH, span.count - t, &values[2 * part]);
      if (next)
        for (int64_t i = t; i < std::min(next->count, t + TILE_DEPTH); ++i)
          prefetch<1>(next->key(i) + offset, WIDTH);
      _tile_loadd(4, weights[0] + t, sizeof(weights[0]));
      _tile_loadd(6, values[0], 64);
      _tile_loadd(7, values[1], 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (WIDTH == TILE_DEPTH) continue;
      _tile_loadd(6, values[2], 64);
      _tile_loadd(7, values[3], 64);
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(3, 4, 7);
    }
    _tile_stored(0, block[0], 64);
    _tile_stored(1, block[1], 64);
    _tile_stored(2, block[2], 64);
    _tile_stored(3, block[3], 64);
    for (int g = 0; g < GROUP; ++g) {
      float* out = &result.values[head * GROUP + g][first];
      for (int part = 0; part < WIDTH / TILE_DEPTH; ++part, out += TILE_DEPTH)
        store_unpacked(load(block[2 * part][g]), load(block[2 * part + 1][g]), out);
    }
  }

  // Interleaves 32 tokens' values by pairs of tokens; 0 for tokens beyond count, whose memory may
  // hold NaN.
  static void pair_values(const Element* from, int64_t count, Pairs* pairs) {
    for (int pair = 0; pair < TILE_ROWS; ++pair, from += 2 * TOKEN) {
      __m512i even = {}, odd = {};
      if (2 * pair < count) even = _mm512_loadu_si512(from);
      if (2 * pair + 1 < count) odd = _mm512_loadu_si512(from + TOKEN);
      _mm512_store_si512(pairs[0][pair], _mm512_unpacklo_epi16(even, odd));
      _mm512_store_si512(pairs[1][pair], _mm512_unpackhi_epi16(even, odd));
    }
    compiler_barrier(pairs);
  }
};
