// How arguments of Python become View, Index and IndexTable: part of both bindings.cpp, the only files that know
// Python.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "dlpack.h"
#include "view.h"

namespace fastprompt::python {

namespace py = pybind11;

inline dlpack::Exchange* exchange = nullptr;  // torch's, set when a module is loaded
inline int32_t device_type = dlpack::kCpu;    // of the tensors that it takes

// Takes over torch's way to read tensors; before the first of them is read.
inline void read_tensors_by(py::capsule tensors, int32_t devices) {
  exchange = tensors.get_pointer<dlpack::Exchange>();
  device_type = devices;
  if (exchange->major != 1 || !exchange->tensor_from_object) {
    throw std::runtime_error("torch's DLPack interface has version " + std::to_string(exchange->major) +
                             ", expected 1");
  }
}

// The tensor behind a Python object, which must be a torch.Tensor in the memory of such a device.
inline dlpack::Tensor borrow(py::handle object) {
  dlpack::Tensor tensor;
  if (exchange->tensor_from_object(object.ptr(), &tensor) != 0) throw py::error_already_set();
  if (tensor.device_type != device_type) {
    throw std::runtime_error(device_type == dlpack::kCpu ? "a tensor is not in main memory"
                                                         : "a tensor is not in the memory of a GPU");
  }
  tensor.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return tensor;
}

inline bool integers(const dlpack::Tensor& t, int dims) {
  return t.type_code == dlpack::kInt && (t.bits == 32 || t.bits == 64) && t.dims == dims;
}

// Tensors without elements have no data; they were given all the same. Others without data are not what they seem.
inline void* data_of(const dlpack::Tensor& t) {
  alignas(16) static char nothing[16];
  if (t.data) return t.data;
  for (int i = 0; i < t.dims; ++i) {
    if (t.shape[i] == 0) return nothing;
  }
  throw std::runtime_error("a tensor with elements has no memory of its own");
}

inline bool convert(const dlpack::Tensor& t, View& view) {
  const bool single = t.type_code == dlpack::kFloat && t.bits == 32;
  const bool half = (t.type_code == dlpack::kFloat || t.type_code == dlpack::kBfloat) && t.bits == 16;
  if (!(single || half) || t.dims > 4) return false;
  view.data = data_of(t);
  view.dims = t.dims;
  view.dtype = single ? Dtype::f32 : t.type_code == dlpack::kBfloat ? Dtype::bf16 : Dtype::f16;
  for (int i = 0; i < t.dims; ++i) {
    view.size[i] = t.shape[i];
    view.stride[i] = t.strides[i];
  }
  return true;
}

inline bool convert(const dlpack::Tensor& t, Index& index) {
  if (!integers(t, 1)) return false;
  index = {data_of(t), t.bits == 64, t.shape[0], t.strides[0]};
  return true;
}

inline bool convert(const dlpack::Tensor& t, IndexTable& table) {
  if (!integers(t, 2)) return false;
  table = {data_of(t), t.bits == 64, t.shape[0], t.shape[1], t.strides[0], t.strides[1]};
  return true;
}

// Numbers out of an integer vector where it lies, or copied from a list of ints.
struct Numbers {
  Index index;
  std::vector<int64_t> copied;
};

inline bool convert(py::list list, Numbers& numbers) {
  numbers.copied.resize(list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    int overflow;
    int64_t& number = numbers.copied[i];
    number = PyLong_AsLongLongAndOverflow(PyList_GET_ITEM(list.ptr(), i), &overflow);
    if (overflow != 0) number = overflow < 0 ? INT64_MIN : INT64_MAX;
    if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
  numbers.index = {numbers.copied.data(), true, static_cast<int64_t>(list.size()), 1};
  return true;
}

// None stays empty.
template <class T>
struct Caster {
  T value;
  bool load(py::handle source, bool) { return source.is_none() || convert(borrow(source), value); }
  template <class>
  using cast_op_type = T&;
  operator T&() { return value; }
};

}  // namespace fastprompt::python

namespace pybind11::detail {

template <>
struct type_caster<fastprompt::View> : fastprompt::python::Caster<fastprompt::View> {
  static constexpr auto name = const_name("float tensor | None");
};
template <>
struct type_caster<fastprompt::Index> : fastprompt::python::Caster<fastprompt::Index> {
  static constexpr auto name = const_name("integer vector | None");
};
template <>
struct type_caster<fastprompt::IndexTable> : fastprompt::python::Caster<fastprompt::IndexTable> {
  static constexpr auto name = const_name("integer matrix | None");
};

template <>
struct type_caster<fastprompt::python::Numbers> {
  static constexpr auto name = const_name("integer vector | list[int]");
  fastprompt::python::Numbers value;
  bool load(handle source, bool) {
    using namespace fastprompt::python;
    const bool list = PyList_Check(source.ptr());
    return list ? convert(reinterpret_borrow<pybind11::list>(source), value) : convert(borrow(source), value.index);
  }
  template <class>
  using cast_op_type = fastprompt::python::Numbers&;
  operator fastprompt::python::Numbers&() { return value; }
};

}  // namespace pybind11::detail
