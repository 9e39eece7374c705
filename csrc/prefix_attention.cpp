#include "prefix_attention.h"

#include <algorithm>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "errors.h"
#include "plan.h"

namespace fastprompt {
namespace {

// The rows of a call sorted by prompt: as a plan says, or found out here.
class Order {
 public:
  Order(const AttentionCall& call, const Index& plan) {
    if (!plan) {
      rows_.resize(4 * call.rows + 1);
      build_plan(call.prefix_start, call.prefix_len, call.rows, rows_.data());
      return;
    }
    const int64_t capacity = (plan.size - 1) / 4;
    while (static_cast<int64_t>(rows_.size()) < capacity && plan[rows_.size()] >= 0)
      rows_.push_back(plan[rows_.size()]);
    if (static_cast<int64_t>(rows_.size()) != call.rows) {
      throw ArgumentError("plan holds " + std::to_string(rows_.size()) + " rows, the batch has " +
                          std::to_string(call.rows) + "; build a plan for it");
    }
    std::vector<bool> seen(call.rows);
    for (const int32_t row : rows_) {
      if (row >= call.rows || seen[row]) refuse();
      seen[row] = true;
    }
    for (int64_t g = 0, at = 0; at < call.rows; ++g) {
      const int64_t first = rows_[at], end = plan[capacity + g + 1];
      if (end <= at || end > call.rows) refuse();
      for (; at < end; ++at) check_pair(call, first, rows_[at]);
    }
  }

  const int32_t* data() const { return rows_.data(); }

 private:
  [[noreturn]] static void refuse() {
    throw ArgumentError("plan is not one that BatchPlan.build made; build one from this batch");
  }

  static void check_pair(const AttentionCall& call, int64_t first, int64_t row) {
    const bool same = call.prefix_len[first] == call.prefix_len[row] &&
                      (!call.prefix_len[row] || call.prefix_start[first] == call.prefix_start[row]);
    if (!same) {
      throw ArgumentError(
          "plan puts row " + std::to_string(row) + " with row " + std::to_string(first) +
          ", but prefix_start and prefix_len give them different prompts; build the plan from this batch");
    }
  }

