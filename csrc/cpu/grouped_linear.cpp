// Linear layers over rows that lie anywhere in memory: dot products of rows of x and of weight, nothing packed.

#include "cpu/blocks.h"

namespace fastprompt::FASTPROMPT_ISA {
namespace {

constexpr int64_t kBlockColumns = 64, kBlockDepth = 1024;

// Rows and columns of a tile: kWidth sums, one a lane. A lone row has a flat tile.
constexpr int kTileRows = kWidth == 16 ? 4 : 2;
constexpr int columns_beside(int rows) { return kWidth / rows; }

// Numbers of a row that one step of a dot product takes, and the step.
template <class T>
struct Dot {
  static constexpr int kStep = kWidth;
  template <class Size>
  static FP_INLINE vf step(vf sum, const T* a, const T* b, Size size) {
    return sum + load(a, size) * load(b, size);
  }
};
#if defined(__AVX512BF16__)
template <>
struct Dot<Bf16> {
  static constexpr int kStep = 2 * kWidth;
  static FP_INLINE __m512bh pairs(const Bf16* p, Whole) { return (__m512bh)_mm512_loadu_si512(p); }
  static FP_INLINE __m512bh pairs(const Bf16* p, Part part) {
    return (__m512bh)_mm512_maskz_loadu_epi16((1u << part.lanes) - 1, p);
  }
  template <class Size>
  static FP_INLINE vf step(vf sum, const Bf16* a, const Bf16* b, Size size) {
    return _mm512_dpbf16_ps(sum, pairs(a, size), pairs(b, size));
  }
};
#endif

// Adds to `sums`, rows of a stride, the products of kM rows of x with the rows `b` of weight, over `depth` numbers.
template <class T, int kM>
FP_INLINE void dot_tile(float* sums, int64_t stride, const T* const (&a)[kM], const T* const (&b)[columns_beside(kM)],
                        int64_t at, int64_t depth) {
  constexpr int kN = columns_beside(kM);
  vf sum[kWidth] = {};
  const auto step = [&](int64_t k, auto size) {
    if constexpr (kM == 1) {  // nothing but waiting for memory: ask for the next tile's rows
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) __builtin_prefetch(b[n] + k + kN * (b[1] - b[0]), 0, 2);
    }
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) {
        vf& s = sum[m * kN + n];
        s = Dot<T>::step(s, a[m] + k, b[n] + k, size);
      }
  };
  int64_t k = at;
  for (; k + Dot<T>::kStep <= at + depth; k += Dot<T>::kStep) step(k, Whole{});
  for (; k < at + depth; k += kWidth) step(k, Part{static_cast<int>(least<int64_t>(kWidth, at + depth - k))});
  const vf total = sums_of(sum);
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) sums[m * stride + n] += total[m * kN + n];
}

// The sums of a block in tiles of kM rows, in `sums` of rows of a stride: both are rounded up to whole tiles.
template <class T, int kM>
void sum_block(const GroupedLinear& call, int64_t start, const Block& block, float* sums, int64_t stride) {
  constexpr int kN = columns_beside(kM);
  const int64_t size = call.weight.size[1];
  const T* weight = call.weight.as<T>() + (start + block.first_column) * call.weight.stride[0];
  for (int64_t at = 0; at < size; at += kBlockDepth) {
    for (int64_t column = 0; column < block.columns; column += kN) {
      const T* b[kN];  // past the edge the last one again
      for (int n = 0; n < kN; ++n) b[n] = weight + least(column + n, block.columns - 1) * call.weight.stride[0];
      for (int64_t row = 0; row < block.rows; row += kM) {
        const T* a[kM];
        for (int m = 0; m < kM; ++m) {
          a[m] = static_cast<const T*>(call.rows.x[block.first_row + least(row + m, block.rows - 1)]);
        }
        dot_tile<T, kM>(sums + row * stride + column, stride, a, b, at, least(kBlockDepth, size - at));
      }
    }
  }
}

template <class T>
void multiply_block(const GroupedLinear& call, int64_t start, const Block& block) {
  const int64_t stride = round_up(block.columns, kWidth), count = round_up(block.rows, kTileRows) * stride;
  float* sums = static_cast<float*>(thread_scratch(count * sizeof(float)));
  memset(sums, 0, count * sizeof(float));
  if (block.rows == 1) {
    sum_block<T, 1>(call, start, block, sums, stride);
  } else {
    sum_block<T, kTileRows>(call, start, block, sums, stride);
  }
  const T* bias = call.bias ? call.bias.as<T>() + start + block.first_column : nullptr;
  for (int64_t m = 0; m < block.rows; ++m) {
    T* out = static_cast<T*>(call.out[block.first_row + m]) + block.first_column;
    const float* row = sums + m * stride;
    for_vectors(block.columns, [&](int64_t n, auto part) {
      const vf sum = load(row + n);
      store(out + n, bias ? sum + load(bias + n, part) : sum, part);
    });
  }
}

template <class T>
void fill(T* out, int64_t count, float value) {
  for_vectors(count, [&](int64_t i, auto part) { store(out + i, splat(value), part); });
}

template <class T>
void forward(const GroupedLinear& call) {
  const GroupedRows& rows = call.rows;
  for_each_block(rows, kBlockColumns, [&](int64_t layer, const Block& block) {
    if (block.columns) multiply_block<T>(call, rows.starts[layer], block);
    if (block.first_column + block.columns < rows.lengths[layer]) return;
    for (int64_t m = 0; m < block.rows; ++m) {
      T* out = static_cast<T*>(call.out[block.first_row + m]);
      fill(out + rows.lengths[layer], call.max_out - rows.lengths[layer], -kInf);
    }
  });
}

}  // namespace

void grouped_linear(const GroupedLinear& call) {
  with_storage(call.weight.dtype, [&](auto number) { forward<decltype(number)>(call); });
}

}  // namespace fastprompt::FASTPROMPT_ISA
