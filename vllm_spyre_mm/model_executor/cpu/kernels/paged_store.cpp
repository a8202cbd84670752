// SPDX-License-Identifier: Apache-2.0
// Writes keys and values of tokens to their rows of a paged cache.
//
// Compiled with BYTES, of one token in either cache, defined; see paged_store.py.

#include <cstdint>
#include <cstring>

// keys and values: tokens, so many bytes apart; the caches: (num_slots, BYTES). A slot that there is
// not is left alone; the number of such is returned.
extern "C" int64_t paged_store(const char* keys, const char* values, char* key_cache,
                               char* value_cache, const int64_t* slots, int64_t tokens,
                               int64_t key_stride, int64_t value_stride, int64_t num_slots) {
  int64_t beyond = 0;
#pragma omp parallel for reduction(+ : beyond) if (tokens > 64)
  for (int64_t token = 0; token < tokens; ++token) {
    int64_t slot = slots[token];
    if (slot < 0 || slot >= num_slots) {
      ++beyond;
      continue;
    }
    std::memcpy(key_cache + slot * BYTES, keys + token * key_stride, BYTES);
    std::memcpy(value_cache + slot * BYTES, values + token * value_stride, BYTES);
  }
  return beyond;
}
