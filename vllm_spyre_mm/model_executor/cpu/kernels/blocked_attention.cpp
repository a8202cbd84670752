// SPDX-License-Identifier: Apache-2.0
// Flash attention of many bf16 queries.
//
// Compiled with HEAD_DIM defined; see blocked_attention.py. A task is a run of query rows that
// share a KV head. It packs SPAN keys and values at a time into tiles, and goes through its rows
// ROWS at a time and their keys BLOCK at a time: scores, weights and sums of that size stay in the
// L1 cache. The softmax is an online softmax with a maximum and a sum of each row, in fp32.

#include <cmath>
#include <memory>
#include <vector>

#include <omp.h>

#include "attention_operands.h"

constexpr float TOO_MUCH = 65536.0f;  // a larger sum of weights requires a new maximum

// 2^x for x < 127, with a relative error of 8e-5: rounding to bf16 loses twenty times as much.
static inline __m512 exp2_of(__m512 x) {
  __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
  __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(7.802452e-2f), _mm512_set1_ps(2.2606716e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9583354e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.9992522e-1f));
  return _mm512_scalef_ps(p, x);
}

// 2^(x / 256) of 32 numbers, as bf16, with a mean error of 0.25 %, of which rounding alone is 0.17
// %. The lower 8 bits of x are a fraction f, and 2^f is approximated by 1 + f - 0.33 f (1 - f).
// Results below 2^-127 are 0; far above 2^127, and for NaN, infinite. The results are groups of
// four from a and from b in turn.
static inline __m512i exp2_of_256ths(__m512 a, __m512 b) {
  constexpr int ONE = 256, BIAS = 127 * ONE, CURVE = 42;  // of 0.33 in 128ths
  __m512 most = _mm512_set1_ps(BIAS + ONE);
  __m512i x = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_min_ps(a, most)),
                                 _mm512_cvtps_epi32(_mm512_min_ps(b, most)));
  x = _mm512_max_epi16(x, _mm512_set1_epi16(-BIAS));
  __m512i f = _mm512_and_si512(x, _mm512_set1_epi16(ONE - 1));
  __m512i parabola = _mm512_mullo_epi16(f, _mm512_sub_epi16(_mm512_set1_epi16(ONE), f));
  x = _mm512_sub_epi16(x, _mm512_mulhrs_epi16(parabola, _mm512_set1_epi16(CURVE)));
  return _mm512_srli_epi16(_mm512_add_epi16(x, _mm512_set1_epi16(BIAS + 1)), 1);
}

// Online softmax: turns a block of scores, of COUNT pairs of key tiles, into weights. They are
// relative to the maximum of the row's first block, until a score comes that is far greater.
template <int COUNT>
struct Softmax {
  Scratch& s;
  int turn;     // index of the buffers of scores and of weights, of two each
  int64_t row;  // of the run, the first of ROWS
  float scale;  // of scores, to powers of 2
  int weighed = 0;
  uint32_t raised = 0;

