// The end of a block's work: the softmaxes of its warps become one, in order, and results or partial states are
// written.
#pragma once

#include "cuda/softmax.cuh"

namespace fastprompt::cuda {

// What warps hand over: in the first stage of the ring, which is not in use any more.
template <int D>
struct Exchange {
  static constexpr int kPitch = D + 8;  // numbers of a row, so that rows begin in different banks
  static_assert(kTileRows * kPitch * sizeof(float) <= Slice<D>::kBytes, "a warp's values fit into its slice");

  float* values;  // [warps, 16, kPitch]
  float* sums;    // [warps, 16, 2]: largest logit, sum of weights

  FP_DEVICE void put(State<D>& state) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      state.sum[h] += shfl_xor(state.sum[h], 1);
      state.sum[h] += shfl_xor(state.sum[h], 2);
      const int row = warp() * kTileRows + lane() / 4 + 8 * h;
      float* to = values + row * kPitch + lane() % 4 * 2;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        to[j * 8] = state.values[j][2 * h];
        to[j * 8 + 1] = state.values[j][2 * h + 1];
      }
      if (lane() % 4 == 0) {
        sums[2 * row] = state.top[h];
        sums[2 * row + 1] = state.sum[h];
      }
    }
  }
};

FP_DEVICE float sink_of(const Call& c, int32_t head) {
  if (c.args.sinks_dtype == FASTPROMPT_FP32) return static_cast<const float*>(c.args.sinks)[head];
  const uint16_t x = static_cast<const uint16_t*>(c.args.sinks)[head];
  return c.args.sinks_dtype == FASTPROMPT_BF16 ? Bf16::widen(x) : Fp16::widen(x);
}

// Two numbers of a result, from d on.
template <class F>
FP_DEVICE void store_result(const Call& c, int64_t place, int32_t head, int d, Pair pair) {
  const int64_t at = (place * c.args.heads + head) * c.args.head_dim + d;
  *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(c.args.out) + at) = F::pack(pair.x, pair.y);
}
FP_DEVICE void store_log(const Call& c, int64_t place, int32_t head, float log) {
  if (c.args.lse != nullptr) c.args.lse[head * c.args.tokens + place] = log * kLn2;
}

// One row: the states of the warps that saw it, from `first` in steps of `step`.
template <class F, int D>
FP_DEVICE void finish_row(const Call& c, const Work& w, const Exchange<D>& from, const QueryRow& row, int first,
                          int step, int count) {
  const float sink = w.sinks ? sink_of(c, row.head) * kLog2e : no_weight();
  float top = sink;
  for (int i = 0; i < count; ++i) top = larger(top, from.sums[2 * (first + i * step)]);
  const float base = top == no_weight() ? 0.0f : top;
  float sum = exp2_of(sink - base);
  for (int i = 0; i < count; ++i)
    sum += exp2_of(from.sums[2 * (first + i * step)] - base) * from.sums[2 * (first + i * step) + 1];
  const float inverse = sum == 0 ? 0.0f : 1.0f / sum, log = sum == 0 ? no_weight() : base + log2_of(sum);
  const int64_t at = state_index(c, row.row, row.head, w.slot);
  for (int d = 2 * lane(); d < D; d += 2 * kLanes) {
    Pair sums = {0.0f, 0.0f};
    for (int i = 0; i < count; ++i) {
      const float weight = exp2_of(from.sums[2 * (first + i * step)] - base) * inverse;
      const float* values = from.values + (first + i * step) * from.kPitch + d;
      sums.x += weight * values[0];
      sums.y += weight * values[1];
    }
    if (w.whole)
      store_result<F>(c, row.place, row.head, d, sums);
    else
      *state_pair(c, at * D + d) = sums;
  }
  if (lane() == 0 && w.whole) store_log(c, row.place, row.head, log);
  if (lane() == 0 && !w.whole) state_logs(c)[at] = log;
}

// All rows of the block; `tiles` warps hold different rows, the others more keys of the same.
template <class F, int D>
FP_DEVICE void finish(const Call& c, const Work& w, const Exchange<D>& from, int tiles, int copies) {
  for (int32_t r = warp(); r < w.rows; r += c.schedule.warps) {
    const QueryRow row = query_row(c, w, r);
    if (row.place >= 0) finish_row<F, D>(c, w, from, row, r, tiles * kTileRows, copies);
  }
}

// A part without keys: who merges sees that it has no weight, and reads no values.
FP_DEVICE void leave_empty(const Call& c, const Work& w) {
  for (int32_t r = thread(); r < w.rows; r += kLanes * c.schedule.warps) {
    const QueryRow row = query_row(c, w, r);
    if (row.place >= 0) state_logs(c)[state_index(c, row.row, row.head, w.slot)] = no_weight();
  }
}

}  // namespace fastprompt::cuda
