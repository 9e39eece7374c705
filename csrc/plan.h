// Rows of a batch grouped by prompt.
#pragma once

#include "view.h"

namespace fastprompt {

// Sorts the rows by (start, length), those without a prompt last, and writes the plan of `capacity` rows into `packed`
// [4 * capacity + 1], as BatchPlan.packed describes it. Throws ArgumentError as BatchPlan.build does.
void build_plan(const Index& start, const Index& length, int64_t capacity, int32_t* packed);

}  // namespace fastprompt
