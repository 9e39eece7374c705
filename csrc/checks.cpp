#include "checks.h"

#include <string>

#include "errors.h"

namespace fastprompt {

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
