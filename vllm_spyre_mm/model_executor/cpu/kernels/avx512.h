// SPDX-License-Identifier: Apache-2.0
// Products of tiles by AVX-512, with the interface of amx.h. Included by tiles.h.

// Nothing to configure, and no barrier is needed.
struct Tiles {
  Tiles() {}
};
static inline void compiler_barrier(const void*) {}

constexpr int64_t FEW = 1;  // passes over weights up to which memory is the bottleneck
constexpr int64_t ROWS_AT_ONCE = 8;  // times two vectors of columns: sums that stay in registers

// sums[r][j] += row r of the left tile times the columns of right tile j, as far as the first HELD
// pairs of both. The tiles of the right operand are contiguous.
template <int HELD = TILE_ROWS, int ROWS, int COLUMNS>
__attribute__((always_inline)) static inline void multiply_tile(__m512 (&sums)[ROWS][COLUMNS],
                                                                const Element* left,
                                                                const Element* right) {
#pragma GCC unroll 4
  for (int pair = 0; pair < HELD; ++pair) {
    __m512i columns[COLUMNS];
#pragma GCC unroll 2
    for (int j = 0; j < COLUMNS; ++j)
      columns[j] = _mm512_load_si512(right + j * TILE + pair * TILE_DEPTH);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      int32_t both;
      std::memcpy(&both, left + r * TILE_DEPTH + 2 * pair, sizeof(both));
      __m512i row = _mm512_set1_epi32(both);
#pragma GCC unroll 2
      for (int j = 0; j < COLUMNS; ++j) sums[r][j] = dot_pairs(sums[r][j], row, columns[j]);
    }
  }
}

class Products {
 public:
  // sums[j][i] = or += the sum over steps k of left[k][i] times right[k][j], for 2 rows i and
  // COLUMNS columns j. The last step has LAST pairs, and zeros.
  template <int COLUMNS, int LAST = TILE_ROWS, typename Work>
  void multiply(int steps, const Operand (*left)[2], const Operand (*right)[2], Sums (*sums)[2],
                bool add, Work& work) {
    for (int row = 0; row < 2 * TILE_ROWS; row += ROWS_AT_ONCE) {
      int i = row / TILE_ROWS, first = row % TILE_ROWS;
      __m512 block[ROWS_AT_ONCE][COLUMNS];
#pragma GCC unroll 8
      for (int r = 0; r < ROWS_AT_ONCE; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < COLUMNS; ++j)
          block[r][j] = add ? _mm512_load_ps(sums[j][i].rows[first + r]) : _mm512_setzero_ps();
      for (int k = 0; k < steps - 1; ++k)
        multiply_tile(block, left[k][i].rows[first], right[k][0].rows[0]);
      multiply_tile<LAST>(block, left[steps - 1][i].rows[first], right[steps - 1][0].rows[0]);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS_AT_ONCE; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < COLUMNS; ++j) _mm512_store_ps(sums[j][i].rows[first + r], block[r][j]);
      work.next();
    }
  }
  // Sums are stored as soon as they are complete.
  void finish() {}
};
