// SPDX-License-Identifier: Apache-2.0
// The operands of blocked_attention, packed into tiles: queries, keys and values with heads of
// HEAD_DIM elements.

#ifndef ATTENTION_OPERANDS_H
#define ATTENTION_OPERANDS_H

#include <algorithm>

#include "tiles.h"

constexpr int DEPTH = (HEAD_DIM + TILE_DEPTH - 1) / TILE_DEPTH;  // tiles of a head, as an operand
constexpr int LAST_PAIRS = (HEAD_DIM - (DEPTH - 1) * TILE_DEPTH) / 2;  // in the last of them
constexpr int WIDTH = (HEAD_DIM + TILE_ROWS - 1) / TILE_ROWS;    // tiles of a head, as a result
constexpr int ROWS = 2 * TILE_ROWS;        // queries that are multiplied at a time
constexpr int BLOCK = 2 * TILE_DEPTH;      // keys whose softmax is computed at a time
constexpr int PAIRS = BLOCK / TILE_DEPTH;  // pairs of key tiles: a tile of weights covers two
constexpr int SPAN = 768;                  // keys that are packed at a time
constexpr int RUN = 1024;                  // queries that share the packed keys
constexpr int AHEAD = 32;                  // keys between a prefetch and its use
static_assert(HEAD_DIM % 2 == 0);

// A thread's memory. Tiles are in the order of their use: two consecutive ones are adjacent.
struct Scratch {
  Operand query[RUN / ROWS][DEPTH][2];
  Operand keys[SPAN / TILE_DEPTH][DEPTH][2];
  Operand values[SPAN / BLOCK][(WIDTH + 1) / 2][PAIRS][2];
  Sums scores[2][PAIRS][2][2];  // of two blocks; by keys, then by queries
  Operand weights[2][PAIRS][2];
  Sums accumulated[RUN / ROWS][WIDTH][2];  // weighted values
  alignas(64) float weight_sums[RUN][LANES];
  float maxima[RUN], corrections[ROWS];
};

static inline uint32_t first_bits(int64_t count) {
  return count <= 0 ? 0 : count < 32 ? (1u << count) - 1 : ~0u;
}

// The arguments of blocked_attention.
struct AttentionProblem {
  const Element *query, *keys, *values;
  Element* out;
  const int32_t *blocks, *segments;
  const float* angles;
  int64_t block_size, tokens, num_keys, kv_heads, group;
  int64_t query_batch, query_token, keys_batch, keys_token, values_batch, values_token;  // strides
  float scale;

  // The problem of one member of the batch, or of one segment.
  AttentionProblem member(int64_t index) const {
    AttentionProblem one = *this;
    int64_t first = index * tokens;
    if (segments) {
      first = segments[index];
      one.tokens = one.num_keys = segments[index + 1] - first;
      if (angles) one.angles += first * HEAD_DIM;
    }
    one.query += segments ? first * query_token : index * query_batch;
    one.keys += segments ? first * keys_token : index * keys_batch;
    one.values += segments ? first * values_token : index * values_batch;
    one.out += first * kv_heads * group * HEAD_DIM;
    return one;
  }
  const float* angles_of(int64_t token) const {
    return angles ? angles + token * HEAD_DIM : nullptr;
  }
  // Number of keys that a query row attends to: row r is query head r % group of token r / group.
  int64_t keys_seen(int64_t row) const {
    return blocks ? num_keys - tokens + row / group + 1 : num_keys;
  }
  // Row numbers of the keys [first, first + count): in the paged cache, or among the batch's keys.
  void rows_of_keys(int64_t first, int64_t count, int64_t* rows) const {
    int64_t block = blocks ? first / block_size : 0, inside = blocks ? first % block_size : first;
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = (blocks ? blocks[block] * block_size : 0) + inside;
      if (++inside == block_size && blocks) inside = 0, ++block;
    }
  }
};

