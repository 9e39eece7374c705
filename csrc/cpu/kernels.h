// The kernels that every instruction set has: one line each, here and nowhere else.
#pragma once

#include "attention.h"
#include "calls.h"

// X(name, Call): `void name(const Call&)` in the namespace of each instruction set.
#define FASTPROMPT_KERNELS(X)                      \
  X(prefix_attention, AttentionCall)               \
  X(prefix_attention_backward, AttentionGradients) \
  X(merge_states, MergeStates)                     \
  X(merge_states_backward, MergeStatesBackward)    \
  X(gather_rows, GatherRows)                       \
  X(sum_rows, SumRows)                             \
  X(grouped_linear, GroupedLinear)                 \
  X(grouped_linear_backward, GroupedLinearBackward)

namespace fastprompt {

struct Kernels {
#define FASTPROMPT_POINTER(name, Call) void (*name)(const Call& call);
  FASTPROMPT_KERNELS(FASTPROMPT_POINTER)
#undef FASTPROMPT_POINTER
};

// Those of the instruction set in use.
const Kernels& kernels();

}  // namespace fastprompt
