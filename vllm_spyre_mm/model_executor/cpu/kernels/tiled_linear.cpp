// SPDX-License-Identifier: Apache-2.0
// A linear layer of bf16 on AMX or AVX-512, whose weight lies in the order in which it is multiplied.
//
// 32 rows and 32 outputs are multiplied at a time, 32 numbers deep in a step. A task is some rows and
// some outputs. It goes through its outputs 32 by 32, through as many steps as weights fit the
// L1 cache, and then through its rows, which it has packed into the L2 cache. Sums lie in
// fp32 between; the products of 32 outputs run beside what is left to do for those before: a bias,
// a GELU or the gates of a gated unit, whose 32 are 16 gates and the 16 values that they gate, or
// the sum with a residual. A norm of the rows is computed where they are packed.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>

#include <omp.h>

#include "tiles.h"

constexpr int64_t BLOCK = 32;       // rows, and outputs, that are multiplied at a time
constexpr int64_t STEP = 32 * 32;   // numbers of a block of either operand in a step
constexpr int64_t DEPTH = 18;       // steps at most whose weights stay in the L1 cache: 36 KiB
constexpr int64_t ROW_BLOCKS = 12;  // of a task at most: twice DEPTH steps of them take 864 KiB
constexpr int64_t SUM_BLOCKS = 432;  // that a task keeps at most: 1.7 MiB
constexpr int64_t AHEAD = 6;        // rows between the prefetch of an output and its store
constexpr int64_t NEAR = 8;         // steps between the prefetch of weights and their use by few rows

enum After { NONE, GELU_TANH, SILU_GATED, RESIDUAL };

struct Problem {
  const Element *x, *weight, *bias, *norm_weight, *norm_bias, *residual;
  Element* out;
  int64_t rows, width, outputs, x_row, out_row, residual_row;
  int64_t results;  // of a panel: outputs, or gated values
  bool centered;
  float epsilon, scale;

  int64_t steps() const { return divide_up(width, 32); }
};

template <typename Number>
class Buffer {
 public:
  Number* of(size_t count) {
    if (count > count_) {
      numbers_.reset((Number*)std::aligned_alloc(64, (count * sizeof(Number) + 63) / 64 * 64));
      count_ = count;
    }
    return numbers_.get();
  }

 private:
  struct Free {
    void operator()(Number* numbers) const { std::free(numbers); }
  };
  std::unique_ptr<Number[], Free> numbers_;
  size_t count_ = 0;
};

// A task: rows [row, last_row), and the outputs of panels [panel, last_panel).
struct Task {
  int64_t row, last_row, panel, last_panel;
};

static inline void widen(__m512i bits, __m512 numbers[2]) {
  numbers[0] = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits)), 16);
  numbers[1] =
      (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1)), 16);
}

// What a norm subtracts from the numbers of a row, and what it multiplies the rest by.
struct Moments {
  float mean, factor;
};

// The mean of the squares of what is left of a row without its mean.
static float variance_about(const Problem& of, const Element* row, float mean) {
  Floats squares = {};
  for (int64_t i = 0; i < of.width; i += LANES) {
    Floats deviations = load(row + i) - mean;
    squares += deviations * deviations;
  }
  return _mm512_reduce_add_ps((__m512)squares) / of.width;
}

static Moments measure(const Problem& of, const Element* row) {
  __m512 sums = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < of.width; i += 32) {
    __m512i x = _mm512_loadu_si512(row + i);
    sums = dot_pairs(sums, x, _mm512_set1_epi16(BF16_ONE));
    squares = dot_pairs(squares, x, x);
  }
  float mean = of.centered ? _mm512_reduce_add_ps(sums) / of.width : 0;
  float variance = _mm512_reduce_add_ps(squares) / of.width - mean * mean;
  if (variance < mean * mean) variance = variance_about(of, row, mean);  // else digits are lost
  return {mean, 1.0f / std::sqrt(variance + of.epsilon)};
}

// A norm's weight and bias in fp32, zeros for no bias.
static void widen_norm(const Problem& of, float* weight, float* bias) {
  for (int64_t i = 0; i < of.width; i += LANES) {
    store(weight + i, load(of.norm_weight + i));
    store(bias + i, of.norm_bias ? load(of.norm_bias + i) : Floats{});
  }
}

// A thread's memory.
struct Workspace {
  Buffer<Element> packed;
  Buffer<float> sums, norm_weight, norm_bias;
  Buffer<Moments> moments;
};

