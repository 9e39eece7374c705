// The part of DLPack's C interface that reads a tensor of another library where it lies (version 1.3).
//
// torch publishes the table as `torch.Tensor.__dlpack_c_exchange_api__`: one C call of some 20 ns a tensor.
#pragma once

#include <cstdint>

namespace fastprompt::dlpack {

enum DeviceType : int32_t { kCpu = 1 };
enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4, kE4m3 = 10 };

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t dims;
  uint8_t type_code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct Exchange {
  uint32_t major, minor;
  Exchange* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // borrows: valid as long as the object is
  void* current_stream;
};

}  // namespace fastprompt::dlpack
