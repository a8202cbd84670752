// SPDX-License-Identifier: Apache-2.0
// AMX's tiles in plain C++, so that the kernels for it are tested on CPUs without it.

#include <cstdint>
#include <cstring>

#include <immintrin.h>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

namespace emulated {

struct Tile {
  uint8_t rows[16][64];
};
inline thread_local Tile tiles[8];

inline void configure(const void* shape) {
  const uint8_t* bytes = (const uint8_t*)shape;
  if (bytes[0] != 1) __builtin_trap();  // the palette
  for (int t = 0; t < 8; ++t) {
    uint16_t width;
    std::memcpy(&width, bytes + 16 + 2 * t, sizeof(width));
    if (width != 64 || bytes[48 + t] != 16) __builtin_trap();
    std::memset(&tiles[t], 0, sizeof(Tile));
  }
}
inline void zero(int t) { std::memset(&tiles[t], 0, sizeof(Tile)); }
inline void load(int t, const void* from, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(tiles[t].rows[r], (const char*)from + r * stride, 64);
}
inline void store(int t, void* to, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy((char*)to + r * stride, tiles[t].rows[r], 64);
}
inline float widen(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}
// sums += left * right: 16 rows of 16 pairs, and 16 pairs of 16 columns.
inline void multiply(int sums, int left, int right) {
  float total[16][16];
  uint16_t a[16][32], b[16][32];
  std::memcpy(total, &tiles[sums], sizeof(total));
  std::memcpy(a, &tiles[left], sizeof(a));
  std::memcpy(b, &tiles[right], sizeof(b));
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n)
        for (int part = 0; part < 2; ++part)
          total[m][n] += widen(a[m][2 * k + part]) * widen(b[k][2 * n + part]);
  std::memcpy(&tiles[sums], total, sizeof(total));
}

}  // namespace emulated

#define _tile_loadconfig(shape) emulated::configure(shape)
#define _tile_release() ((void)0)
#define _tile_zero(t) emulated::zero(t)
#define _tile_loadd(t, from, stride) emulated::load(t, from, stride)
#define _tile_stream_loadd(t, from, stride) emulated::load(t, from, stride)
#define _tile_stored(t, to, stride) emulated::store(t, to, stride)
#define _tile_dpbf16ps(sums, left, right) emulated::multiply(sums, left, right)
