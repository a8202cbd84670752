// SPDX-License-Identifier: Apache-2.0
// AMX: eight registers of 16 rows of 64 bytes, and products of bf16 that are summed in fp32.
//
// Registers are constants in the program. Products here use 0 to 3 for a block of 2 x 2 results, 4
// and 5 for the rows of the left operand, 6 and 7 for the columns of the right one, whose numbers
// lie in pairs: (pair of k, column, 2).

#include <cstdint>

#include <immintrin.h>

constexpr int TILE_ROWS = 16;
constexpr int TILE_DEPTH = 32;  // bf16 numbers of a row

// Before tiles are loaded: what was stored to this memory is there. GCC 12's loads do not say what
// they read.
static inline void written(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

// The registers of this thread, all of 16 rows of 64 bytes, while it lives. PyTorch has asked the
// operating system for them (torch.cpu._init_amx).
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) {
      shape.bytes_per_row[i] = 64;
      shape.rows[i] = TILE_ROWS;
    }
    written(&shape);
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};
