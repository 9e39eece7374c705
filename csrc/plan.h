// Rows of a batch grouped by prompt.
#pragma once

#include "view.h"

namespace fastprompt {

// Sorts the rows by (start, length), those without a prompt last, and writes the plan of `capacity` rows into `packed`
// [4 * capacity + 1], as BatchPlan.packed describes it. Throws ArgumentError as BatchPlan.build does.
void build_plan(const Index& start, const Index& length, int64_t capacity, int32_t* packed);

// When rows of one prompt read it together: from so many rows, at most so many a tile, and where it pays. Costs and
// savings are counted in tokens that are not read once more.
struct SharingRules {
  int64_t most, fewest, state_cost, least_saving;
};

// Writes BatchPlan.sharing [capacity + capacity / fewest * most] of a plan into `lists`, which holds -1 everywhere, and
// says whether any row shares. `queries` has an entry for each row of the plan.
bool share_prefixes(const int32_t* packed, int64_t capacity, const Index& queries, const SharingRules& rules,
                    int32_t* lists);

}  // namespace fastprompt
