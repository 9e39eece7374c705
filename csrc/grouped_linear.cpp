#include "grouped_linear.h"

#include <string>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "errors.h"
#include "plan.h"

namespace fastprompt {
namespace {

// The layers of a batch with their rows, a row being one token of one of `B` inputs of `M` tokens.
class Layers {
 public:
  Layers(const Index& start, const Index& length, int64_t tokens) : tokens_(tokens), plan_(4 * start.size + 1) {
    build_plan(start, length, start.size, plan_.data());
    const int64_t inputs = start.size;
    const int32_t *offsets = plan_.data() + inputs, *starts = offsets + inputs + 1, *lengths = starts + inputs;
    for (int64_t g = 0; g < inputs && lengths[g] >= 0; ++g) {
      offsets_.push_back(offsets[g] * tokens);
      starts_.push_back(starts[g]);
      lengths_.push_back(lengths[g]);
    }
    offsets_.push_back(inputs * tokens);
  }

  GroupedRows rows(void* const* x) const {
    return {static_cast<int64_t>(starts_.size()), offsets_.data(), starts_.data(), lengths_.data(), x};
  }

  // The address of every row of a tensor [B, M, n].
  std::vector<void*> pointers(const View& tensor) const {
    std::vector<void*> pointers;
    if (!tensor) return pointers;
    pointers.reserve(offsets_.back());
    for (int64_t at = 0; at < tensor.size[0]; ++at) {
      char* row = tensor.as<char>() + plan_[at] * tensor.stride[0] * bytes_of(tensor.dtype);
      for (int64_t t = 0; t < tokens_; ++t) pointers.push_back(row + t * tensor.stride[1] * bytes_of(tensor.dtype));
    }
    return pointers;
  }

 private:
  const int64_t tokens_;
  std::vector<int32_t> plan_;
  std::vector<int64_t> offsets_, starts_, lengths_;
};

bool fits(const View& x, const View& weight, const View& bias, const Index& start, const Index& length) {
  return has(weight, {-1, -1}) && start && length && has(length, start.size) &&
         has(x, {start.size, -1, weight.size[1]}) && x.dtype == weight.dtype &&
         (!bias || (has(bias, {weight.size[0]}) && bias.dtype == weight.dtype));
}

}  // namespace

void check_grouped_linear(const View& x, const View& weight, const View& bias, const Index& start, const Index& length,
                          int64_t max_out) {
  require(fits(x, weight, bias, start, length));
  int64_t longest = 0;
  for (int64_t row = 1; row < length.size; ++row) longest = length[row] > length[longest] ? row : longest;
  if (length.size && length[longest] > max_out) {
    throw ArgumentError("length[" + std::to_string(longest) + "] is " + std::to_string(length[longest]) +
                        ", max_out is " + std::to_string(max_out) + "; raise max_out");
  }
  check_extents(start, length, weight.size[0], "start and length");
}

void grouped_linear(const View& out, const View& x, const View& weight, const View& bias, const Index& start,
                    const Index& length) {
  check_grouped_linear(x, weight, bias, start, length, out.size[2]);
  const Layers layers(start, length, x.size[1]);
  const std::vector<void*> from = layers.pointers(x), to = layers.pointers(out);
  kernels().grouped_linear({layers.rows(from.data()), to.data(), out.size[2], weight, bias});
}

void grouped_linear_backward(const View& dx, const View& dweight, const View& dbias, const View& dout, const View& x,
                             const View& weight, const Index& start, const Index& length) {
  check_grouped_linear(x, weight, {}, start, length, dout.size[2]);
  const Layers layers(start, length, x.size[1]);
  const std::vector<void*> from = layers.pointers(x), by = layers.pointers(dout), to = layers.pointers(dx);
  kernels().grouped_linear_backward({layers.rows(from.data()), reinterpret_cast<const float* const*>(by.data()), weight,
                                     dx ? to.data() : nullptr, dweight.as<float>(), dbias.as<float>()});
}

}  // namespace fastprompt
