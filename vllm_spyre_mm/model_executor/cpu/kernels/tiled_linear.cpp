// SPDX-License-Identifier: Apache-2.0
// A bf16 linear layer on AMX or AVX-512, with a prepacked (tiled) weight.
//
// A block is 32 rows times a panel of 32 outputs, and a step is 32 elements of depth. A task is
// some rows and some outputs. It goes through its panels, through as many steps as weights fit the
// L1 cache, and then through its rows, which are packed and fit the L2 cache. Sums are kept in
// fp32; the products of a panel are interleaved with the epilogue of the panel before: a bias, then
// GELU, SwiGLU (the panel is 16 gates and their 16 values) or a residual. A norm of the rows is
// fused into their packing.

#include <algorithm>

#include <omp.h>

#include "linear_epilogue.h"
#include "linear_pack.h"
#include "linear_problem.h"

constexpr int64_t DEPTH = 18;       // steps at most whose weights stay in the L1 cache: 36 KiB
constexpr int64_t ROW_BLOCKS = 12;  // of a task at most: twice DEPTH steps of them take 864 KiB
constexpr int64_t SUM_BLOCKS = 432;  // blocks of sums that a task keeps at most: 1.7 MiB
constexpr int64_t NEAR = 8;  // steps between the prefetch of weights and their use, with few rows

// Splits the steps into depths whose weights stay in the L1 cache for all rows. With a single pass
// weights are used once, and there is nothing to keep in the cache.
struct Depths {
  int64_t steps, passes, count = passes == 1 ? 1 : divide_up(steps, DEPTH);
  int64_t first(int64_t depth) const { return steps * depth / count; }
};

#ifdef __AMX_BF16__
#include "linear_amx.h"
#else
#include "linear_avx512.h"
#endif

// packed: the task before had the same rows, which are packed already.
template <Epilogue EPILOGUE>
static void compute(const LinearProblem& of, const Task& task, bool packed, Scratch& memory) {
  int64_t steps = of.steps(), blocks = divide_up(task.last_row - task.row, BLOCK);
  int64_t passes = divide_up(task.last_row - task.row, ROWS_AT_ONCE);  // over a panel's weights
  Depths depths{steps, passes};
  int64_t rows_a_step = divide_up(BLOCK, steps);  // of the epilogue, beside the products
  // The epilogue runs after a block of rows, a panel, or, if rows are packed in parts, all panels.
  bool in_parts = depths.count > 2;
  int64_t at_once = in_parts ? 1 : depths.count, group = depths.count == 1 ? 1 : blocks;
  int64_t kept = in_parts ? task.last_panel - task.panel : 2;
  const Element* rows = memory.packed.of(0);
  float* room = memory.sums.of(kept * group * BLOCK * BLOCK);
  PanelEpilogue<EPILOGUE> epilogue;
  for (int64_t depth = 0; depth < depths.count; depth += at_once) {
    int64_t start = depths.first(depth), end = depths.first(depth + at_once), turn = 0;
    if (in_parts || !packed) rows = pack_rows(of, task, start, end, memory);
    for (int64_t panel = task.panel; panel < task.last_panel; ++panel) {
      for (int64_t g = 0; g < blocks; g += group, ++turn) {
        float* own = room + turn % kept * group * BLOCK * BLOCK;
        for (int64_t d = depth; d < depth + at_once; ++d) {
          int64_t from = depths.first(d), count = depths.first(d + 1) - from;
          const Element* weights = of.weight + (panel * steps + from) * STEP;
          // Few rows: the first block prefetches a few steps ahead. Many: all prefetch the next
          // panel.
          bool few = passes <= FEW;
          int64_t to_next = few ? NEAR : in_parts ? steps : count;
          for (int64_t b = g; b < g + group; ++b) {
            float* sum = own + (b - g) * BLOCK * BLOCK;
            multiply({.rows = rows + (b * (end - start) + from - start) * STEP,
                      .weights = weights,
                      .next_weights = weights + to_next * STEP,
                      .steps = count,
                      .sums = sum,
                      .next_sums = in_parts ? sum + BLOCK * BLOCK : nullptr,
                      .fresh = d == 0,
                      .count = std::min(BLOCK, task.last_row - task.row - b * BLOCK),
                      .fetch = few && b > 0 ? STEP : b * (BLOCK / ROWS_AT_ONCE) * 32,
                      .fetch_step = few ? 32 : passes * 32},
                     epilogue, rows_a_step);
          }
        }
        epilogue.rest();
        if (end == steps)
          epilogue.begin(of, panel, task.row + g * BLOCK,
                       std::min(task.last_row, task.row + (g + group) * BLOCK), own);
      }
    }
  }
  epilogue.rest();
}

template <Epilogue EPILOGUE>
static void run(const LinearProblem& of) {
  int64_t threads = omp_get_max_threads(), blocks = divide_up(of.rows, BLOCK);
  int64_t panels = divide_up(of.outputs, of.results);
  // Few rows: threads split the outputs. Many: they split the rows.
  int64_t row_parts = divide_up(blocks, ROW_BLOCKS), output_parts = 4 * threads;
  if (blocks >= 2 * threads) {
    row_parts = divide_up(blocks, ROW_BLOCKS * threads) * threads;
    output_parts = 1;
  }
  if (of.steps() > 2 * DEPTH)
    output_parts =
        std::max(output_parts, divide_up(panels * divide_up(blocks, row_parts), SUM_BLOCKS));
  output_parts = std::min(output_parts, panels);
  int64_t halves = divide_up(of.rows, 16);  // rows are shared out by half blocks
  auto row = [&](int64_t part) { return std::min(of.rows, halves * part / row_parts * 16); };
  auto panel = [&](int64_t part) { return panels * part / output_parts; };
#pragma omp parallel
  {
    thread_local Scratch memory;
    Tiles tiles;
    int64_t before = -1;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < row_parts * output_parts; ++i) {
      int64_t rows = i % row_parts, outputs = i / row_parts;
      Task task{row(rows), row(rows + 1), panel(outputs), panel(outputs + 1)};
      compute<EPILOGUE>(of, task, rows == before, memory);
      before = rows;
    }
  }
}

// x: (rows, width), out: (rows, outputs), with row strides x_row and out_row; weight: (panels of 32
// outputs, steps of 32 inputs, 2, pairs of inputs, outputs, 2), zero-padded; bias: (outputs,) or
// null. For SwiGLU a panel is 16 gates and then their 16 values, also in the bias, zero-padded.
// norm_weight and norm_bias: (width,), a multiple of 32, or null, of an RMSNorm or, centered, a
// LayerNorm. residual: (rows, outputs), added to scale times the outputs.
extern "C" void tiled_linear(const Element* x, const Element* norm_weight,
                             const Element* norm_bias, const Element* weight, const Element* bias,
                             const Element* residual, Element* out, int64_t rows, int64_t width,
                             int64_t outputs, int64_t x_row, int64_t residual_row, int64_t out_row,
                             int64_t epilogue, int64_t centered, float epsilon, float scale) {
  LinearProblem of{x,
                   weight,
                   bias,
                   norm_weight,
                   norm_bias,
                   residual,
                   out,
                   rows,
                   width,
                   outputs,
                   x_row,
                   out_row,
                   residual_row,
                   epilogue == SWIGLU ? 16 : BLOCK,
                   bool(centered),
                   epsilon,
                   scale};
  if (epilogue == GELU_TANH) run<GELU_TANH>(of);
  else if (epilogue == SWIGLU) run<SWIGLU>(of);
  else if (epilogue == RESIDUAL) run<RESIDUAL>(of);
  else run<NONE>(of);
}
