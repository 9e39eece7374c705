// Rows of numbers gathered from two tables, and summed back into one.

#include "calls.h"
#include "cpu/rows.h"
#include "parallel.h"

namespace fastprompt::FASTPROMPT_ISA {
namespace {

constexpr int64_t kNumbersPerUnit = 32768;

// f(first, last) for runs of `count` rows of about `numbers` numbers each, side by side on several threads.
template <class F>
void for_each_run(int64_t count, int64_t numbers, F f) {
  const int64_t step = most<int64_t>(1, kNumbersPerUnit / most<int64_t>(1, numbers));
  for_each_unit((count + step - 1) / step, [&](int64_t unit) { f(unit * step, least(count, (unit + 1) * step)); });
}

template <class To, class From>
FP_INLINE void copy_row(To* to, const From* from, int64_t size, float scale) {
  for_vectors(size, [&](int64_t i, auto part) { store(to + i, scale * load(from + i, part), part); });
}
template <class T>
FP_INLINE void copy_row(T* to, const T* from, int64_t size, float scale) {
  constexpr int64_t kLong = 4096;  // bytes from which memcpy as a whole takes less time
  if (scale != 1) {
    copy_row<T, T>(to, from, size, scale);
  } else if (size * static_cast<int64_t>(sizeof(T)) >= kLong) {
    memcpy(to, from, size * sizeof(T));
  } else {
    for_vectors(size, [&](int64_t i, auto part) { memcpy(to + i, from + i, numbers_of(part) * sizeof(T)); });
  }
}

template <class Text, class Virtual>
void gather(const GatherRows& call) {
  const int64_t size = call.out.size[2];
  for_each_run(call.out.size[0] * call.out.size[1], size, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      Text* out = call.out.as<Text>() + i * size;
      const int64_t source = call.source[i];
      if (source == GatherRows::kPadding) {
        memset(out, 0, size * sizeof(Text));
      } else if (source >= 0) {
        copy_row(out, call.weight.as<Text>() + source * call.weight.stride[0], size, call.scale);
      } else {
        const int64_t token = GatherRows::virtual_token(source);
        copy_row(out, call.prompts.as<Virtual>() + token * call.prompts.stride[0], size, 1);
      }
    }
  });
}

// The sum of some rows of `call.rows` over kN vectors from column `i` on.
template <class From, class To, int kN, class Size>
FP_INLINE void sum_columns(const SumRows& call, int64_t first, int64_t last, To* to, int64_t i, Size size) {
  vf sum[kN] = {};
  for (int64_t at = first; at < last; ++at) {
    const int64_t place = call.places[at], length = call.rows.size[1];
    const From* row = row_of<From>(call.rows, place / length, place % length, 0) + i;
    for (int n = 0; n < kN; ++n) sum[n] += load(row + n * kWidth, size);
  }
  for (int n = 0; n < kN; ++n) store(to + i + n * kWidth, call.scale * sum[n], size);
}

template <class From, class To>
void sum(const SumRows& call) {
  constexpr int kVectors = 4;
  const int64_t size = call.out.size[1], places = call.offsets[call.count];
  for_each_run(call.count, places * size / most<int64_t>(1, call.count), [&](int64_t first, int64_t last) {
    for (int64_t target = first; target < last; ++target) {
      To* to = call.out.as<To>() + call.targets[target] * call.out.stride[0];
      const int64_t begin = call.offsets[target], end = call.offsets[target + 1];
      int64_t i = 0;
      for (; i + kVectors * kWidth <= size; i += kVectors * kWidth) {
        sum_columns<From, To, kVectors>(call, begin, end, to, i, Whole{});
      }
      for_vectors(size - i, [&](int64_t j, auto part) { sum_columns<From, To, 1>(call, begin, end, to, i + j, part); });
    }
  });
}

}  // namespace

void gather_rows(const GatherRows& call) {
  with_storage(call.out.dtype, [&](auto text) {
    with_storage(call.prompts.dtype, [&](auto token) { gather<decltype(text), decltype(token)>(call); });
  });
}

void sum_rows(const SumRows& call) {
  with_storage(call.rows.dtype, [&](auto from) {
    with_storage(call.out.dtype, [&](auto to) { sum<decltype(from), decltype(to)>(call); });
  });
}

}  // namespace fastprompt::FASTPROMPT_ISA
