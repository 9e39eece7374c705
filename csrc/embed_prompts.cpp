#include "embed_prompts.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "errors.h"

namespace fastprompt {
namespace {

using std::to_string;

// The text tokens of a row: columns `first` to `last` of input_ids.
struct Text {
  int64_t first, last;
  int64_t size() const { return std::max<int64_t>(0, last - first); }
};

Text text_of(const EmbedPrompts& call, int64_t row) {
  const int64_t columns = call.input_ids.columns;
  return {call.text_start ? std::max<int64_t>(0, call.text_start[row]) : 0,
          call.text_len ? std::min(columns, call.text_len[row]) : columns};
}

bool fits(const EmbedPrompts& call) {
  const int64_t rows = call.input_ids.rows;
  return call.input_ids && has(call.weight, {-1, -1}) && has(call.prompts, {-1, call.weight.size[1]}) &&
         has(call.out, {rows, -1, call.weight.size[1]}) && call.prompt_start && has(call.prompt_start, rows) &&
         call.prompt_len && has(call.prompt_len, rows) && (!call.positions || call.positions.rows == rows) &&
         has(call.text_start, rows) && has(call.text_len, rows);
}

void check(const EmbedPrompts& call) {
  require(fits(call));
  check_extents(call.prompt_start, call.prompt_len, call.prompts.size[0], "prompt_start and prompt_len");
  const int64_t out_len = call.out.size[1];
  int64_t longest = 0;
  for (int64_t row = 0; row < call.input_ids.rows; ++row) {
    const int64_t total = call.prompt_len[row] + text_of(call, row).size();
    if (total > out_len) {
      throw ArgumentError("row " + to_string(row) + " has " + to_string(total) + " tokens, out_len is " +
                          to_string(out_len) + "; raise out_len");
    }
    longest = std::max(longest, call.prompt_len[row]);
  }
  if (call.positions && call.positions.columns < longest) {
    throw ArgumentError("positions has " + to_string(call.positions.columns) + " columns, the longest prompt has " +
                        to_string(longest) + " tokens; give a place for each");
  }
}

// Puts a row's virtual tokens into the places of its sequence that `positions` names.
void place_virtual(const EmbedPrompts& call, int64_t row, int64_t total, int64_t* places) {
  const Index positions = call.positions[row];
  for (int64_t i = 0; i < call.prompt_len[row]; ++i) {
    const int64_t place = positions[i];
    if (place < 0 || place >= total) {
      throw ArgumentError("positions[" + to_string(row) + ", " + to_string(i) + "] is " + to_string(place) +
                          ", expected 0.." + to_string(total - 1) + ", a place in the row's sequence");
    }
    if (places[place] != GatherRows::kPadding) {
      throw ArgumentError("positions[" + to_string(row) + "] names a place twice; give every virtual token its own");
    }
    places[place] = GatherRows::virtual_token(call.prompt_start[row] + i);
  }
}

// What every place of the output holds, row by row, as `GatherRows::source` says it.
std::vector<int64_t> sources(const EmbedPrompts& call) {
  check(call);
  const int64_t out_len = call.out.size[1], vocabulary = call.weight.size[0];
  std::vector<int64_t> source(call.input_ids.rows * out_len, GatherRows::kPadding);
  for (int64_t row = 0; row < call.input_ids.rows; ++row) {
    const Text text = text_of(call, row);
    const int64_t length = call.prompt_len[row], total = length + text.size();
    int64_t* places = source.data() + row * out_len + (call.left ? out_len - total : 0);
    if (call.positions) {
      place_virtual(call, row, total, places);
    } else {
      for (int64_t i = 0; i < length; ++i) places[i] = GatherRows::virtual_token(call.prompt_start[row] + i);
    }
    const Index ids = call.input_ids[row];
    for (int64_t column = text.first; column < text.last; ++places) {
      if (*places != GatherRows::kPadding) continue;
      *places = ids[column++];
      if (*places < 0 || *places >= vocabulary) {
        throw ArgumentError("input_ids holds " + to_string(*places) + ", expected 0.." + to_string(vocabulary - 1) +
                            ", the rows of weight");
      }
    }
  }
  return source;
}

// Sums the rows of `from` that came from the same row of `into`; `token(source)` is that row, negative for others.
template <class F>
void sum_by_source(const std::vector<int64_t>& source, F token, const View& from, const View& into, float scale) {
  std::vector<std::pair<int64_t, int64_t>> pairs;  // row of `into`, place
  for (size_t place = 0; place < source.size(); ++place) {
    if (const int64_t row = token(source[place]); row >= 0) pairs.emplace_back(row, place);
  }
  std::sort(pairs.begin(), pairs.end());
  std::vector<int64_t> targets, offsets, places;
  for (const auto& [row, place] : pairs) {
    if (targets.empty() || targets.back() != row) {
      targets.push_back(row);
      offsets.push_back(static_cast<int64_t>(places.size()));
    }
    places.push_back(place);
  }
  offsets.push_back(static_cast<int64_t>(places.size()));
  const int64_t count = static_cast<int64_t>(targets.size());
  kernels().sum_rows({into, from, count, targets.data(), offsets.data(), places.data(), scale});
}

}  // namespace

void embed_prompts(const EmbedPrompts& call) {
  const std::vector<int64_t> source = sources(call);
  kernels().gather_rows({call.out, call.weight, call.prompts, source.data(), call.scale});
}

void embed_prompts_backward(const EmbedPrompts& call, const View& dweight, const View& dprompts) {
  const std::vector<int64_t> source = sources(call);
  const auto text = [](int64_t held) { return held; };
  const auto virtual_token = [](int64_t held) {
    return held < GatherRows::kPadding ? GatherRows::virtual_token(held) : -1;
  };
  if (dweight) sum_by_source(source, text, call.out, dweight, call.scale);
  if (dprompts) sum_by_source(source, virtual_token, call.out, dprompts, 1);
}

}  // namespace fastprompt
