// SPDX-License-Identifier: Apache-2.0
// A linear layer of a few rows by AMX. Included by rows_linear.cpp.
//
// The weight, unpacked, is the left operand; the inputs, transposed, are the right one. So the
// weight is read once, at the memory's bandwidth.

constexpr int64_t OUTPUTS = 32;  // outputs that are computed at a time
constexpr int64_t STEP = 32 * 16;  // elements of a tile

// Packs 16 rows as (width / 32, pairs, rows, 2), padded with zeros.
static void pack_inputs(const Element* x, int64_t rows, int64_t width, Element* to) {
  for (int64_t k = 0; k < width; k += 2 * LANES) {
    Bits pairs[LANES];
    for (int64_t i = 0; i < LANES; ++i)
      pairs[i] = i < rows ? load<Bits>(x + i * width + k) : Bits{};
    transpose(pairs);
    for (int64_t i = 0; i < LANES; ++i) store(to + (k + 2 * i) * LANES, pairs[i]);
  }
}

// Products of 32 rows of the weight and 16 or 32 inputs, as (32, 32).
template <bool TWO>
static inline void multiply(const Element* weight, const Element* inputs, int64_t width,
                            float (*sums)[2 * LANES]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const Element* next_weight = weight + OUTPUTS * width;
  int64_t stride = width * sizeof(Element);
  for (int64_t k = 0; k < width; k += 32) {
    for (int64_t i = 0; i < 2 * STEP; i += 32)
      __builtin_prefetch(next_weight + k * OUTPUTS + i, 0, 2);
    _tile_stream_loadd(4, weight + k, stride);
    _tile_stream_loadd(5, weight + TILE_ROWS * width + k, stride);
    _tile_loadd(6, inputs + k * LANES, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (TWO) {
      _tile_loadd(7, inputs + (width + k) * LANES, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0], 128);
  _tile_stored(1, sums[0] + LANES, 128);
  _tile_stored(2, sums[TILE_ROWS], 128);
  _tile_stored(3, sums[TILE_ROWS] + LANES, 128);
}

static void compute(const Element* x, const Element* weight, const Element* bias, Element* out,
                    int64_t rows, int64_t width, int64_t outputs) {
  std::unique_ptr<Element[]> inputs(new Element[width * 2 * LANES]);
  for (int64_t first = 0; first < rows; first += LANES)
    pack_inputs(x + first * width, std::min<int64_t>(LANES, rows - first), width,
                &inputs[first * width]);
  compiler_barrier(inputs.get());
#pragma omp parallel
  {
    Tiles tiles;
    alignas(64) float sums[OUTPUTS][2 * LANES];
#pragma omp for
    for (int64_t start = 0; start < outputs; start += OUTPUTS) {
      int64_t first = std::min(start, outputs - OUTPUTS);  // the last block overlaps the one before
      auto product = rows > LANES ? multiply<true> : multiply<false>;
      product(weight + first * width, inputs.get(), width, sums);
      for (int64_t half = 0; half < OUTPUTS; half += LANES)
        for (int64_t column = 0; column < rows; column += LANES) {
          Bits block[LANES];
          for (int64_t i = 0; i < LANES; ++i) block[i] = load<Bits>(&sums[half + i][column]);
          transpose(block);
          Floats shift = bias ? load(bias + first + half) : Floats{};
          int64_t skipped = std::clamp<int64_t>(start - first - half, 0, LANES);
          for (int64_t row = column; row < std::min(rows, column + LANES); ++row) {
            Halves rounded = round_to_bf16((Floats)block[row - column] + shift);
            std::memcpy(out + row * outputs + first + half + skipped, (Element*)&rounded + skipped,
                        (LANES - skipped) * sizeof(Element));
          }
        }
    }
  }
}
