// The second kernel: a row's partial states become its result, in one order.
#pragma once

#include "cuda/finish.cuh"

namespace fastprompt::cuda {

// A warp for each row of the batch and head; those without partial states are left alone.
template <class F, int D>
FP_DEVICE void merge(const Call& c) {
  const int64_t which = int64_t{block()} * kMergeWarps + warp();
  wait_for_previous_kernel();
  if (which >= c.args.rows * c.args.heads) return;
  const int32_t row = static_cast<int32_t>(which / c.args.heads), head = static_cast<int32_t>(which % c.args.heads);
  const int64_t place = query_place(c, row);
  if (place < 0) return;
  const int32_t alone = c.schedule.alone_parts;
  const int32_t parts = row_shares(c, row) ? alone + c.schedule.shared_parts : alone > 1 ? alone : 0;
  if (parts == 0) return;

  const int64_t first = state_index(c, row, head, 0);
  float top = no_weight(), sum = 0.0f;
  const float mine = lane() < parts ? state_logs(c)[first + lane()] : no_weight();
  for (int i = 0; i < parts; ++i) top = larger(top, shfl(mine, i));
  const float base = top == no_weight() ? 0.0f : top, share = exp2_of(mine - base);
  for (int i = 0; i < parts; ++i) sum += shfl(share, i);
  const float inverse = sum == 0 ? 0.0f : 1.0f / sum;

  constexpr int kPairs = (D / 2 + kLanes - 1) / kLanes;
  Pair result[kPairs] = {};
#pragma unroll(D == 96 ? 2 : 8 / kPairs)  // loads that do not wait for each other; a part of no weight has no values
  for (int i = 0; i < parts; ++i) {
    const float weight = shfl(share, i) * inverse;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const int d = 2 * (lane() + p * kLanes);
      Pair state = {0.0f, 0.0f};
      if (weight != 0 && d < D) state = *state_pair(c, (first + i) * D + d);
      result[p].x += weight * state.x;
      result[p].y += weight * state.y;
    }
  }
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const int d = 2 * (lane() + p * kLanes);
    if (d < D) store_result<F>(c, place, head, d, result[p]);
  }
  if (lane() == 0) store_log(c, place, head, sum == 0 ? no_weight() : base + log2_of(sum));
}

}  // namespace fastprompt::cuda
