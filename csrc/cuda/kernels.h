// Where the launcher finds its kernels.
#pragma once

namespace fastprompt::cuda {

struct Kernels {
  const void* decode;
  const void* merge;
};

Kernels kernels_bf16(int head_dim);
Kernels kernels_fp16(int head_dim);

}  // namespace fastprompt::cuda
