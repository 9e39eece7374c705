// The C interface: a schedule, then one launch or two.
#include <cuda_runtime.h>

#include <mutex>

#include "cuda/decode.h"
#include "cuda/kernels.h"
#include "cuda/schedule.h"

namespace fastprompt::cuda {
namespace {

constexpr int kMostDevices = 64;

// A device, for as long as this lives; another runtime's choice is put back after.
class Device {
 public:
  explicit Device(int device) {
    code_ = cudaGetDevice(&before_);
    if (code_ == cudaSuccess && before_ != device) {
      code_ = cudaSetDevice(device);
      changed_ = code_ == cudaSuccess;
    }
  }
  ~Device() {
    if (changed_) cudaSetDevice(before_);
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  int code() const { return code_; }

 private:
  cudaError_t code_;
  int before_ = 0;
  bool changed_ = false;
};

int ask(int device, fastprompt_chip& chip) {
  int major = 0, minor = 0;
  const struct {
    int32_t* to;
    cudaDeviceAttr what;
  } questions[] = {{&chip.multiprocessors, cudaDevAttrMultiProcessorCount},
                   {&chip.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
                   {&chip.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                   {&major, cudaDevAttrComputeCapabilityMajor},
                   {&minor, cudaDevAttrComputeCapabilityMinor}};
  for (const auto& question : questions) {
    const cudaError_t code = cudaDeviceGetAttribute(question.to, question.what, device);
    if (code != cudaSuccess) return code;
  }
  chip.capability = 10 * major + minor;
  return FASTPROMPT_DECODE_OK;
}

// Tells a device once that a kernel takes more shared memory than by default, and to keep room for as many blocks as
// the schedule counts on, the merging kernel's beside them.
int prepare(const Kernels& kernels, int device, int bytes, int which) {
  static std::mutex mutex;
  static int allowed[kMostDevices][8];
  const std::lock_guard<std::mutex> guard(mutex);
  const bool known = device < kMostDevices;
  if (known && allowed[device][which] >= bytes) return FASTPROMPT_DECODE_OK;
  cudaError_t code = cudaFuncSetAttribute(kernels.decode, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  for (const void* kernel : {kernels.decode, kernels.merge})
    if (code == cudaSuccess)
      code =
          cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (known && code == cudaSuccess) allowed[device][which] = bytes;
  return code;
}

int launch(const void* kernel, const Call& call, int blocks, int warps, int shared_bytes, bool behind_another) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(warps * 32);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(call.args.stream);
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = behind_another ? 1 : 0;
  void* params[] = {const_cast<Call*>(&call)};
  return cudaLaunchKernelExC(&config, kernel, params);
}

int run(const fastprompt_decode_args& args) {
  fastprompt_chip chip;
  int code = fastprompt_decode_chip(args.device, &chip);
  Call call = {args, {}};
  if (code == FASTPROMPT_DECODE_OK) code = make_schedule(args, chip, call.schedule);
  if (code != FASTPROMPT_DECODE_OK) return code;
  if (args.workspace_bytes < call.schedule.workspace_bytes) return FASTPROMPT_DECODE_WORKSPACE;
  if (reinterpret_cast<uintptr_t>(args.workspace) % 16) return FASTPROMPT_DECODE_ALIGNMENT;
  if (call.schedule.blocks == 0) return FASTPROMPT_DECODE_OK;

  const bool bf16 = args.dtype == FASTPROMPT_BF16;
  const Kernels kernels = bf16 ? kernels_bf16(args.head_dim) : kernels_fp16(args.head_dim);
  const fastprompt_decode_schedule_t& s = call.schedule;
  const int which = (bf16 ? 0 : 4) + (args.head_dim == 64 ? 0 : args.head_dim == 96 ? 1 : args.head_dim == 128 ? 2 : 3);
  const Device device(args.device);
  code = device.code();
  if (code == FASTPROMPT_DECODE_OK) code = prepare(kernels, args.device, s.shared_bytes, which);
  if (code == FASTPROMPT_DECODE_OK) code = launch(kernels.decode, call, s.blocks, s.warps, s.shared_bytes, false);
  if (code == FASTPROMPT_DECODE_OK && s.merge_blocks > 0)
    code = launch(kernels.merge, call, s.merge_blocks, kMergeWarps, 0, chip.capability >= 90);
  return code;
}

}  // namespace
}  // namespace fastprompt::cuda

int fastprompt_decode_schedule(const fastprompt_decode_args* args, const fastprompt_chip* chip,
                               fastprompt_decode_schedule_t* schedule) {
  return fastprompt::cuda::make_schedule(*args, *chip, *schedule);
}

int fastprompt_decode_chip(int32_t device, fastprompt_chip* chip) {
  using namespace fastprompt::cuda;
  static std::mutex mutex;
  static fastprompt_chip known[kMostDevices];
  if (device < 0) return cudaErrorInvalidDevice;
  if (device >= kMostDevices) return ask(device, *chip);
  const std::lock_guard<std::mutex> guard(mutex);
  if (known[device].multiprocessors == 0) {
    fastprompt_chip found;
    const int code = ask(device, found);
    if (code != FASTPROMPT_DECODE_OK) return code;
    known[device] = found;
  }
  *chip = known[device];
  return FASTPROMPT_DECODE_OK;
}

int fastprompt_decode(const fastprompt_decode_args* args) { return fastprompt::cuda::run(*args); }

const char* fastprompt_decode_message(int code) {
  switch (code) {
    case FASTPROMPT_DECODE_OK:
      return "no error";
    case FASTPROMPT_DECODE_DTYPE:
      return "queries and caches must be bfloat16 or float16, prefixes too or e4m3, sinks not e4m3";
    case FASTPROMPT_DECODE_HEAD_DIM:
      return "the head size must be 64, 96, 128 or 256";
    case FASTPROMPT_DECODE_HEADS:
      return "query heads must be 1 to 16 times the key-value heads";
    case FASTPROMPT_DECODE_ALIGNMENT:
      return "pointers and strides must be multiples of 16 bytes";
    case FASTPROMPT_DECODE_SIZES:
      return "sizes must not be negative, nor keys and work exceed 2^31";
    case FASTPROMPT_DECODE_WORKSPACE:
      return "the workspace is smaller than the schedule says";
    case FASTPROMPT_DECODE_LOADS:
      return "bulk copies need compute capability 9.0";
    case FASTPROMPT_DECODE_CHIP:
      return "the kernel needs compute capability 8.0 and 70 KiB of shared memory";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(code));
  }
}
