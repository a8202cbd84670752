// SPDX-License-Identifier: Apache-2.0
// Products of tiles by AMX, which has eight registers of 16 rows of 64 bytes. Included by tiles.h.
//
// Registers are constants in the program. Products here use 0 to 3 for a block of 2 x 2 results, 4
// and 5 for the rows of the left operand, 6 and 7 for the columns of the right one.

// Before tiles are loaded: what was stored to this memory is there. GCC 12's loads do not say what
// they read.
static inline void written(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

constexpr int64_t ROWS_AT_ONCE = 2 * TILE_ROWS;
constexpr int64_t FEW = 8;  // passes over weights that wait for the memory more than for products

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

// Between a register and 16 rows of 64 bytes that follow each other.
template <int REGISTER>
static inline void load_tile(const void* from) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
               : : "r"(from), "r"(int64_t{64}), "i"(REGISTER) : "memory");
}
// For what is not read again soon: it leaves more of the L1 cache to the rest.
template <int REGISTER>
static inline void stream_tile(const void* from) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2"
               : : "r"(from), "r"(int64_t{64}), "i"(REGISTER) : "memory");
}
template <int REGISTER>
static inline void store_tile(void* to) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
               : : "r"(to), "r"(int64_t{64}), "i"(REGISTER) : "memory");
}
template <int REGISTER>
static inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(REGISTER));
}

// Products of tiles. The unit keeps no second copy of its registers: sums stay there after their last
// product, and are stored one by one when the next products need their registers. Vector instructions
// that come after a run of products hardly overlap with it: what there is for them to do is done a
// little at a time between products, one next() for each at most.
class Products {
 public:
  // sums[j][i] is, or has added, left[k][i] times right[k][j] for all steps k: 2 of i, COLUMNS of j.
  template <int COLUMNS, typename Work>
  __attribute__((always_inline)) void multiply(int steps, const Operand (*left)[2],
                                               const Operand (*right)[2], Sums (*sums)[2],
                                               bool add, Work& work) {
    for (int k = 0; k < steps; ++k) {
      stream_tile<6>(right[k]);
      load_tile<4>(left[k]);
      if (k == 0) begin<0>(sums[0], add);
      _tile_dpbf16ps(0, 4, 6);
      load_tile<5>(left[k] + 1);
      work.next();
      if (k == 0) begin<1>(sums[0] + 1, add);
      _tile_dpbf16ps(1, 5, 6);
      if constexpr (COLUMNS == 2) {
        stream_tile<7>(right[k] + 1);
        work.next();
        if (k == 0) begin<2>(sums[1], add);
        _tile_dpbf16ps(2, 4, 7);
        work.next();
        if (k == 0) begin<3>(sums[1] + 1, add);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  // Store what is not stored yet.
  void finish() {
    take<0>();
    take<1>();
    take<2>();
    take<3>();
  }

 private:
  Sums* in_[4] = {};  // whose sums the registers hold

  template <int REGISTER>
  void take() {
    if (in_[REGISTER]) store_tile<REGISTER>(in_[REGISTER]);
    in_[REGISTER] = nullptr;
  }
  template <int REGISTER>
  __attribute__((always_inline)) void begin(Sums* sums, bool add) {
    take<REGISTER>();
    in_[REGISTER] = sums;
    if (add)
      load_tile<REGISTER>(sums);
    else
      clear_tile<REGISTER>();
  }
};