// Prefetches a row of a head: the stride of a token is too large for the hardware prefetcher.
template <int WRITTEN = 0>
static inline void prefetch(const Element* row) {
  for (int i = 0; i < HEAD_DIM; i += 64 / sizeof(Element)) __builtin_prefetch(row + i, WRITTEN);
  __builtin_prefetch(row + HEAD_DIM - 1, WRITTEN);
}
// Rotates 16 neighbouring pairs. Angles are the cosine and the sine of each; only those held are
// read.
static inline __m512i rotate(__m512i pairs, const float* angles, uint32_t held) {
  auto of_pairs = [](int first) {  // indices of every second number of two vectors
    __m512i index = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_add_epi32(index, _mm512_set1_epi32(first));
  };
  __m512 low = _mm512_maskz_loadu_ps(held, angles);
  __m512 high = _mm512_maskz_loadu_ps(held >> LANES, angles + LANES);
  __m512 cosines = _mm512_permutex2var_ps(low, of_pairs(0), high);
  __m512 sines = _mm512_permutex2var_ps(low, of_pairs(1), high);
  __m512 a = (__m512)_mm512_slli_epi32(pairs, 16);
  __m512 b = (__m512)_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000));
  __m512i rotated =
      round_to_bf16(_mm512_fmadd_ps(b, cosines, _mm512_mul_ps(a, sines)),
                    _mm512_fmsub_ps(a, cosines, _mm512_mul_ps(b, sines)));
  __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  index = _mm512_or_si512(index, _mm512_slli_epi32(_mm512_add_epi32(index, _mm512_set1_epi32(16)),
                                                   16));
  return _mm512_permutexvar_epi16(index, rotated);  // the pairs side by side again
}
// The part of a row in tile d of an operand, padded with zeros; zeros for a null row. With angles
// (of the row's token) it is rotated.
static inline __m512i load_part(const Element* row, const float* angles, int d) {
  uint32_t held = row ? first_bits(HEAD_DIM - d * TILE_DEPTH) : 0;
  __m512i part = _mm512_maskz_loadu_epi16(held, row + d * TILE_DEPTH);
  return angles && row ? rotate(part, angles + d * TILE_DEPTH, held) : part;
}

// Packs the keys [first, first + count) and their values as right operands, padded with zeros to a
// pair of tiles.
static void pack_keys_values(const AttentionProblem& of, int64_t head, int64_t first,
                             int64_t count, Scratch& to) {
  const Element *keys = of.keys + head * HEAD_DIM, *values = of.values + head * HEAD_DIM;
  int64_t rows[SPAN];
  of.rows_of_keys(first, count, rows);
  for (int64_t n = 0; n < count; n += TILE_DEPTH) {
    const Element *key[TILE_DEPTH] = {}, *value[TILE_DEPTH] = {};
    for (int i = 0; i < TILE_DEPTH && n + i < count; ++i) {
      key[i] = keys + rows[n + i] * of.keys_token;
      value[i] = values + rows[n + i] * of.values_token;
      if (n + i + AHEAD < count) {
        prefetch(keys + rows[n + i + AHEAD] * of.keys_token);
        prefetch(values + rows[n + i + AHEAD] * of.values_token);
      }
    }
    for (int d = 0; d < DEPTH; ++d)
      for (int half = 0; half < 2; ++half) {
        Bits pairs[LANES];
        for (int i = 0; i < LANES; ++i) {
          int own = half * LANES + i;
          pairs[i] = (Bits)load_part(key[own], of.angles_of(first + n + own), d);
        }
        transpose(pairs);
        for (int i = 0; i < LANES; ++i) store(to.keys[n / TILE_DEPTH][d][half].rows[i], pairs[i]);
      }
    for (int w = 0; w < WIDTH; ++w) {
      __mmask16 held = first_bits(HEAD_DIM - w * LANES);
      auto part = [&](int i) {
        return _mm512_cvtepu16_epi32(
            _mm256_maskz_loadu_epi16(value[i] ? held : 0, value[i] + w * LANES));
      };
      Operand& tile = to.values[n / BLOCK][w / 2][n % BLOCK / TILE_DEPTH][w % 2];
      for (int i = 0; i < TILE_ROWS; ++i) {
        int pair = 8 * (i / 2 % 2) + i / 4 * 2 + i % 2;  // in the order of the weights
        store(tile.rows[i],
              _mm512_or_si512(part(2 * pair), _mm512_slli_epi32(part(2 * pair + 1), 16)));
      }
    }
  }
}

#endif
