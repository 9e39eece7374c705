// Going over a row of numbers vector by vector, whatever its dtype and length.
#pragma once

#include "cpu/formats.h"
#include "view.h"

namespace fastprompt::FASTPROMPT_ISA {

// A vector of a row: whole, or the first `lanes` numbers of one at the row's end.
struct Whole {};
struct Part {
  int lanes;
};

constexpr int numbers_of(Whole) { return kWidth; }
constexpr int numbers_of(Part part) { return part.lanes; }

template <class T>
FP_INLINE vf load(const T* p, Whole) {
  return load(p);
}
template <class T>
FP_INLINE vf load(const T* p, Part part) {
  return load_first(p, part.lanes);
}
template <class T>
FP_INLINE void store(T* p, vf v, Whole) {
  store(p, v);
}
template <class T>
FP_INLINE void store(T* p, vf v, Part part) {
  store_first(p, v, part.lanes);
}

// f(first number, Whole or Part) for each vector of a row of n numbers.
template <class F>
FP_INLINE void for_vectors(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) f(i, Whole{});
  if (i < n) f(i, Part{static_cast<int>(n - i)});
}

// f(a number of the type that a dtype is stored in), for its type.
template <class F>
FP_INLINE void with_storage(Dtype dtype, F f) {
  if (dtype == Dtype::f32) return f(float{});
  if (dtype == Dtype::bf16) return f(Bf16{});
  f(F16{});
}

// The row at [i, j, k] of a view of four dimensions.
template <class T>
FP_INLINE T* row_of(const View& x, int64_t i, int64_t j, int64_t k) {
  return x.as<T>() + i * x.stride[0] + j * x.stride[1] + k * x.stride[2];
}

}  // namespace fastprompt::FASTPROMPT_ISA
