// Merging two partial attentions by their lse: one pass over memory, forward and backward.

#include "calls.h"
#include "cpu/rows.h"
#include "parallel.h"

namespace fastprompt::FASTPROMPT_ISA {
namespace {

constexpr int64_t kFewestNumbers = 8192, kUnitsPerThread = 4;

// What each part contributes to a query, and the lse of both; a part that saw nothing has share 0.
struct Shares {
  float a, b, lse;
};

// The same for many: of two lse they become shares, beside the lse of both. Their count is a multiple of kWidth.
void find_shares(float* a, float* b, float* lse, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const vf lse_a = load(a + i), lse_b = load(b + i), apart = lse_b - lse_a, top = vmax(lse_a, lse_b);
    const vf less = exp2<6>(-kLog2e * vmax(apart, -apart));  // the smaller weight, of a larger one of 1
    const vf large = 1.0f / (1.0f + less), small = less * large;
    const vi none = top == -kInf, more_b = apart > 0;
    store(a + i, none ? vf{} : more_b ? small : large);
    store(b + i, none ? vf{} : more_b ? large : small);
    store(lse + i, none ? top : top + log1p(less));
  }
}

FP_INLINE float& at(const View& lse, int64_t b, int64_t n, int64_t h) { return *row_of<float>(lse, b, h, n); }

// f(b, n, h, shares) for every query and head of `out`, side by side on several threads.
template <class F>
void for_each_row(const View& out, const View& lse_a, const View& lse_b, F f) {
  const int64_t tokens = out.size[0] * out.size[1], queries = out.size[1], heads = out.size[2];
  const int64_t fewest = kFewestNumbers / most<int64_t>(1, heads * out.size[3]);
  const int64_t step = most(most<int64_t>(1, fewest), 1 + tokens / (kUnitsPerThread * num_threads()));
  for_each_unit((tokens + step - 1) / step, [&](int64_t unit) {
    const int64_t first = unit * step, last = least(tokens, first + step);
    const int64_t room = round_up((last - first) * heads, kWidth);
    float* a = static_cast<float*>(thread_scratch(3 * room * sizeof(float)));
    float *b = a + room, *lse = b + room;
    const auto walk = [&](auto each) {
      int64_t i = 0;
      for (int64_t t = first; t < last; ++t) {
        for (int64_t h = 0; h < heads; ++h, ++i) each(t / queries, t % queries, h, i);
      }
    };
    walk([&](int64_t row, int64_t n, int64_t h, int64_t i) {
      a[i] = at(lse_a, row, n, h);
      b[i] = at(lse_b, row, n, h);
    });
    for (int64_t i = (last - first) * heads; i < room; ++i) a[i] = b[i] = 0;
    find_shares(a, b, lse, room);
    walk([&](int64_t row, int64_t n, int64_t h, int64_t i) { f(row, n, h, Shares{a[i], b[i], lse[i]}); });
  });
}

// x, or 0 where a part without a share holds it: that may be anything.
FP_INLINE vf kept(vf x, float share) { return share != 0 ? x : vf{}; }

template <class T>
void merge(const MergeStates& call) {
  const int64_t size = call.out.size[3];
  for_each_row(call.out, call.lse_a, call.lse_b, [&](int64_t b, int64_t n, int64_t h, Shares share) {
    at(call.lse, b, n, h) = share.lse;
    const T *out_a = row_of<T>(call.out_a, b, n, h), *out_b = row_of<T>(call.out_b, b, n, h);
    T* out = row_of<T>(call.out, b, n, h);
    for_vectors(size, [&](int64_t i, auto part) {
      const vf from_a = kept(load(out_a + i, part), share.a), from_b = kept(load(out_b + i, part), share.b);
      store(out + i, share.a * from_a + share.b * from_b, part);
    });
  });
}

template <class T>
void merge_backward(const MergeStatesBackward& call) {
  const int64_t size = call.dout.size[3];
  for_each_row(call.dout, call.lse_a, call.lse_b, [&](int64_t b, int64_t n, int64_t h, Shares share) {
    const T *out_a = row_of<T>(call.out_a, b, n, h), *out_b = row_of<T>(call.out_b, b, n, h);
    const T* dout = row_of<T>(call.dout, b, n, h);
    T *dout_a = row_of<T>(call.dout_a, b, n, h), *dout_b = row_of<T>(call.dout_b, b, n, h);
    vf dot = {};
    for_vectors(size, [&](int64_t i, auto part) {
      const vf d = load(dout + i, part);
      dot += d * (kept(load(out_a + i, part), share.a) - kept(load(out_b + i, part), share.b));
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
