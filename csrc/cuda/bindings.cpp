// The module fastprompt._native_cuda: decode.h with tensors as arguments, checked by fastprompt/ops and laid out by
// fastprompt/_cuda. It includes nothing of CUDA, so a host compiler builds it.

#include <pybind11/pybind11.h>

#include "casters.h"
#include "cuda/decode.h"

#ifndef FASTPROMPT_CUDA_ARCHS
#define FASTPROMPT_CUDA_ARCHS ""
#endif

namespace fastprompt::python {

// Keys or values of prefixes: of a float dtype, or e4m3.
struct Prefixes : View {
  bool narrow = false;
};

inline bool convert(dlpack::Tensor t, Prefixes& prefixes) {
  prefixes.narrow = t.type_code == dlpack::kE4m3;
  if (prefixes.narrow) t.type_code = dlpack::kFloat, t.bits = 16;  // of the same sizes and strides in elements
  return convert(t, static_cast<View&>(prefixes));
}

}  // namespace fastprompt::python

template <>
struct pybind11::detail::type_caster<fastprompt::python::Prefixes>
    : fastprompt::python::Caster<fastprompt::python::Prefixes> {
  static constexpr auto name = const_name("float or e4m3 tensor | None");
};

namespace fastprompt::python {
namespace {

// A code of decode.h that is no success.
struct DecodeError : std::runtime_error {
  explicit DecodeError(int code) : std::runtime_error(fastprompt_decode_message(code)), refused(code < 0) {}
  bool refused;  // by the kernel, before CUDA was asked
};

void succeed(int code) {
  if (code != FASTPROMPT_DECODE_OK) throw DecodeError(code);
}

fastprompt_dtype dtype_of(const View& view) {
  switch (view.dtype) {
    case Dtype::bf16:
      return FASTPROMPT_BF16;
    case Dtype::f16:
      return FASTPROMPT_FP16;
    default:
      return FASTPROMPT_FP32;
  }
}

// A scale for each head of e4m3 prefixes.
const float* scales(const View& view, const Prefixes& prefixes, const char* name) {
  if (!view) return nullptr;
  if (!prefixes.narrow || view.dtype != Dtype::f32 || view.dims != 1 || view.size[0] != prefixes.size[0] ||
      (view.size[0] > 1 && view.stride[0] != 1))
    throw py::value_error(std::string(name) +
                          " is not contiguous float32 with a number for each head of e4m3 prefixes");
  return view.as<const float>();
}

const int32_t* numbers(const Index& index, const char* name) {
  if (!index) return nullptr;
  if (index.wide || (index.size > 1 && index.stride != 1))
    throw py::value_error(std::string(name) + " is not contiguous int32");
  return static_cast<const int32_t*>(index.data);
}

const int32_t* numbers(const IndexTable& table, const char* name) {
  if (!table) return nullptr;
  if (table.wide || (table.columns > 1 && table.column_stride != 1))
    throw py::value_error(std::string(name) + " is not int32 with rows apart");
  return static_cast<const int32_t*>(table.data);
}

// One call: its arguments, and how it will run.
struct Decode {
  fastprompt_decode_args args{};
  fastprompt_decode_schedule_t schedule{};

