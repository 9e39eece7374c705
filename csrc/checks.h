// Checks that several ops share.
#pragma once

#include <initializer_list>

#include "view.h"

namespace fastprompt {

// Whether x has these sizes, negative ones standing for any.
bool sized(const View& x, std::initializer_list<int64_t> sizes);

// The same, with a contiguous last dimension.
bool has(const View& x, std::initializer_list<int64_t> sizes);

// Whether x has so many numbers, or is missing.
bool has(const Index& x, int64_t size);

// Throws ArgumentError where arguments do not fit together: Python's checks say which.
void require(bool fits);

// Every extent lies inside 0 .. size - 1; an empty one lies anywhere. `names` are the arguments they came in.
// Throws ArgumentError.
void check_extents(const Index& start, const Index& length, int64_t size, const char* names);

}  // namespace fastprompt
