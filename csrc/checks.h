// Checks of values that several ops share; each throws ArgumentError.
#pragma once

#include "view.h"

namespace fastprompt {

// Every extent lies inside 0 .. size - 1; an empty one lies anywhere. `names` are the arguments they came in.
void check_extents(const Index& start, const Index& length, int64_t size, const char* names);

}  // namespace fastprompt
