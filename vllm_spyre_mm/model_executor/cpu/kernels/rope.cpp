// SPDX-License-Identifier: Apache-2.0
// Interleaved RoPE (of neighbouring pairs) of queries and keys.
//
// Compiled with HEAD_DIM and BF16 defined; see rope.py.

#include "rope.h"

// query and keys: (tokens, heads, HEAD_DIM), contiguous heads; out: the same, contiguous. table:
// (num_positions, HEAD_DIM / 2, 2), cos and sin. Tokens whose position is not in the table are
// skipped; their number is returned. Without positions the table has a row for each token.
extern "C" int64_t rope(const Element* query, const Element* keys, Element* query_out,
                        Element* keys_out, const int64_t* positions, const float* table,
                        int64_t tokens, int64_t heads, int64_t kv_heads, int64_t query_token,
                        int64_t keys_token, int64_t num_positions) {
  int64_t beyond = 0;
#pragma omp parallel for reduction(+ : beyond) if (tokens * heads > 64)
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t row = angle_row(positions, token);
    if (row < 0 || row >= num_positions) {
      ++beyond;
      continue;
    }
    const float* angle = table + row * HEAD_DIM;
    rotate(query + token * query_token, query_out + token * heads * HEAD_DIM, angle, heads);
    rotate(keys + token * keys_token, keys_out + token * kv_heads * HEAD_DIM, angle, kv_heads);
  }
  return beyond;
}
