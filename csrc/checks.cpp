#include "checks.h"

#include <string>

#include "errors.h"

namespace fastprompt {

bool sized(const View& x, std::initializer_list<int64_t> sizes) {
  if (x.dims != static_cast<int>(sizes.size())) return false;
  const int64_t* found = x.size;
  for (const int64_t size : sizes) {
    if (size >= 0 && *found != size) return false;
    ++found;
  }
  return true;
}

bool has(const View& x, std::initializer_list<int64_t> sizes) {
  return sized(x, sizes) && (x.size[x.dims - 1] < 2 || x.stride[x.dims - 1] == 1);
}

bool has(const Index& x, int64_t size) { return !x || x.size == size; }

void require(bool fits) {
  if (!fits) throw ArgumentError("the arguments' shapes, strides or dtypes do not fit together");
}

void check_extents(const Index& start, const Index& length, int64_t size, const char* names) {
  for (int64_t row = 0; row < start.size; ++row) {
    const int64_t s = start[row], n = length[row];
    if (n < 0 || (n > 0 && (s < 0 || n > size || s > size - n))) {
      throw ArgumentError("row " + std::to_string(row) + " has start " + std::to_string(s) + " and length " +
                          std::to_string(n) + ", expected an extent inside 0.." + std::to_string(size) + "; check " +
                          names);
    }
  }
}

}  // namespace fastprompt
