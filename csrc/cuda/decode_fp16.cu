#include "cuda/kernels.cuh"

namespace fastprompt::cuda {

Kernels kernels_fp16(int head_dim) { return kernels_of<Fp16>(head_dim); }

}  // namespace fastprompt::cuda
