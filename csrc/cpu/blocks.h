// The output of linear layers over grouped rows, cut into blocks.
#pragma once

#include "calls.h"
#include "cpu/rows.h"
#include "parallel.h"

namespace fastprompt::FASTPROMPT_ISA {

constexpr int64_t kFewestRows = 36, kMostRows = 120;

// One block of the output: some rows of a layer, some of its columns.
struct Block {
  int64_t first_row, rows, first_column, columns;
};

// f(layer, block) for every block of every layer's output, side by side on several threads. Blocks are up to `columns`
// wide and hold the more rows the more there are of them: a block reads its part of the weights once.
template <class F>
void for_each_block(const GroupedRows& rows, int64_t columns, F f) {
  const int64_t share = rows.offsets[rows.layers] / (4 * num_threads());
  const int64_t height = round_up(most(kFewestRows, least(kMostRows, share)), 12);
  const auto across = [&](int64_t layer) { return (rows.lengths[layer] - 1) / columns + 1; };  // at least one
  const auto down = [&](int64_t layer) {
    return (rows.offsets[layer + 1] - rows.offsets[layer] + height - 1) / height;
  };
  int64_t units = 0;
  for (int64_t layer = 0; layer < rows.layers; ++layer) units += across(layer) * down(layer);
  for_each_unit(units, [&](int64_t unit) {
    int64_t layer = 0;
    for (; unit >= across(layer) * down(layer); ++layer) unit -= across(layer) * down(layer);
    const int64_t row = rows.offsets[layer] + unit / across(layer) * height;
    const int64_t column = unit % across(layer) * columns;
    f(layer,
      Block{row, least(height, rows.offsets[layer + 1] - row), column, least(columns, rows.lengths[layer] - column)});
  });
}

}  // namespace fastprompt::FASTPROMPT_ISA