  Decode(View out, View lse, View q, View k_cache, View v_cache, IndexTable block_table, Index q_start, Index kv_len,
         Prefixes prefix_k, Prefixes prefix_v, Index prefix_start, Index prefix_len, View sinks, Index tile_of_row,
         IndexTable tiles, float scale, int64_t window, float softcap, int32_t device, View prefix_k_scale,
         View prefix_v_scale) {
    args.rows = kv_len.size, args.tokens = q.size[0];
    args.heads = static_cast<int32_t>(q.size[1]), args.kv_heads = static_cast<int32_t>(k_cache.size[2]);
    args.head_dim = static_cast<int32_t>(q.size[2]), args.block_size = static_cast<int32_t>(k_cache.size[1]);
    args.arena_tokens = prefix_k.size[1], args.max_blocks = block_table.columns;

    args.q = q.data, args.dtype = dtype_of(q);
    args.q_token_stride = q.stride[0], args.q_head_stride = q.stride[1];

    args.k_cache = k_cache.data, args.v_cache = v_cache.data;
    args.k_block_stride = k_cache.stride[0], args.k_slot_stride = k_cache.stride[1];
    args.k_head_stride = k_cache.stride[2];
    args.v_block_stride = v_cache.stride[0], args.v_slot_stride = v_cache.stride[1];
    args.v_head_stride = v_cache.stride[2];
    args.block_table = numbers(block_table, "block_table"), args.block_table_stride = block_table.row_stride;
    args.kv_len = numbers(kv_len, "kv_len"), args.q_start = numbers(q_start, "q_start");

    args.prefix_k = prefix_k.data, args.prefix_v = prefix_v.data;
    args.prefix_dtype = prefix_k.narrow ? FASTPROMPT_E4M3 : dtype_of(prefix_k);
    args.prefix_k_scale = scales(prefix_k_scale, prefix_k, "prefix_k_scale");
    args.prefix_v_scale = scales(prefix_v_scale, prefix_v, "prefix_v_scale");
    args.prefix_k_head_stride = prefix_k.stride[0], args.prefix_k_token_stride = prefix_k.stride[1];
    args.prefix_v_head_stride = prefix_v.stride[0], args.prefix_v_token_stride = prefix_v.stride[1];
    args.prefix_start = numbers(prefix_start, "prefix_start"), args.prefix_len = numbers(prefix_len, "prefix_len");

    args.scale = scale, args.softcap = softcap, args.window = window;
    args.sinks = sinks.data, args.sinks_dtype = dtype_of(sinks);
    args.tile_of_row = numbers(tile_of_row, "tile_of_row"), args.tiles = numbers(tiles, "tiles");
    args.num_tiles = tiles.rows;
    args.out = out.data, args.lse = lse.as<float>();
    args.device = device;
    args.loads = FASTPROMPT_LOADS_AUTO;

    fastprompt_chip chip;
    succeed(fastprompt_decode_chip(args.device, &chip));
    succeed(fastprompt_decode_schedule(&args, &chip, &schedule));
  }

  void run(uintptr_t workspace, int64_t bytes, uintptr_t stream) {
    args.workspace = reinterpret_cast<void*>(workspace), args.workspace_bytes = bytes;
    args.stream = reinterpret_cast<void*>(stream);
    succeed(fastprompt_decode(&args));
  }
};

void raise_decode_error(std::exception_ptr error) {
  try {
    std::rethrow_exception(error);
  } catch (const DecodeError& e) {
    const std::string text = std::string("impl 'cuda': ") + e.what();
    if (!e.refused) return py::set_error(PyExc_RuntimeError, text.c_str());
    py::set_error(py::module_::import("fastprompt.errors").attr("ImplementationError"), text.c_str());
  }
}

}  // namespace

PYBIND11_MODULE(_native_cuda, m) {
  using released = py::call_guard<py::gil_scoped_release>;
  py::register_local_exception_translator(raise_decode_error);
  m.def("connect", read_tensors_by, "Torch's way to read tensors, and DLPack's number of the devices they are on.");
  m.def("archs", [] { return FASTPROMPT_CUDA_ARCHS; }, "The GPUs this was built for, as FASTPROMPT_CUDA_ARCHS.");
  py::class_<Decode>(m, "Decode")
      .def(py::init<View, View, View, View, View, IndexTable, Index, Index, Prefixes, Prefixes, Index, Index, View,
                    Index, IndexTable, float, int64_t, float, int32_t, View, View>())
      .def("run", &Decode::run, released())
      .def_property_readonly("workspace_bytes", [](const Decode& call) { return call.schedule.workspace_bytes; })
      .def_property_readonly("launches", [](const Decode& call) { return 1 + (call.schedule.merge_blocks > 0); });
}

}  // namespace fastprompt::python
