// Linear layers over rows that lie anywhere in memory: dot products of rows of x and of weight, nothing packed.

#include "cpu/blocks.h"

namespace fastprompt::FASTPROMPT_ISA {
namespace {

constexpr int64_t kBlockColumns = 64, kBlockDepth = 1024;

// A tile has kWidth sums. Where it has fewer rows times columns, as many of them as fit in are parts of one.
constexpr int kTileRows = kWidth == 16 ? 4 : 2, kFewColumns = 2;

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

// Adds to `sums`, rows of a stride, the products of kM rows of x with kN rows of weight, over `depth` numbers.
// A lone row only waits for memory: it asks for the rows of the tiles after it, `ahead` being the next one of x.
template <class T, int kM, int kN>
FP_INLINE void dot_tile(float* sums, int64_t stride, const T* const (&a)[kM], const T* const (&b)[kN], const T* ahead,
                        int64_t at, int64_t depth) {
  constexpr int kParts = kWidth / (kM * kN), kStep = Dot<T>::kStep;
  vf sum[kWidth] = {};
  const auto step = [&](int64_t k, int part, auto size) {
    if constexpr (kM == 1) {
      __builtin_prefetch(ahead + k);
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) __builtin_prefetch(b[n] + k + kN * (b[1] - b[0]), 0, 2);
    }
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) {
        vf& s = sum[(m * kN + n) * kParts + part];
        s = Dot<T>::step(s, a[m] + k, b[n] + k, size);
      }
  };
  int64_t k = at;
  for (; k + kParts * kStep <= at + depth; k += kParts * kStep) {
#pragma GCC unroll 16
    for (int part = 0; part < kParts; ++part) step(k + part * kStep, part, Whole{});
  }
  for (; kParts > 1 && k + kStep <= at + depth; k += kStep) step(k, 0, Whole{});
  for (; k < at + depth; k += kWidth) step(k, 0, Part{static_cast<int>(least<int64_t>(kWidth, at + depth - k))});
  const vf total = sums_of(sum);
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n)
#pragma GCC unroll 16
      for (int part = 0; part < kParts; ++part) sums[m * stride + n] += total[(m * kN + n) * kParts + part];
}

// The sums of a block in tiles of kM rows and kN columns, in `sums` of rows of a stride: both are rounded up to whole
// tiles.
template <class T, int kM, int kN>
void sum_block(const GroupedLinear& call, const Block& block, float* sums, int64_t stride) {
  const int64_t size = call.weight.size[1];
  const int64_t first = call.rows.starts[block.layer] + block.first_column;
  const T* weight = call.weight.as<T>() + first * call.weight.stride[0];
  const int64_t rows = call.rows.offsets[call.rows.layers];
  const T* ahead = static_cast<const T*>(call.rows.x[least(block.first_row + 1, rows - 1)]);
  for (int64_t at = 0; at < size; at += kBlockDepth) {
    for (int64_t column = 0; column < block.columns; column += kN) {
      const T* b[kN];  // past the edge the last one again
      for (int n = 0; n < kN; ++n) b[n] = weight + least(column + n, block.columns - 1) * call.weight.stride[0];
      for (int64_t row = 0; row < block.rows; row += kM) {
        const T* a[kM];
        for (int m = 0; m < kM; ++m) {
          a[m] = static_cast<const T*>(call.rows.x[block.first_row + least(row + m, block.rows - 1)]);
        }
        dot_tile(sums + row * stride + column, stride, a, b, ahead, at, least(kBlockDepth, size - at));
      }
    }
  }
}

template <class T>
void multiply_block(const GroupedLinear& call, const Block& block) {
  const int64_t stride = round_up(block.columns, kWidth), count = round_up(block.rows, kTileRows) * stride;
  float* sums = static_cast<float*>(thread_scratch(count * sizeof(float)));
  memset(sums, 0, count * sizeof(float));
  const bool narrow = block.columns <= kFewColumns;
  if (block.rows == 1) {
    narrow ? sum_block<T, 1, kFewColumns>(call, block, sums, stride)
           : sum_block<T, 1, kWidth>(call, block, sums, stride);
  } else {
    narrow ? sum_block<T, kTileRows, kFewColumns>(call, block, sums, stride)
           : sum_block<T, kTileRows, kWidth / kTileRows>(call, block, sums, stride);
  }
  const T* bias = call.bias ? call.bias.as<T>() + call.rows.starts[block.layer] + block.first_column : nullptr;
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
  for_each_block(rows, kBlockColumns, [&](const Block& block) {
    const int64_t length = rows.lengths[block.layer];
    if (block.columns) multiply_block<T>(call, block);
    if (block.first_column + block.columns < length) return;
    for (int64_t m = 0; m < block.rows; ++m) {
      fill(static_cast<T*>(call.out[block.first_row + m]) + length, call.max_out - length, -kInf);
    }
  });
}

}  // namespace

void grouped_linear(const GroupedLinear& call) {
  with_storage(call.weight.dtype, [&](auto number) { forward<decltype(number)>(call); });
}

}  // namespace fastprompt::FASTPROMPT_ISA
