// Tensors as kernels see them: a pointer, sizes and strides in elements. No framework is known here.
#pragma once

#include <cstdint>

namespace fastprompt {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Up to four dimensions; a View without data stands for an argument that was not given.
struct View {
  void* data = nullptr;
  int dims = 0;
  Dtype dtype = Dtype::f32;
  int64_t size[4] = {0, 0, 0, 0};
  int64_t stride[4] = {0, 0, 0, 0};

  explicit operator bool() const { return data != nullptr; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// A vector of int32 or int64 numbers, as index arguments come.
struct Index {
  const void* data = nullptr;
  bool wide = false;
  int64_t size = 0;
  int64_t stride = 1;

  explicit operator bool() const { return data != nullptr; }
  int64_t operator[](int64_t i) const {
    i *= stride;
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// A matrix of such numbers; a row of it is an Index.
struct IndexTable {
  const void* data = nullptr;
  bool wide = false;
  int64_t rows = 0, columns = 0;
  int64_t row_stride = 0, column_stride = 1;

  explicit operator bool() const { return data != nullptr; }
  Index operator[](int64_t row) const {
    const int64_t bytes = row * row_stride * (wide ? 8 : 4);
    return {static_cast<const char*>(data) + bytes, wide, columns, column_stride};
  }
};

}  // namespace fastprompt
