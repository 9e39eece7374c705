// Attention of each row to its own prefix and its own keys: checks, and which rows share a prompt. The kernels of
// csrc/cpu do the rest.
#pragma once

#include "attention.h"

namespace fastprompt {

// `plan` is BatchPlan.packed; where it is missing the rows are sorted here. These throw ArgumentError for numbers that
// do not fit the tensors.
void prefix_attention(AttentionCall call, const Index& plan);
void prefix_attention_backward(AttentionCall call, const Index& plan, const Gradients& gradients);

}  // namespace fastprompt
