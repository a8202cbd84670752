// SPDX-License-Identifier: Apache-2.0
// Paged attention of a decode: one query per sequence, with the KV cache read in place.
//
// Before it, RoPE may be applied to the queries and the new keys, and the new keys and values
// stored.
//
// Compiled with HEAD_DIM, GROUP (query heads that share a KV head), KV_HEADS, BLOCK_SIZE, BF16 and
// BF16_PAIRS (use dot products of pairs of bf16 numbers) defined; see paged_decode.py. A sequence
// is split into spans of blocks, which the threads share, as in flash decoding. Each span gives a
// partial softmax (maximum, sum, weighted values); the thread that computes the last span of a
// sequence merges them.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "rope.h"

constexpr int HEADS = KV_HEADS * GROUP;
constexpr int SPAN = 4 * BLOCK_SIZE;  // tokens that one thread takes at a time
constexpr int64_t TOKEN = int64_t(KV_HEADS) * HEAD_DIM;  // elements of a token in either cache

typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

// Prefetches elements: blocks are scattered, which the hardware prefetcher cannot follow. LOCALITY:
// 3 for the L1 cache, less for L2 and L3.
template <int LOCALITY>
static inline void prefetch(const Element* from, int count) {
  constexpr int line = 64 / sizeof(Element);
  for (int i = 0; i < count; i += line) __builtin_prefetch(from + i, 0, LOCALITY);
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

// Some tokens of a sequence, from the start of a block on.
struct Span {
  const Element *keys, *values;  // the caches
  const int32_t* blocks;
  int64_t count;

  int64_t offset(int64_t t) const {
    return (int64_t(blocks[t / BLOCK_SIZE]) * BLOCK_SIZE + t % BLOCK_SIZE) * TOKEN;
  }
  const Element* key(int64_t t) const { return keys + offset(t); }
  const Element* value(int64_t t) const { return values + offset(t); }
};

struct Partial {
  float maximum[HEADS];
  float sum[HEADS];
  float values[HEADS][HEAD_DIM];
};

// The softmax of a span: scores to weights, in place; the row is padded to whole vectors.
static void softmax(float* row, int64_t count, int head, Partial& result) {
  // Mask the lanes of the last vector that are beyond the span.
  std::fill(row + count, row + (count + LANES - 1) / LANES * LANES, -INFINITY);
  Floats largest = load(row);
  for (int64_t t = LANES; t < count; t += LANES) {
    Floats part = load(row + t);
    largest = part > largest ? part : largest;
  }
  float maximum = largest[0];
  for (int i = 1; i < LANES; ++i) maximum = std::max(maximum, largest[i]);
  Floats sum = {};
  for (int64_t t = 0; t < count; t += LANES) {
    Floats part = exp_of_negative(load(row + t) - maximum);
    store(row + t, part);
    sum += part;
  }
  result.maximum[head] = maximum;
  result.sum[head] = sum_of(sum);
}

#if !BF16_PAIRS
#include "decode_simd.h"
#elif defined(__AMX_BF16__)
#include "decode_amx.h"
#else
#include "decode_avx512.h"
#endif

// Merges the partial softmaxes of a sequence's spans into its output.
static void merge(const Partial* partials, int64_t spans, int head, Element* out) {
  float maximum = -INFINITY, total = 0;
  for (int64_t s = 0; s < spans; ++s) maximum = std::max(maximum, partials[s].maximum[head]);
  Floats merged[HEAD_DIM / LANES] = {};
  for (int64_t s = 0; s < spans; ++s) {
    float share = exp_of_negative(partials[s].maximum[head] - maximum);
    total += share * partials[s].sum[head];
    for (int v = 0; v < HEAD_DIM / LANES; ++v) {
      Floats part;
      std::memcpy(&part, &partials[s].values[head][v * LANES], sizeof(part));
      merged[v] += share * part;
    }
  }
  for (int v = 0; v < HEAD_DIM / LANES; ++v) store(out + v * LANES, merged[v] / total);
}

// New tokens, whose queries and keys are not rotated yet and whose keys and values are not stored.
struct NewTokens {
  const Element *query, *keys, *values;           // contiguous heads
  int64_t query_token, keys_token, values_token;  // strides
  const int64_t *positions, *slots;               // rows of angles, or null; rows of the caches
  const float* angles;                            // (num_positions, HEAD_DIM / 2, 2)
  int64_t num_positions, num_slots;

  // Number of tokens with an invalid position or slot.
  int64_t count_invalid(int64_t tokens) const {
    int64_t count = 0;
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t row = angle_row(positions, i);
      count += row < 0 || row >= num_positions || slots[i] < 0 || slots[i] >= num_slots;
    }
    return count;
  }
  // Store a token's rotated query, and its rotated key and its value in the caches.
  void rotate_and_store(int64_t row, Element* rotated, Element* key_cache,
                        Element* value_cache) const {
    const float* angle = angles + angle_row(positions, row) * HEAD_DIM;
    rotate(query + row * query_token, rotated + row * HEADS * HEAD_DIM, angle, HEADS);
    rotate(keys + row * keys_token, key_cache + slots[row] * TOKEN, angle, KV_HEADS);
    std::memcpy(value_cache + slots[row] * TOKEN, values + row * values_token,
                TOKEN * sizeof(Element));
  }
};