  float* scores(int r, int column) const {
    return s.scores[turn][column / 2][column % 2][r / TILE_ROWS].rows[r % TILE_ROWS];
  }
  // Mask the keys that the row does not attend to.
  void mask(int r, int64_t seen) {
    for (int column = 0; column < 2 * COUNT; ++column)
      _mm512_mask_store_ps(scores(r, column), ~first_bits(seen - column * LANES),
                           _mm512_set1_ps(-INFINITY));
  }
  // Raise the row's maximum to its greatest score so far; earlier sums shrink by s.corrections[r].
  void raise_maximum(int r) {
    float &maximum = s.maxima[row + r], *sums = s.weight_sums[row + r];
    __m512 most = _mm512_set1_ps(maximum);
    for (int column = 0; column < 2 * COUNT; ++column)
      most = _mm512_max_ps(most, _mm512_load_ps(scores(r, column)));
    float top = _mm512_reduce_max_ps(most);
    s.corrections[r] = _mm512_cvtss_f32(exp2_of(_mm512_set1_ps((maximum - top) * scale)));
    store(sums, load(sums) * s.corrections[r]);
    maximum = top;
    raised |= 1u << r;
  }
  // Compute the weights of a row from its maximum; return their sums by lane.
  __m512 weigh(int r) {
    __m512 by = _mm512_set1_ps(256 * scale);
    __m512 top = _mm512_set1_ps(256 * scale * s.maxima[row + r]);
    __m512 sums = _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int p = 0; p < COUNT; ++p) {
      __m512i weights =
          exp2_of_256ths(_mm512_fmsub_ps(_mm512_load_ps(scores(r, 2 * p)), by, top),
                         _mm512_fmsub_ps(_mm512_load_ps(scores(r, 2 * p + 1)), by, top));
      store(s.weights[turn][p][r / TILE_ROWS].rows[r % TILE_ROWS], weights);
      // Sums of the rounded weights: errors cancel where few keys have most of the weight.
      sums = dot_pairs(sums, weights, _mm512_set1_epi16(BF16_ONE));
    }
    return sums;
  }
  // Process the next row that is not processed yet, if there is one.
  void next() {
    if (weighed == ROWS) return;
    int r = weighed++;
    auto too_much = [](__m512 sums) {
      return _mm512_cmp_ps_mask(sums, _mm512_set1_ps(TOO_MUCH), _CMP_GT_OQ) != 0;
    };
    __m512 sums = weigh(r);
    if (too_much(sums)) [[unlikely]] {
      raise_maximum(r);
      sums = weigh(r);
      if (too_much(sums)) sums = _mm512_set1_ps(NAN);  // a score is NaN or infinite
    }
    float* before = s.weight_sums[row + r];
    _mm512_store_ps(before, _mm512_add_ps(_mm512_load_ps(before), sums));
  }
  void rest() {
    while (weighed < ROWS) next();
  }
};

// A run: the query rows [first, last) of one KV head.
struct Run {
  const AttentionProblem of;
  Scratch& s;
  int64_t head, first, last;

