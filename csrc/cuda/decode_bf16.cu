#include "cuda/kernels.cuh"

namespace fastprompt::cuda {

Kernels kernels_bf16(int head_dim) { return kernels_of<Bf16>(head_dim); }

}  // namespace fastprompt::cuda
