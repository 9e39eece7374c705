// Virtual tokens and text embeddings in one padded tensor: where each goes. The kernels of csrc/cpu move them.
#pragma once

#include "calls.h"

namespace fastprompt {

// Both throw ArgumentError for what does not fit.
void embed_prompts(const EmbedPrompts& call);

// Gradients by `call.out`, which holds that of the output here, with any strides but contiguous rows. Sums go into
// `dweight` and `dprompts`, which hold zeros or are missing where nobody wants them.
void embed_prompts_backward(const EmbedPrompts& call, const View& dweight, const View& dprompts);

}  // namespace fastprompt
