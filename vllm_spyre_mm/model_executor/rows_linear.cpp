// SPDX-License-Identifier: Apache-2.0
// A linear layer of a few bf16 rows, whose weight lies in rows too.
//
// The weight is the left operand, as it lies; the inputs, transposed, are the right one. So the
// weight is read once, at the memory's pace.

#include <algorithm>
#include <memory>

#include "matrices.h"

constexpr int64_t OUTPUTS = 64;  // that are computed at a time

// x: (rows, width), weight: (outputs, width), bias: (outputs,) or null, out: (rows, outputs), all
// contiguous; width is a multiple of 32.
extern "C" void rows_linear(const Element* x, const Element* weight, const Element* bias,
                            Element* out, int64_t rows, int64_t width, int64_t outputs) {
  int64_t columns = (rows + LANES - 1) / LANES * LANES;
  std::unique_ptr<Element[]> inputs(new Element[width * columns]);  // (width / 2, columns, 2)
  for (int64_t k = 0; k < width; k += 2 * LANES)
    for (int64_t first = 0; first < columns; first += LANES) {
      Bits pairs[LANES];
      for (int64_t i = 0; i < LANES; ++i)
        pairs[i] = first + i < rows ? load<Bits>(x + (first + i) * width + k) : Bits{};
      transpose(pairs);
      for (int64_t i = 0; i < LANES; ++i)
        store(&inputs[((k / 2 + i) * columns + first) * 2], pairs[i]);
    }
#pragma omp parallel
  {
    std::unique_ptr<float[]> result(new float[OUTPUTS * columns]);
#pragma omp for
    for (int64_t start = 0; start < outputs; start += OUTPUTS) {
      int64_t count = std::min(OUTPUTS, outputs - start);
      brgemm(count, columns, width, width, columns, columns, false, tile(weight + start * width),
             tile(inputs.get()), result.get(), true);
      for (int64_t first = 0; first < count; first += LANES)
        for (int64_t column = 0; column < columns; column += LANES) {
          int64_t held = std::min<int64_t>(LANES, count - first), offset = start + first;
          Bits block[LANES] = {};
          for (int64_t i = 0; i < held; ++i)
            block[i] = load<Bits>(&result[(first + i) * columns + column]);
          transpose(block);
          Halves added = {};
          if (bias) std::memcpy(&added, bias + offset, held * sizeof(Element));
          Floats shift = widen(added);
          for (int64_t row = column; row < std::min(rows, column + LANES); ++row) {
            Halves rounded = round_to_bf16((Floats)block[row - column] + shift);
            std::memcpy(out + row * outputs + offset, &rounded, held * sizeof(Element));
          }
        }
    }
    brgemm_release(true);
  }
}
