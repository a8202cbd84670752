// SPDX-License-Identifier: Apache-2.0
// Attention of one query to a span of tokens, a token at a time. Included by paged_decode.cpp.

constexpr int AHEAD = 8;  // tokens between a prefetch and its use
constexpr int VECTORS = HEAD_DIM / LANES;
// Vectors of a head that are accumulated at once: GROUP times as many stay in registers.
constexpr int VECTORS_AT_ONCE = VECTORS % 4 == 0 && GROUP <= 4 ? 4 : 1;

class Attention {
 public:
  // query: (HEADS, HEAD_DIM). The next span is not prefetched.
  void attend(const Element* query, const Span& span, const Span*, float scale, Partial& result) {
    for (int head = 0; head < KV_HEADS; ++head) {
      multiply_keys(query + head * GROUP * HEAD_DIM, span, head, scale);
      for (int g = 0; g < GROUP; ++g) softmax(weights[g], span.count, head * GROUP + g, result);
      multiply_values(span, head, result);
    }
  }

 private:
  alignas(64) float weights[GROUP][SPAN];

  void multiply_keys(const Element* query, const Span& span, int head, float scale) {
    Floats queries[GROUP][VECTORS];
    for (int g = 0; g < GROUP; ++g)
      for (int v = 0; v < VECTORS; ++v)
        queries[g][v] = load(query + g * HEAD_DIM + v * LANES) * scale;
    for (int64_t t = 0; t < span.count; ++t) {
      const Element* key = span.key(t) + head * HEAD_DIM;
      prefetch<3>(key + AHEAD * TOKEN, HEAD_DIM);
      Floats dots[GROUP] = {};
      for (int v = 0; v < VECTORS; ++v) {
        Floats part = load(key + v * LANES);
        for (int g = 0; g < GROUP; ++g) dots[g] += queries[g][v] * part;
      }
      for (int g = 0; g < GROUP; ++g) weights[g][t] = sum_of(dots[g]);
    }
  }

  void multiply_values(const Span& span, int head, Partial& result) {
    for (int first = 0; first < VECTORS; first += VECTORS_AT_ONCE) {
      Floats sums[GROUP][VECTORS_AT_ONCE] = {};
      for (int64_t t = 0; t < span.count; ++t) {
        const Element* value = span.value(t) + head * HEAD_DIM + first * LANES;
        if (first == 0) prefetch<3>(value + AHEAD * TOKEN, HEAD_DIM);
        for (int v = 0; v < VECTORS_AT_ONCE; ++v) {
          Floats part = load(value + v * LANES);
          for (int g = 0; g < GROUP; ++g) sums[g][v] += weights[g][t] * part;
        }
      }
      for (int g = 0; g < GROUP; ++g)
        std::memcpy(&result.values[head * GROUP + g][first * LANES], sums[g], sizeof(sums[g]));
    }
  }
};
