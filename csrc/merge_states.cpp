#include "merge_states.h"

#include "checks.h"
#include "cpu/kernels.h"

namespace fastprompt {
namespace {

// `out` and `lse` were made for the others.
bool fits(const MergeStates& call) {
  const int64_t* size = call.out_a.size;
  const auto fits_out = [&](const View& out) {
    return out.dtype == call.out.dtype && has(out, {size[0], size[1], size[2], size[3]});
  };
  const auto fits_lse = [&](const View& lse) {
    return lse.dtype == Dtype::f32 && sized(lse, {size[0], size[2], size[1]});
  };
  return fits_out(call.out) && fits_out(call.out_a) && fits_out(call.out_b) && fits_lse(call.lse) &&
         fits_lse(call.lse_a) && fits_lse(call.lse_b);
}

}  // namespace

void merge_states(const MergeStates& call) {
  require(fits(call));
  kernels().merge_states(call);
}

}  // namespace fastprompt
