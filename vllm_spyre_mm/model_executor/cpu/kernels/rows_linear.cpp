// SPDX-License-Identifier: Apache-2.0
// A linear layer of a few bf16 rows on AMX or AVX-512, with a row-major weight.

#include <algorithm>
#include <memory>

#include "tiles.h"

#ifdef __AMX_BF16__
#include "rows_amx.h"
#else
#include "rows_avx512.h"
#endif

// x: (rows, width), weight: (outputs, width), bias: (outputs,) or null, out: (rows, outputs), all
// contiguous; 1 to 32 rows, at least 32 outputs, and width is a multiple of 32.
extern "C" void rows_linear(const Element* x, const Element* weight, const Element* bias,
                            Element* out, int64_t rows, int64_t width, int64_t outputs) {
  compute(x, weight, bias, out, rows, width, outputs);
}
