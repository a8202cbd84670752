// SPDX-License-Identifier: Apache-2.0
// Products of tiles by AMX, which has eight registers of 16 rows of 64 bytes. Included by tiles.h.
//
// Instructions encode register numbers as constants. Products here use 0 to 3 as accumulators of a
// block of 2 x 2 results, 4 and 5 for the left operand, 6 and 7 for the right one.

// A compiler barrier between stores to memory and tile loads from it: GCC 12's tile loads do not
// declare the memory that they read.
static inline void compiler_barrier(const void* memory) {
  asm volatile("" : : "r"(memory) : "memory");
}

constexpr int64_t ROWS_AT_ONCE = 2 * TILE_ROWS;
constexpr int64_t FEW = 8;  // passes over weights up to which memory is the bottleneck

// Configures this thread's tile registers, all as 16 rows of 64 bytes, during its lifetime. PyTorch
// has requested them from the operating system (torch.cpu._init_amx).
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
    compiler_barrier(&shape);
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Loads and stores of 16 contiguous rows of 64 bytes.
template <int REGISTER>
static inline void load_tile(const void* from) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
               : : "r"(from), "r"(int64_t{64}), "i"(REGISTER) : "memory");
}
// A non-temporal load, for tiles that are not read again soon: it spares the L1 cache.
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

// Products of tiles. AMX does not rename its registers: sums stay there after their last product,
// and are stored one by one when the next products need their registers. Vector instructions after
// a run of products hardly overlap with it: vector work is interleaved with the products instead,
// at most one work.next() for each.
class Products {
 public:
  // sums[j][i] = or += the sum over steps k of left[k][i] times right[k][j], for 2 rows i and
  // COLUMNS columns j. The last step has LAST pairs, and zeros: AMX takes whole tiles.
  template <int COLUMNS, int LAST = TILE_ROWS, typename Work>
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
  // Store the sums that are still in registers.
  void finish() {
    take<0>();
    take<1>();
    take<2>();
    take<3>();
  }

 private:
  Sums* in_[4] = {};  // destinations of the sums in the registers

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
