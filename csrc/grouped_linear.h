// A linear layer of its own for each row of a batch: which rows share one. The kernels of csrc/cpu do the products.
#pragma once

#include "view.h"

namespace fastprompt {

// `x` [B, M, E], `weight` [R, E], `bias` [R] or missing, in one dtype; the last dimension of each is contiguous.
// Throws ArgumentError for what does not fit, layers longer than `max_out` too.
void check_grouped_linear(const View& x, const View& weight, const View& bias, const Index& start, const Index& length,
                          int64_t max_out);

// `out` [B, M, max_out] for these, which are checked.
void grouped_linear(const View& out, const View& x, const View& weight, const View& bias, const Index& start,
                    const Index& length);

// `dout` float32 [B, M, max_out]; `dx` like x, `dweight` [R, E] and `dbias` [R] float32, contiguous and zero, each
// missing where nobody wants it.
void grouped_linear_backward(const View& dx, const View& dweight, const View& dbias, const View& dout, const View& x,
                             const View& weight, const Index& start, const Index& length);

}  // namespace fastprompt
