// What the algorithm asks of a machine: PTX when nvcc compiles for a GPU, functions of the same names on a host.
//
// The tests compile these headers as plain C++ with FASTPROMPT_HOST_MACHINE, where threads are coroutines and warp
// operations wait for all lanes (tests/cuda/machine/host.h). Nothing beside this file knows which of the two it is.
#pragma once

#include <stdint.h>

#if defined(FASTPROMPT_HOST_MACHINE)
#include "machine/host.h"
#else
#include "cuda/ptx.cuh"
#endif

namespace fastprompt::cuda {

constexpr int kLanes = 32;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

struct alignas(16) Bytes16 {
  uint32_t words[4];
};
struct alignas(8) Pair {
  float x, y;
};

FP_DEVICE float no_weight() { return -HUGE_VALF; }

FP_DEVICE int lane() { return thread() % kLanes; }
FP_DEVICE int warp() { return thread() / kLanes; }

template <class T>
FP_DEVICE T lesser(T a, T b) {
  return b < a ? b : a;
}
template <class T>
FP_DEVICE T larger(T a, T b) {
  return a < b ? b : a;
}
FP_DEVICE float larger(float a, float b) { return fmaxf(a, b); }  // one instruction; of a number and NaN, the number
FP_DEVICE int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

}  // namespace fastprompt::cuda