  std::vector<int32_t> rows_;
};

void check_bias(const AttentionCall& call) {
  if (!call.prefix_bias) return;
  int64_t longest = 0;
  for (int64_t b = 0; b < call.rows; ++b) longest = std::max(longest, call.prefix_len[b]);
  if (longest > call.prefix_bias.size[3]) {
    throw ArgumentError("prefix_bias has " + std::to_string(call.prefix_bias.size[3]) +
                        " columns, the longest prefix has " + std::to_string(longest) +
                        " tokens; give a column for each");
  }
}

void check_offsets(const Index& q_start, int64_t tokens) {
  const int64_t rows = q_start.size - 1;
  bool rising = q_start[0] == 0 && q_start[rows] == tokens;
  for (int64_t b = 0; b < rows; ++b) rising = rising && q_start[b] <= q_start[b + 1];
  if (!rising) throw ArgumentError("q_start does not rise from 0 to the " + std::to_string(tokens) + " queries");
}

void check_pages(const AttentionCall& call) {
  const int64_t blocks = call.k.size[0], page = call.k.size[1], room = call.block_table.columns * page;
  check_offsets(call.q_start, call.q.size[0]);
  for (int64_t b = 0; b < call.rows; ++b) {
    const int64_t length = call.kv_len[b], queries = call.q_start[b + 1] - call.q_start[b];
    if (length < queries || length > room) {
      throw ArgumentError("kv_len[" + std::to_string(b) + "] is " + std::to_string(length) +
                          ", expected at least the row's " + std::to_string(queries) + " queries and at most the " +
                          std::to_string(room) + " tokens of its block table");
    }
    const Index row = call.block_table[b];
    for (int64_t i = 0; i * page < length; ++i) {
      if (row[i] < 0 || row[i] >= blocks) {
        throw ArgumentError("block_table names a block outside 0.." + std::to_string(blocks - 1) +
                            " within some row's kv_len");
      }
    }
  }
}

// Dimensions of size 1 stand for any size.
void broadcast(View& view) {
  for (int i = 0; i < view.dims; ++i) {
    if (view.size[i] == 1) view.stride[i] = 0;
  }
}

bool spreads(const View& bias, const AttentionCall& call, int64_t columns) {
  if (!bias) return true;
  if (bias.dtype != Dtype::f32 || !has(bias, {-1, -1, -1, columns})) return false;
  for (int i = 0; i < 3; ++i) {
    if (bias.size[i] != 1 && bias.size[i] != call.q.size[i]) return false;
  }
  return true;
}

// Everything the kernels rely on; Python's checks say what is wrong.
bool fits(const AttentionCall& call) {
  if (call.prefix_k.dims != 3 || call.q.dims < 3) return false;
  for (const View* x : {&call.k, &call.v, &call.prefix_k, &call.prefix_v}) {
    if (x->dtype != call.dtype) return false;
  }
  const int64_t rows = call.rows, dim = call.dim(), value_dim = call.value_dim(), kv_heads = call.kv_heads();
  bool ok = kv_heads > 0 && call.heads() % kv_heads == 0 && call.prefix_start && has(call.prefix_start, rows) &&
            has(call.prefix_k, {-1, -1, -1}) && has(call.prefix_v, {kv_heads, call.prefix_k.size[1], value_dim});
  if (call.paged()) {
    ok = ok && has(call.q, {-1, -1, dim}) && has(call.k, {-1, -1, kv_heads, dim}) &&
         has(call.v, {call.k.size[0], call.k.size[1], kv_heads, value_dim}) && has(call.q_start, rows + 1) &&
         call.kv_len && has(call.kv_len, rows) && call.q_start && call.block_table.rows == rows;
  } else {
    ok = ok && has(call.q, {rows, -1, -1, dim}) && has(call.k, {rows, kv_heads, -1, dim}) &&
         has(call.v, {rows, kv_heads, call.k.size[2], value_dim}) && has(call.q_start, rows) &&
         has(call.kv_len, rows) && has(call.kv_start, rows) && spreads(call.bias, call, call.k.size[2]) &&
         spreads(call.prefix_bias, call, -1);
  }
  return ok && (!call.sinks || (call.sinks.dtype == Dtype::f32 && has(call.sinks, {call.heads()})));
}

// A forward pass was run with lse, and gradients come for its output.
bool fits(const AttentionCall& call, const Gradients& gradients) {
  const int64_t rows = call.rows, heads = call.heads(), queries = call.q.size[2];
  const View &lse = call.lse, &dlse = gradients.dlse;
  return gradients.dout.dtype == call.dtype && has(gradients.dout, {rows, queries, heads, call.value_dim()}) &&
         has(lse, {rows, heads, queries}) && (!dlse || sized(dlse, {rows, heads, queries}));
}

void prepare(AttentionCall& call) {
  call.rows = call.prefix_len.size;
  call.window = std::min(call.window, int64_t{1} << 40);  // as good as none, and sums with it stay in range
  require(fits(call));
  check_extents(call.prefix_start, call.prefix_len, call.prefix_k.size[1], "prefix_start and prefix_len");
  check_bias(call);
  if (call.paged()) check_pages(call);
  broadcast(call.bias);
  broadcast(call.prefix_bias);
}

}  // namespace

void prefix_attention(AttentionCall call, const Index& plan) {
  prepare(call);
  const Order order(call, plan);
  call.order = order.data();
  kernels().prefix_attention(call);
}

void prefix_attention_backward(AttentionCall call, const Index& plan, const Gradients& gradients) {
  prepare(call);
  if (!fits(call, gradients)) throw ArgumentError("gradients of a call that did not keep its lse, or do not fit it");
  const Order order(call, plan);
  call.order = order.data();
  kernels().prefix_attention_backward({call, gradients});
}

}  // namespace fastprompt
