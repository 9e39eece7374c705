// The module fastprompt._native: kernels with tensors as arguments, checked and laid out by fastprompt/_cpu/*.py.

#include <pybind11/pybind11.h>

#include "casters.h"
#include "cpu/kernels.h"
#include "embed_prompts.h"
#include "errors.h"
#include "grouped_linear.h"
#include "isa.h"
#include "merge_states.h"
#include "parallel.h"
#include "plan.h"
#include "prefix_attention.h"

namespace fastprompt::python {
namespace {

using released = py::call_guard<py::gil_scoped_release>;

// Hands over torch's thread pool and its way to read tensors; before the first kernel, and once.
void connect(py::capsule tensors, uintptr_t parallel_for, uintptr_t num_threads) {
  read_tensors_by(tensors, dlpack::kCpu);
  set_pool({reinterpret_cast<decltype(Pool::parallel_for)>(parallel_for),
            reinterpret_cast<decltype(Pool::num_threads)>(num_threads)});
}

py::list isas() {
  py::list names;
  for (int i = 0; i < kIsas; ++i) {
    if (can_run(static_cast<Isa>(i))) names.append(name_of(static_cast<Isa>(i)));
  }
  return names;
}

void choose_isa(const std::string& name) {
  for (int i = 0; i < kIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (name == name_of(isa) && can_run(isa)) return use_isa(isa);
  }
  throw py::value_error(name);
}

AttentionCall attention_call(View out, View lse, View q, View k, View v, View prefix_k, View prefix_v,
                             Index prefix_start, Index prefix_len, View sinks, View bias, View prefix_bias,
                             Index kv_start, Index kv_len, Index q_start, IndexTable block_table, bool causal,
                             float scale, int64_t window, float softcap) {
  AttentionCall call;
  call.dtype = q.dtype;
  call.out = out, call.lse = lse;
  call.q = q, call.k = k, call.v = v, call.prefix_k = prefix_k, call.prefix_v = prefix_v;
  call.prefix_start = prefix_start, call.prefix_len = prefix_len;
  call.sinks = sinks, call.bias = bias, call.prefix_bias = prefix_bias;
  call.kv_start = kv_start, call.kv_len = kv_len, call.q_start = q_start, call.block_table = block_table;
  call.causal = causal, call.scale = scale, call.window = window, call.softcap = softcap;
  return call;
}

// Functions for Python: a plan (and gradients), then the arguments of a call.
template <class... Arguments>
auto forward_of(AttentionCall (*make)(Arguments...)) {
  return [make](Index plan, Arguments... arguments) { prefix_attention(make(arguments...), plan); };
}
template <class... Arguments>
auto backward_of(AttentionCall (*make)(Arguments...)) {
  return [make](View dout, View dlse, View dq, View dk, View dv, View dprefix_k, View dprefix_v, View logits_own,
                View logits_prefix, Index plan, Arguments... arguments) {
    prefix_attention_backward(make(arguments...), plan,
                              {dout, dlse, dq, dk, dv, dprefix_k, dprefix_v, logits_own, logits_prefix});
  };
}

void raise_argument_error(std::exception_ptr error) {
  try {
    std::rethrow_exception(error);
  } catch (const ArgumentError& e) {
    py::set_error(py::module_::import("fastprompt.errors").attr("ArgumentError"), e.what());
  }
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  py::register_local_exception_translator(raise_argument_error);
  m.def("connect", connect);
  m.def("num_threads", num_threads);
  m.def("isas", isas, "Instruction sets that can run here, the best last.");
  m.def("isa", [] { return name_of(isa_in_use()); }, "The instruction set in use.");
  m.def("use_isa", choose_isa);

  m.def(
      "build_plan",
      [](py::handle packed, const Numbers& start, const Numbers& length, int64_t capacity) {
        build_plan(start.index, length.index, capacity, static_cast<int32_t*>(borrow(packed).data));
      },
      "Fills an int32 vector of 4 * capacity + 1 numbers from int32 or int64 tensors or lists of ints.");
  m.def("share_prefixes", [](py::handle lists, py::handle packed, const Numbers& queries, int64_t capacity,
                             int64_t most, int64_t fewest, int64_t state_cost, int64_t least_saving) {
    return share_prefixes(static_cast<const int32_t*>(borrow(packed).data), capacity, queries.index,
                          {most, fewest, state_cost, least_saving}, static_cast<int32_t*>(borrow(lists).data));
  });

  m.def("prefix_attention", forward_of(attention_call), released());
  m.def("prefix_attention_backward", backward_of(attention_call), released());

  m.def(
      "merge_states",
      [](View out, View lse, View out_a, View lse_a, View out_b, View lse_b) {
        merge_states({out, lse, out_a, lse_a, out_b, lse_b});
      },
      released());
  m.def(
      "merge_states_backward",
      [](View dout_a, View dlse_a, View dout_b, View dlse_b, View dout, View dlse, View out_a, View lse_a, View out_b,
         View lse_b) {
        kernels().merge_states_backward({dout_a, dlse_a, dout_b, dlse_b, dout, dlse, out_a, lse_a, out_b, lse_b});
      },
      released());

  m.def(
      "embed_prompts",
      [](View out, IndexTable input_ids, View weight, View prompts, Index start, Index length, IndexTable positions,
         Index text_start, Index text_len, bool left, float scale) {
        embed_prompts({out, input_ids, weight, prompts, start, length, positions, text_start, text_len, left, scale});
      },
      released());
  m.def(
      "embed_prompts_backward",
      [](View dweight, View dprompts, View dout, IndexTable input_ids, View weight, View prompts, Index start,
         Index length, IndexTable positions, Index text_start, Index text_len, bool left, float scale) {
        embed_prompts_backward(
            {dout, input_ids, weight, prompts, start, length, positions, text_start, text_len, left, scale}, dweight,
            dprompts);
      },
      released());
  m.def("check_grouped_linear", check_grouped_linear);
  m.def("grouped_linear", grouped_linear, released());
  m.def("grouped_linear_backward", grouped_linear_backward, released());
}

}  // namespace fastprompt::python
