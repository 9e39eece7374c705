// The kernels themselves: one pair for each dtype and head size, listed where a dtype's file is compiled.
#pragma once

#include "cuda/attend.cuh"
#include "cuda/kernels.h"
#include "cuda/merge.cuh"

namespace fastprompt::cuda {

template <class F, int D>
__global__ void __launch_bounds__(128, 2) paged_prefix_attention_decode_kernel(const __grid_constant__ Call call) {
  extern __shared__ __align__(128) char shared[];
  decode<F, D>(call, shared);
}

template <class F, int D>
__global__ void __launch_bounds__(kMergeWarps* kLanes)
    paged_prefix_attention_decode_merge_kernel(const __grid_constant__ Call call) {
  merge<F, D>(call);
}

template <class F, int D>
Kernels kernels_of() {
  return {reinterpret_cast<const void*>(paged_prefix_attention_decode_kernel<F, D>),
          reinterpret_cast<const void*>(paged_prefix_attention_decode_merge_kernel<F, D>)};
}

template <class F>
Kernels kernels_of(int head_dim) {
  if (head_dim == 64) return kernels_of<F, 64>();
  if (head_dim == 96) return kernels_of<F, 96>();
  if (head_dim == 128) return kernels_of<F, 128>();
  return kernels_of<F, 256>();
}

}  // namespace fastprompt::cuda