// Steps [step, last) of a task's rows as (blocks, steps, 32, 32); zeros beyond. With the first step
// the moments of rows are measured.
static Element* pack(const Problem& of, const Task& task, int64_t step, int64_t last,
                     Workspace& memory) {
  int64_t count = last - step, whole = std::min(last, of.width / 32) - step;
  uint32_t rest = (1u << of.width % 32) - 1;
  int64_t rows = task.last_row - task.row, blocks = divide_up(rows, BLOCK);
  Element* to = memory.packed.of(blocks * count * STEP);
  Moments* moments = memory.moments.of(rows);
  float *weight = memory.norm_weight.of(of.width), *bias = memory.norm_bias.of(of.width);
  if (of.norm_weight && step == 0) widen_norm(of, weight, bias);
  for (int64_t r = 0; r < blocks * BLOCK; ++r) {
    Element* packed = to + r / BLOCK * count * STEP + r % BLOCK * 32;
    const Element* row = of.x + (task.row + r) * of.x_row;
    if (of.norm_weight && r < rows) {
      if (step == 0) moments[r] = measure(of, row);
      __m512 factor = _mm512_set1_ps(moments[r].factor);
      __m512 mean = _mm512_set1_ps(moments[r].mean);
      for (int64_t k = 0; k < count; ++k) {
        __m512 x[2];
        widen(_mm512_loadu_si512(row + (step + k) * 32), x);
        for (int half = 0; half < 2; ++half) {
          int64_t i = (step + k) * 32 + half * LANES;
          __m512 deviations = _mm512_mul_ps(_mm512_sub_ps(x[half], mean), factor);
          x[half] = _mm512_fmadd_ps(deviations, _mm512_load_ps(weight + i),
                                    _mm512_load_ps(bias + i));
        }
        store(packed + k * STEP, round_to_bf16(x[1], x[0]));
      }
      continue;
    }
    for (int64_t k = 0; k < count; ++k)
      _mm512_store_si512(packed + k * STEP,
                         _mm512_maskz_loadu_epi16(r >= rows ? 0 : k < whole ? ~0u : rest,
                                                  row + (step + k) * 32));
  }
  written(to);
  return to;
}

// x / (1 + 2^power); bf16 keeps 8 bits of it.
static inline __m512 damp(Floats x, Floats power) {
  Floats divisor = exp2_bounded(-larger(Floats{} - 126.0f, -power)) + 1.0f;
  return _mm512_mul_ps((__m512)x, _mm512_rcp14_ps((__m512)divisor));
}
// By tanh, x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
static inline __m512 gelu_tanh(Floats x) {
  constexpr float scale = -2.0f * 0.7978845608f * 1.44269504f;  // to a power of 2
  return damp(x, x * (x * x * (0.044715f * scale) + scale));
}
static inline __m512 silu(Floats x) { return damp(x, x * -1.44269504f); }

// What is left to do for a panel whose sums are complete.
template <After AFTER>
struct Finish {
  const float* sums = nullptr;
  Element* out = nullptr;
  const Element* residual = nullptr;
  int64_t row = 0, rows = 0, stride = 0, residual_stride = 0;
  __mmask32 held = 0;  // results that there are
  __m512 bias[2], scale;

  void begin(const Problem& of, int64_t panel, int64_t first, int64_t last, const float* from) {
    int64_t left = of.outputs - panel * of.results;
    sums = from;
    out = of.out + first * of.out_row + panel * of.results;
    row = 0, rows = last - first, stride = of.out_row;
    if constexpr (AFTER == RESIDUAL) {
      residual = of.residual + first * of.residual_row + panel * of.results;
      residual_stride = of.residual_row;
      scale = _mm512_set1_ps(of.scale);
    }
    held = ~0u >> (BLOCK - std::min(left, of.results));
    __m512i bits = _mm512_setzero_si512();
    if (of.bias)
      bits = _mm512_maskz_loadu_epi16(AFTER == SILU_GATED ? ~0u : held, of.bias + panel * BLOCK);
    widen(bits, bias);
  }
  void next() {
    if (row == rows) return;
    const float* from = sums + row * BLOCK;
    Element* to = out + row * stride;
    __builtin_prefetch(to + AHEAD * stride, 1);  // rows lie apart, which hides them from hardware
    __m512 low = _mm512_add_ps(_mm512_load_ps(from), bias[0]);
    __m512 high = _mm512_add_ps(_mm512_load_ps(from + 16), bias[1]);
    if constexpr (AFTER == SILU_GATED) low = _mm512_mul_ps(silu((Floats)low), high);
    if constexpr (AFTER == GELU_TANH) {
      low = gelu_tanh((Floats)low);
      high = gelu_tanh((Floats)high);
    }
    if constexpr (AFTER == RESIDUAL) {
      const Element* beside = residual + row * residual_stride;
      __builtin_prefetch(beside + AHEAD * residual_stride);
      __builtin_prefetch(beside + BLOCK, 0, 2);  // the next panel's
      __m512 added[2];
      widen(_mm512_maskz_loadu_epi16(held, beside), added);
      low = _mm512_fmadd_ps(low, scale, added[0]);
      high = _mm512_fmadd_ps(high, scale, added[1]);
    }
    _mm512_mask_storeu_epi16(to, held, round_to_bf16(high, low));
    ++row;
  }
  void rest() {
    while (row < rows) next();
  }
};

