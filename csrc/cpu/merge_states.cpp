// Merging two partial attentions by their lse: one pass over memory, forward and backward.

#include <cmath>

#include "calls.h"
#include "cpu/rows.h"
#include "parallel.h"

namespace fastprompt::FASTPROMPT_ISA {
namespace {

constexpr int64_t kNumbersPerUnit = 32768;

// What each part contributes to a query, and the lse of both; a part that saw nothing has share 0.
struct Shares {
  float a, b, lse;
};

FP_INLINE Shares shares(float lse_a, float lse_b) {
  const float top = lse_a <= lse_b ? lse_b : lse_a;  // a NaN in either reaches the total
  if (top == -kInf) return {0, 0, -kInf};
  const float a = expf(lse_a - top), b = expf(lse_b - top);
  return {a / (a + b), b / (a + b), top + logf(a + b)};
}

// f(b, n, h) for every query and head of `out`, side by side on several threads.
template <class F>
void for_each_row(const View& out, F f) {
  const int64_t tokens = out.size[0] * out.size[1], queries = out.size[1], heads = out.size[2];
  const int64_t step = most<int64_t>(1, kNumbersPerUnit / most<int64_t>(1, heads * out.size[3]));
  for_each_unit((tokens + step - 1) / step, [&](int64_t unit) {
    for (int64_t t = unit * step; t < least(tokens, (unit + 1) * step); ++t) {
      for (int64_t h = 0; h < heads; ++h) f(t / queries, t % queries, h);
    }
  });
}

FP_INLINE float& at(const View& lse, int64_t b, int64_t n, int64_t h) { return *row_of<float>(lse, b, h, n); }

template <class T>
void merge(const MergeStates& call) {
  const int64_t size = call.out.size[3];
  for_each_row(call.out, [&](int64_t b, int64_t n, int64_t h) {
    const Shares share = shares(at(call.lse_a, b, n, h), at(call.lse_b, b, n, h));
    at(call.lse, b, n, h) = share.lse;
    const T *out_a = row_of<T>(call.out_a, b, n, h), *out_b = row_of<T>(call.out_b, b, n, h);
    T* out = row_of<T>(call.out, b, n, h);
    for_vectors(size, [&](int64_t i, auto part) {
      vf sum = {};  // what a part without a share holds may be anything
      if (share.a != 0) sum += share.a * load(out_a + i, part);
      if (share.b != 0) sum += share.b * load(out_b + i, part);
      store(out + i, sum, part);
    });
  });
}

template <class T>
void merge_backward(const MergeStatesBackward& call) {
  const int64_t size = call.dout.size[3];
  for_each_row(call.dout, [&](int64_t b, int64_t n, int64_t h) {
    const Shares share = shares(at(call.lse_a, b, n, h), at(call.lse_b, b, n, h));
    const T *out_a = row_of<T>(call.out_a, b, n, h), *out_b = row_of<T>(call.out_b, b, n, h);
    const T* dout = row_of<T>(call.dout, b, n, h);
    T *dout_a = row_of<T>(call.dout_a, b, n, h), *dout_b = row_of<T>(call.dout_b, b, n, h);
    vf dot = {};
    for_vectors(size, [&](int64_t i, auto part) {
      const vf d = load(dout + i, part);
      vf apart = {};
      if (share.a != 0) apart += load(out_a + i, part);
      if (share.b != 0) apart -= load(out_b + i, part);
      dot += d * apart;
      store(dout_a + i, d * share.a, part);
      store(dout_b + i, d * share.b, part);
    });
    // d out / d share is the difference of the parts, and share_a * share_b the derivative of the share by lse_a
    const float slope = sum_of(dot) * share.a * share.b, dlse = at(call.dlse, b, n, h);
    at(call.dlse_a, b, n, h) = dlse * share.a + slope;
    at(call.dlse_b, b, n, h) = dlse * share.b - slope;
  });
}

}  // namespace

void merge_states(const MergeStates& call) {
  with_storage(call.out.dtype, [&](auto number) { merge<decltype(number)>(call); });
}

void merge_states_backward(const MergeStatesBackward& call) {
  with_storage(call.dout.dtype, [&](auto number) { merge_backward<decltype(number)>(call); });
}

}  // namespace fastprompt::FASTPROMPT_ISA
