// Two partial attentions merged: what must fit together. The kernel of csrc/cpu does the rest.
#pragma once

#include "calls.h"

namespace fastprompt {

// Throws ArgumentError for tensors that do not fit.
void merge_states(const MergeStates& call);

}  // namespace fastprompt