// query and out: (rows, HEADS, HEAD_DIM); caches: (blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM); table:
// (rows, table_width), a sequence's blocks from the left; lengths: (rows,), tokens of each, 0 for a
// row of padding, which yields zeros. The other arguments are null and 0, or one new token for each
// row, the last of its sequence: see NewTokens. Returns the number of tokens with an invalid
// position or slot; if there are any, nothing is done.
extern "C" int64_t paged_decode(const Element* query, Element* key_cache, Element* value_cache,
                                Element* out, const int32_t* table, const int32_t* lengths,
                                int64_t rows, int64_t table_width, float scale, const Element* keys,
                                const Element* values, const int64_t* positions,
                                const int64_t* slots, const float* angles, int64_t query_token,
                                int64_t keys_token, int64_t values_token, int64_t num_positions,
                                int64_t num_slots) {
  NewTokens added{query,     keys,  values, query_token,   keys_token, values_token,
                  positions, slots, angles, num_positions, num_slots};
  std::unique_ptr<Element[]> rotated;
  if (keys) {
    if (int64_t invalid = added.count_invalid(rows)) return invalid;
    rotated.reset(new Element[rows * HEADS * HEAD_DIM]);
    query = rotated.get();
  }
  struct Piece : Span {
    int64_t row;
  };
  std::vector<Piece> pieces;
  std::vector<int64_t> first(rows + 1);
  for (int64_t row = 0; row < rows; ++row) {
    first[row] = pieces.size();
    for (int64_t start = 0; start < lengths[row]; start += SPAN)
      pieces.push_back({{key_cache, value_cache, table + row * table_width + start / BLOCK_SIZE,
                         std::min<int64_t>(SPAN, lengths[row] - start)},
                        row});
    if (lengths[row] == 0) std::fill_n(out + row * HEADS * HEAD_DIM, HEADS * HEAD_DIM, Element{});
  }
  int64_t count = first[rows] = pieces.size();
  std::unique_ptr<Partial[]> partials(new Partial[count]);
  std::unique_ptr<std::atomic<int64_t>[]> done(new std::atomic<int64_t>[rows]());
  std::atomic<int64_t> taken{0};
#pragma omp parallel
  {
    if (keys) {
#pragma omp for
      for (int64_t row = 0; row < rows; ++row)
        added.rotate_and_store(row, rotated.get(), key_cache, value_cache);
    }
    Attention attention;
    for (int64_t own = taken++, next; own < count; own = next) {
      next = taken++;
      int64_t row = pieces[own].row, spans = first[row + 1] - first[row];
      attention.attend(query + row * HEADS * HEAD_DIM, pieces[own],
                       next < count ? &pieces[next] : nullptr, scale, partials[own]);
      if (++done[row] < spans) continue;
      for (int head = 0; head < HEADS; ++head)
        merge(&partials[first[row]], spans, head, out + (row * HEADS + head) * HEAD_DIM);
    }
  }
  return 0;
}
