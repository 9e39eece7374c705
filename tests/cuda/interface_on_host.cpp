// csrc/cuda/decode.h for the host machine: what csrc/cuda/bindings.cpp is linked with where there is no GPU.
#include <string>

#include "decode_on_host.cpp"

namespace {

constexpr int kFailed = -100;  // the machine found a fault
std::string fault;

}  // namespace

int fastprompt_decode_schedule(const fastprompt_decode_args* args, const fastprompt_chip* chip,
                               fastprompt_decode_schedule_t* schedule) {
  return fastprompt_host_schedule(args, chip, schedule);
}

// So few multiprocessors that blocks take many items in turn, and that keys are cut in few parts.
int fastprompt_decode_chip(int32_t, fastprompt_chip* chip) {
  *chip = {4, 228 << 10, 227 << 10, 90};
  return FASTPROMPT_DECODE_OK;
}

int fastprompt_decode(const fastprompt_decode_args* args) {
  fastprompt_chip chip;
  fastprompt_decode_schedule_t schedule;
  fastprompt_decode_chip(args->device, &chip);
  const int code = fastprompt_decode_schedule(args, &chip, &schedule);
  if (code != FASTPROMPT_DECODE_OK) return code;
  if (args->workspace_bytes < schedule.workspace_bytes) return FASTPROMPT_DECODE_WORKSPACE;
  const char* found =
      fastprompt_host_decode(args, &schedule, static_cast<int>(fastprompt::cuda::host::Copies::kRandom), 7);
  fault = found ? found : "";
  return found ? kFailed : FASTPROMPT_DECODE_OK;
}

const char* fastprompt_decode_message(int code) {
  return code == kFailed ? fault.c_str() : code == FASTPROMPT_DECODE_ALIGNMENT ? "alignment" : "refused";
}
