// Gradients of linear layers over grouped rows: sums of rows of weight, or of x, each with a factor of dout.

#include "cpu/blocks.h"

namespace fastprompt::FASTPROMPT_ISA {
namespace {

constexpr int kSumRows = 6, kSumVectors = kWidth == 16 ? 4 : 2;
constexpr int64_t kSumColumns = kSumVectors * kWidth, kSumDepth = 256;
constexpr int64_t kWeightRows = 64, kLongRunRows = 8;

// sum[m] += factor(m, k) * row(k) for k < depth, over kN vectors from column `at` on.
template <int kN, class Factor, class Row, class Size>
FP_INLINE void sum_tile(vf (&sum)[kSumRows][kN], int64_t depth, int64_t at, Factor factor, Row row, Size size) {
  for (int64_t k = 0; k < depth; ++k) {
    const auto* from = row(k) + at;
    vf x[kN];
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) x[n] = load(from + n * kWidth, size);
#pragma GCC unroll 16
    for (int m = 0; m < kSumRows; ++m) {
      const vf y = splat(factor(m, k));
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) sum[m][n] += y * x[n];
    }
  }
}

// f(row, vector, sum) for the first `count` rows of a tile.
template <int kN, class F>
FP_INLINE void for_sums(const vf (&sum)[kSumRows][kN], int count, F f) {
#pragma GCC unroll 16
  for (int m = 0; m < kSumRows; ++m) {
    if (m >= count) return;
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) f(m, n, sum[m][n]);
  }
}

// f(column, Vectors, Whole or Part) for some vectors at a time of the columns `first` to `last`.
template <int kN>
struct Vectors {
  static constexpr int kCount = kN;
};
template <class F>
FP_INLINE void for_columns(int64_t first, int64_t last, F f) {
  int64_t at = first;
  for (; at + kSumColumns <= last; at += kSumColumns) f(at, Vectors<kSumVectors>{}, Whole{});
  for_vectors(last - at, [&](int64_t i, auto size) { f(at + i, Vectors<1>{}, size); });
}

// The rows of dx that a block of dout gives, over some weight rows at a time, which stay in cache for the whole block.
template <class T>
void backward_block(const GroupedLinearBackward& call, const Block& block) {
  const int64_t size = call.weight.size[1], stride = call.weight.stride[0];
  const int64_t step = block.rows > kSumRows ? kWeightRows : kLongRunRows;  // few rows of dout only wait for memory
  float* sums = static_cast<float*>(thread_scratch(block.columns > step ? block.rows * size * sizeof(float) : 0));
  for (int64_t begin = 0; begin == 0 || begin < block.columns; begin += step) {
    const int64_t depth = least(step, block.columns - begin);
    const bool last = begin + depth == block.columns;
    const T* weight = call.weight.as<T>() + (call.rows.starts[block.layer] + begin) * stride;
    for_columns(0, size, [&](int64_t at, auto vectors, auto part) {
      for (int64_t row = 0; row < block.rows; row += kSumRows) {
        const int count = static_cast<int>(least<int64_t>(kSumRows, block.rows - row));
        const float* dout[kSumRows];
        for (int m = 0; m < kSumRows; ++m) dout[m] = call.dout[block.first_row + row + least(m, count - 1)] + begin;
        vf sum[kSumRows][decltype(vectors)::kCount] = {};
        sum_tile(
            sum, depth, at, [&](int m, int64_t k) { return dout[m][k]; },
            [&](int64_t k) { return weight + k * stride; }, part);
        for_sums(sum, count, [&](int m, int n, vf value) {
          float* held = sums + (row + m) * size + at + n * kWidth;
          if (begin > 0) value += load(held, part);
          if (last) {
            store(static_cast<T*>(call.dx[block.first_row + row + m]) + at + n * kWidth, value, part);
          } else {
            store(held, value, part);
          }
        });
      }
    });
  }
}

// Columns `first` to `last` of dweight, layer by layer, as layers may share weight rows.
template <class T>
void backward_weight(const GroupedLinearBackward& call, int64_t first, int64_t last) {
  const GroupedRows& rows = call.rows;
  const int64_t size = call.weight.size[1];
  for (int64_t layer = 0; layer < rows.layers; ++layer) {
    for (int64_t begin = rows.offsets[layer]; begin < rows.offsets[layer + 1]; begin += kSumDepth) {
      const int64_t depth = least(kSumDepth, rows.offsets[layer + 1] - begin);
      for (int64_t row = 0; row < rows.lengths[layer]; row += kSumRows) {
        const int count = static_cast<int>(least<int64_t>(kSumRows, rows.lengths[layer] - row));
        float* dweight = call.dweight + (rows.starts[layer] + row) * size;
        for_columns(first, last, [&](int64_t at, auto vectors, auto part) {
          vf sum[kSumRows][decltype(vectors)::kCount] = {};
          sum_tile(
              sum, depth, at, [&](int m, int64_t k) { return call.dout[begin + k][row + least(m, count - 1)]; },
              [&](int64_t k) { return static_cast<const T*>(rows.x[begin + k]); }, part);
          for_sums(sum, count, [&](int m, int n, vf value) {
            float* to = dweight + m * size + at + n * kWidth;
            store(to, load(to, part) + value, part);
          });
        });
      }
    }
  }
}

void backward_bias(const GroupedLinearBackward& call) {
  const GroupedRows& rows = call.rows;
  for (int64_t layer = 0; layer < rows.layers; ++layer) {
    float* dbias = call.dbias + rows.starts[layer];
    for_vectors(rows.lengths[layer], [&](int64_t n, auto part) {
      vf sum = load(dbias + n, part);
      for (int64_t row = rows.offsets[layer]; row < rows.offsets[layer + 1]; ++row)
        sum += load(call.dout[row] + n, part);
      store(dbias + n, sum, part);
    });
  }
}

}  // namespace

void grouped_linear_backward(const GroupedLinearBackward& call) {
  const int64_t size = call.weight.size[1];
  with_storage(call.weight.dtype, [&](auto number) {
    using T = decltype(number);
    if (call.dx) {
      for_each_block(call.rows, INT64_MAX, [&](const Block& block) { backward_block<T>(call, block); });
    }
    if (call.dweight) {
      for_each_unit((size + kSumColumns - 1) / kSumColumns, [&](int64_t unit) {
        backward_weight<T>(call, unit * kSumColumns, least(size, (unit + 1) * kSumColumns));
      });
    }
  });
  if (call.dbias) backward_bias(call);
}

}  // namespace fastprompt::FASTPROMPT_ISA