// The numbers a product goes through before its sums lie elsewhere: [first, last) of the steps. Rows
// that are multiplied at once use weights once, and have no cause to keep any.
struct Depths {
  int64_t steps, passes, count = passes == 1 ? 1 : divide_up(steps, DEPTH);
  int64_t first(int64_t depth) const { return steps * depth / count; }
};

#ifdef __AMX_BF16__
#include "linear_amx.h"
#else
#include "linear_avx512.h"
#endif

// The rows are packed unless the task before had the same.
template <After AFTER>
static void compute(const Problem& of, const Task& task, bool packed, Workspace& memory) {
  int64_t steps = of.steps(), blocks = divide_up(task.last_row - task.row, BLOCK);
  int64_t passes = divide_up(task.last_row - task.row, ROWS_AT_ONCE);  // over a panel's weights
  Depths depths{steps, passes};
  int64_t rows_a_step = divide_up(BLOCK, steps);  // to finish sums while others are made
  // Sums are finished by blocks of rows, by panels, or, if rows are packed in parts, at the end.
  bool in_parts = depths.count > 2;
  int64_t at_once = in_parts ? 1 : depths.count, group = depths.count == 1 ? 1 : blocks;
  int64_t kept = in_parts ? task.last_panel - task.panel : 2;
  const Element* rows = memory.packed.of(0);
  float* room = memory.sums.of(kept * group * BLOCK * BLOCK);
  Finish<AFTER> finish;
  for (int64_t depth = 0; depth < depths.count; depth += at_once) {
    int64_t start = depths.first(depth), end = depths.first(depth + at_once), turn = 0;
    if (in_parts || !packed) rows = pack(of, task, start, end, memory);
    for (int64_t panel = task.panel; panel < task.last_panel; ++panel) {
      for (int64_t g = 0; g < blocks; g += group, ++turn) {
        float* own = room + turn % kept * group * BLOCK * BLOCK;
        for (int64_t d = depth; d < depth + at_once; ++d) {
          int64_t from = depths.first(d), count = depths.first(d + 1) - from;
          const Element* weights = of.weight + (panel * steps + from) * STEP;
          // Few rows: the first of them fetch weights as they come. Many: all fetch the next panel's.
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
                     finish, rows_a_step);
          }
        }
        finish.rest();
        if (end == steps)
          finish.begin(of, panel, task.row + g * BLOCK,
                       std::min(task.last_row, task.row + (g + group) * BLOCK), own);
      }
    }
  }
  finish.rest();
}

template <After AFTER>
static void run(const Problem& of) {
  int64_t threads = omp_get_max_threads(), blocks = divide_up(of.rows, BLOCK);
  int64_t panels = divide_up(of.outputs, of.results);
  // Few rows: each thread has outputs of its own. Many: rows of its own.
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
    thread_local Workspace memory;
    Tiles tiles;
    int64_t before = -1;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < row_parts * output_parts; ++i) {
      int64_t rows = i % row_parts, outputs = i / row_parts;
      Task task{row(rows), row(rows + 1), panel(outputs), panel(outputs + 1)};
      compute<AFTER>(of, task, rows == before, memory);
      before = rows;
    }
  }
}

// x: (rows, width), out: (rows, outputs), each with its distance between rows; weight: (panels of 32
// outputs, steps of 32 inputs, 2, pairs of inputs, outputs, 2), zeros beyond; bias: (outputs,) or
// null. With gates a panel has those of 16 outputs, and then the 16 values, and so has the bias,
// zeros beyond. norm_weight and norm_bias: (width,), a multiple of 32, or null: rows are divided by
// their root mean square, or, centered, by their standard deviation. residual: (rows, outputs), to
// which scale times the outputs is added.
extern "C" void tiled_linear(const Element* x, const Element* norm_weight,
                             const Element* norm_bias, const Element* weight, const Element* bias,
                             const Element* residual, Element* out, int64_t rows, int64_t width,
                             int64_t outputs, int64_t x_row, int64_t residual_row, int64_t out_row,
                             int64_t after, int64_t centered, float epsilon, float scale) {
  Problem of{x,    weight,  bias,    norm_weight, norm_bias,    residual,
             out,  rows,    width,   outputs,     x_row,        out_row,
             residual_row,  after == SILU_GATED ? 16 : BLOCK,   bool(centered), epsilon, scale};
  if (after == GELU_TANH) run<GELU_TANH>(of);
  else if (after == SILU_GATED) run<SILU_GATED>(of);
  else if (after == RESIDUAL) run<RESIDUAL>(of);
  else run<NONE>(of);
}
