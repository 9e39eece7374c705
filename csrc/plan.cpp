#include "plan.h"

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "errors.h"

namespace fastprompt {
namespace {

constexpr uint64_t kNoPrompt = std::numeric_limits<uint64_t>::max();
constexpr int64_t kSmallest = std::numeric_limits<int32_t>::min(), kLargest = std::numeric_limits<int32_t>::max();

struct Keyed {
  uint64_t key;  // start above length: rows of one prompt have the same
  int32_t row;
};

bool before(const Keyed& a, const Keyed& b) { return a.key != b.key ? a.key < b.key : a.row < b.row; }

void reject(const char* name, int64_t row, int64_t value, const char* expected) {
  throw ArgumentError(std::string(name) + "[" + std::to_string(row) + "] is " + std::to_string(value) + ", expected " +
                      expected);
}

uint64_t key_of(int64_t row, int64_t start, int64_t length) {
  if (length < 0) reject("prefix_len", row, length, "0 (no prompt) or more");
  if (length == 0) return kNoPrompt;
  if (length > kLargest) reject("prefix_len", row, length, "a number that fits int32");
  if (start < kSmallest || start > kLargest) reject("prefix_start", row, start, "a number that fits int32");
  return static_cast<uint64_t>(start - kSmallest) << 32 | static_cast<uint64_t>(length);
}

void check_sizes(int64_t starts, int64_t lengths, int64_t capacity) {
  if (starts != lengths) {
    throw ArgumentError("prefix_start has " + std::to_string(starts) + " rows and prefix_len has " +
                        std::to_string(lengths) + "; give one entry a row in both");
  }
  if (capacity < starts) {
    throw ArgumentError("capacity_rows is " + std::to_string(capacity) + ", the batch has " + std::to_string(starts) +
                        " rows; raise the capacity");
  }
}

}  // namespace

void build_plan(const Index& start, const Index& length, int64_t capacity, int32_t* packed) {
  const int64_t rows = start.size;
  check_sizes(rows, length.size, capacity);
  std::vector<Keyed> keyed(rows);
  for (int64_t row = 0; row < rows; ++row)
    keyed[row] = {key_of(row, start[row], length[row]), static_cast<int32_t>(row)};
  if (!std::is_sorted(keyed.begin(), keyed.end(), before)) std::sort(keyed.begin(), keyed.end(), before);

  int32_t *order = packed, *offsets = order + capacity, *starts = offsets + capacity + 1, *lengths = starts + capacity;
  std::fill(packed, packed + 4 * capacity + 1, -1);
  int64_t groups = 0;
  for (int64_t at = 0; at < rows; ++at) {
    const auto [key, row] = keyed[at];
    order[at] = row;
    if (at > 0 && key == keyed[at - 1].key) continue;
    offsets[groups] = static_cast<int32_t>(at);
    starts[groups] = key == kNoPrompt ? 0 : static_cast<int32_t>(start[row]);
    lengths[groups++] = static_cast<int32_t>(length[row]);
  }
  offsets[groups] = static_cast<int32_t>(rows);
}

bool share_prefixes(const int32_t* packed, int64_t capacity, const Index& queries, const SharingRules& rules,
                    int32_t* lists) {
  const int32_t *order = packed, *offsets = order + capacity, *lengths = offsets + 2 * capacity + 1;
  int32_t* const tiles = lists + capacity;
  int64_t saving = 0, used = 0;
  std::vector<int32_t> members;
  for (int64_t g = 0; g < capacity && lengths[g] > 0; ++g) {  // rows without a prompt are the last group
    members.clear();
    for (int32_t at = offsets[g]; at < offsets[g + 1]; ++at)
      if (queries[order[at]] == 1) members.push_back(order[at]);
    const int64_t count = members.size(), parts = (count + rules.most - 1) / rules.most;
    const int64_t saved = lengths[g] * (count - parts) - rules.state_cost * count;
    if (count < rules.fewest || saved <= 0) continue;
    saving += saved;
    for (int64_t part = 0; part < parts; ++part, ++used) {
      const int64_t first = part * count / parts, end = (part + 1) * count / parts;
      std::copy(members.begin() + first, members.begin() + end, tiles + used * rules.most);
      for (int64_t i = first; i < end; ++i) lists[members[i]] = static_cast<int32_t>(used);
    }
  }
  if (saving >= rules.least_saving) return true;
  std::fill(lists, tiles + used * rules.most, -1);
  return false;
}

}  // namespace fastprompt