  // Calls visit(row of the block, token, offset of its head) for the rows [from, to) of a block.
  template <typename Visit>
  void each_row(int64_t block, Visit visit, int from = 0, int to = ROWS) const {
    int64_t start = first + block * ROWS, row = start + from;
    int64_t token = row / of.group, member = row % of.group;
    for (int r = from; r < std::min<int64_t>(to, last - start); ++r) {
      visit(r, token, (head * of.group + member) * HEAD_DIM);
      if (++member == of.group) member = 0, ++token;
    }
  }
  void load_queries(int64_t block) const {
    each_row(block, [&](int r, int64_t token, int64_t offset) {
      const Element* row = of.query + token * of.query_token + offset;
      for (int d = 0; d < DEPTH; ++d)
        store(s.query[block][d][r / TILE_ROWS].rows[r % TILE_ROWS],
              load_part(row, of.angles_of(token), d));
    });
  }
  Element* result(int64_t token, int64_t offset) const {
    return of.out + token * of.kv_heads * of.group * HEAD_DIM + offset;
  }
  void store_results(int64_t block) const {
    each_row(block, [&](int r, int64_t token, int64_t offset) {
      Element* out = result(token, offset);
      __m512 sums = _mm512_load_ps(s.weight_sums[block * ROWS + r]);
      __m512 factor = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sums));
      for (int w = 0; w < WIDTH; ++w) {
        __m512 part = _mm512_load_ps(s.accumulated[block][w][r / TILE_ROWS].rows[r % TILE_ROWS]);
        __m512i rounded = round_to_bf16(part, _mm512_mul_ps(part, factor));
        _mm256_mask_storeu_epi16(out + w * LANES, first_bits(HEAD_DIM - w * LANES),
                                 _mm512_castsi512_si256(rounded));
      }
    });
  }
  // Multiply the accumulated values of some rows by their corrections.
  void rescale(int64_t block, uint32_t rows) const {
    for (int r = 0; r < ROWS; ++r)
      if (rows >> r & 1)
        for (int w = 0; w < WIDTH; ++w) {
          float* part = s.accumulated[block][w][r / TILE_ROWS].rows[r % TILE_ROWS];
          store(part, load(part) * s.corrections[r]);
        }
  }
  // Prefetch rows of out for writing: their stride is too large for the hardware prefetcher.
  void prefetch_results(int64_t block, int from, int to) const {
    auto fetch = [&](int, int64_t token, int64_t offset) { prefetch<1>(result(token, offset)); };
    each_row(block, fetch, from, to);
  }
  template <typename Work>
  void score(Products& products, int64_t block, int64_t key, int pairs, Work& work) const {
    for (int p = 0; p < pairs; ++p)
      products.multiply<2, LAST_PAIRS>(DEPTH, s.query[block], s.keys[key / TILE_DEPTH + p],
                                       s.scores[key / BLOCK % 2][p], false, work);
  }
  template <typename Work>
  void accumulate(Products& products, int64_t block, int64_t key, int pairs, bool add,
                  Work& work) const {
    const auto* weights = s.weights[key / BLOCK % 2];
    const auto* values = s.values[key / BLOCK];
    Sums(*accumulated)[2] = s.accumulated[block];
    for (int w = 0; w < WIDTH / 2; ++w)
      products.multiply<2>(pairs, weights, values[w], accumulated + 2 * w, add, work);
    if constexpr (WIDTH % 2)
      products.multiply<1>(pairs, weights, values[WIDTH / 2], accumulated + WIDTH - 1, add, work);
  }
  // The softmax of a step's scores, interleaved with the products of the next step's scores and of
  // the previous step's values.
  template <int COUNT>
  void weigh(Products& products, int64_t block, int64_t start, int64_t step, int next_pairs) const {
    constexpr float log2_e = 1.44269504f;
    int64_t row = first + block * ROWS, key = step * BLOCK;
    products.finish();
    Softmax<COUNT> softmax{s, int(step % 2), block * ROWS, of.scale * log2_e};
    if (start + key + BLOCK > of.keys_seen(row))
      for (int r = 0; r < ROWS; ++r) softmax.mask(r, of.keys_seen(row + r) - start - key);
    bool fresh = start + key == 0;
    if (fresh)
      for (int r = 0; r < ROWS; ++r) softmax.raise_maximum(r);
    score(products, block, key + BLOCK, next_pairs, softmax);
    if (step > 0) accumulate(products, block, key - BLOCK, PAIRS, start + key > BLOCK, softmax);
    softmax.rest();
    if (softmax.raised && !fresh) {
      products.finish();
      rescale(block, softmax.raised);
    }
  }
  // Attention of a block of rows to the keys [start, start + seen).
  void attend_block(int64_t block, int64_t start, int64_t seen, bool last_keys) const {
    int64_t steps = divide_up(seen, BLOCK);
    auto pairs = [&](int64_t key) {
      return int(std::clamp<int64_t>(divide_up(seen - key, TILE_DEPTH), 0, PAIRS));
    };
    Products products;
    NoWork none;
    score(products, block, 0, pairs(0), none);
    for (int64_t step = 0; step < steps; ++step) {
      if (last_keys) prefetch_results(block, ROWS * step / steps, ROWS * (step + 1) / steps);
      if (pairs(step * BLOCK) == PAIRS)
        weigh<PAIRS>(products, block, start, step, pairs((step + 1) * BLOCK));
      else
        weigh<1>(products, block, start, step, 0);
    }
    int64_t key = (steps - 1) * BLOCK;
    accumulate(products, block, key, pairs(key), start + key > 0, none);
    products.finish();
  }
  void attend() const {
    int64_t blocks = divide_up(last - first, ROWS), end = of.keys_seen(last - 1);
    std::fill_n(s.weight_sums[0], blocks * ROWS * LANES, 0.0f);
    std::fill_n(s.maxima, blocks * ROWS, -INFINITY);
    load_queries(0);
    for (int64_t start = 0; start < end; start += SPAN) {
      pack_keys_values(of, head, start, std::min<int64_t>(SPAN, end - start), s);
      for (int64_t block = 0; block < blocks; ++block) {
        if (start == 0 && block + 1 < blocks) load_queries(block + 1);
        int64_t seen = of.keys_seen(std::min(last, first + (block + 1) * ROWS) - 1) - start;
        if (seen <= 0) continue;
        attend_block(block, start, std::min<int64_t>(SPAN, seen), seen <= SPAN);
        if (seen <= SPAN) store_results(block);
      }
    }
  }
};

