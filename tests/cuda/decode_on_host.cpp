// The kernels' bodies on the host machine, behind one C function for the tests.
#define FASTPROMPT_HOST_MACHINE

#include "cuda/attend.cuh"
#include "cuda/merge.cuh"
#include "cuda/schedule.h"

namespace fastprompt::cuda {
namespace {

using Body = void (*)(void*);

template <class F, int D>
void decode_body(void* call) {
  decode<F, D>(*static_cast<const Call*>(call), host::running().shared());
}
template <class F, int D>
void merge_body(void* call) {
  merge<F, D>(*static_cast<const Call*>(call));
}

template <class F>
Body body(int head_dim, bool merging) {
#if !defined(FASTPROMPT_HOST_ONE_INSTANCE)
  if (head_dim == 96) return merging ? merge_body<F, 96> : decode_body<F, 96>;
  if (head_dim == 128) return merging ? merge_body<F, 128> : decode_body<F, 128>;
  if (head_dim == 256) return merging ? merge_body<F, 256> : decode_body<F, 256>;
#endif
  return head_dim != 64 ? nullptr : merging ? merge_body<F, 64> : decode_body<F, 64>;
}

Body body(fastprompt_dtype dtype, int head_dim, bool merging) {
#if !defined(FASTPROMPT_HOST_ONE_INSTANCE)
  if (dtype == FASTPROMPT_FP16) return body<Fp16>(head_dim, merging);
#endif
  return dtype != FASTPROMPT_BF16 ? nullptr : body<Bf16>(head_dim, merging);
}

}  // namespace
}  // namespace fastprompt::cuda

// The checks and the schedule of a call, as fastprompt_decode_schedule.
extern "C" int fastprompt_host_schedule(const fastprompt_decode_args* args, const fastprompt_chip* chip,
                                        fastprompt_decode_schedule_t* schedule) {
  return fastprompt::cuda::make_schedule(*args, *chip, *schedule);
}

// Runs a schedule; `copies` is one of host::Copies. NULL, or what went wrong.
extern "C" const char* fastprompt_host_decode(const fastprompt_decode_args* args,
                                              const fastprompt_decode_schedule_t* schedule, int copies, uint64_t seed) {
  using namespace fastprompt::cuda;
  static std::string error;
  Call call = {*args, *schedule};
  const auto run = [&](bool merging, int blocks, int warps, int shared_bytes) {
    const Body what = body(args->dtype, args->head_dim, merging);
    if (what == nullptr) error = "not compiled";
    for (int b = 0; b < blocks && error.empty(); ++b)
      if (!host::running().run(b, blocks, 32 * warps, shared_bytes, what, &call, static_cast<host::Copies>(copies),
                               seed * 1000003 + b))
        error = "block " + std::to_string(b) + ", " + host::running().error();
  };
  error.clear();
  run(false, schedule->blocks, schedule->warps, schedule->shared_bytes);
  run(true, schedule->merge_blocks, kMergeWarps, 0);
  return error.empty() ? nullptr : error.c_str();
}