// Query rows of a KV head, of one member of the batch or one segment.
struct Task {
  int64_t member, head, first, last;
};

// At least two runs for each thread, of at most RUN rows.
static std::vector<Task> cut_into_runs(const AttentionProblem& of, int64_t members) {
  int64_t wanted = divide_up(2 * omp_get_max_threads(), members * of.kv_heads);
  std::vector<Task> tasks;
  for (int64_t member = 0; member < members; ++member) {
    int64_t rows = of.member(member).tokens * of.group;
    int64_t run = std::min<int64_t>(divide_up(divide_up(rows, wanted), ROWS) * ROWS, RUN);
    // The last tokens of a prompt attend to the most keys: they come first.
    for (int64_t last = rows; last > 0;) {
      int64_t first = (last - 1) / run * run;
      for (int64_t head = 0; head < of.kv_heads; ++head)
        tasks.push_back({member, head, first, last});
      last = first;
    }
  }
  return tasks;
}

// query: (batch, tokens, kv_heads * group, HEAD_DIM), contiguous heads; out: the same, contiguous.
// keys and values: (batch, num_keys, kv_heads, HEAD_DIM), contiguous heads. With blocks (of one
// sequence) they are a paged cache, (blocks, block_size, kv_heads, HEAD_DIM), contiguous; then the
// queries are the sequence's last tokens and attention is causal. With segments, which are the
// bounds of `batch` segments, all tokens are in one row, and attention is within a segment. With
// angles, (tokens, HEAD_DIM) of segments, queries and keys are rotated first.
extern "C" void blocked_attention(const Element* query, const Element* keys, const Element* values,
                                  Element* out, const int32_t* blocks, const int32_t* segments,
                                  const float* angles, int64_t block_size, int64_t batch,
                                  int64_t tokens, int64_t num_keys, int64_t kv_heads,
                                  int64_t group, int64_t query_batch, int64_t query_token,
                                  int64_t keys_batch, int64_t keys_token, int64_t values_batch,
                                  int64_t values_token, float scale) {
  AttentionProblem of{query,        keys,        values,     out,        blocks,
                      segments,     angles,      block_size, tokens,     num_keys,
                      kv_heads,     group,       query_batch, query_token, keys_batch,
                      keys_token,   values_batch, values_token, scale};
  const std::vector<Task> tasks = cut_into_runs(of, batch);
  // Adjacent heads share cache lines: without a paged cache, where all runs take the same time,
  // each thread processes a contiguous stretch of runs.
  int64_t runs = tasks.size(), stretches = blocks ? 1 : omp_get_max_threads();
  int64_t stretch = divide_up(runs, stretches);
#pragma omp parallel
  {
    thread_local std::unique_ptr<Scratch> scratch(new Scratch());
    Tiles tiles;
#pragma omp for schedule(dynamic)
    for (int64_t turn = 0; turn < stretches * stretch; ++turn) {
      int64_t i = turn % stretches * stretch + turn / stretches;
      if (i >= runs) continue;
      const Task& task = tasks[i];
      Run{of.member(task.member), *scratch, task.head, task.first, task.last}.attend();
    }
  }
}
