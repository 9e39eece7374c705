// The output of linear layers over grouped rows, cut into blocks.
#pragma once

#include "calls.h"
#include "cpu/rows.h"
#include "parallel.h"

namespace fastprompt::FASTPROMPT_ISA {

constexpr int64_t kFewestRows = 36, kMostRows = 120, kUnitsPerThread = 16;

// One block of the output: some rows of a layer, some of its columns.
struct Block {
  int64_t layer, first_row, rows, first_column, columns;
};

// f(block) for every block of the output, layer by layer: `height` rows and `width` columns, fewer at a layer's edges.
// A layer without columns has empty ones.
template <class F>
FP_INLINE void walk_blocks(const GroupedRows& rows, int64_t height, int64_t width, F f) {
  for (int64_t layer = 0; layer < rows.layers; ++layer) {
    const int64_t last_row = rows.offsets[layer + 1], columns = rows.lengths[layer];
    for (int64_t row = rows.offsets[layer]; row < last_row; row += height) {
      int64_t column = 0;
      do {
        const int64_t wide = least(width, columns - column);
        f(Block{layer, row, least(height, last_row - row), column, wide});
        column += wide;
      } while (column < columns);
    }
  }
}

// f(block) for every block, side by side on several threads. Blocks are up to `width` wide and hold the more rows the
// more there are of them: a block reads its part of the weights once.
template <class F>
void for_each_block(const GroupedRows& rows, int64_t width, F f) {
  const int64_t share = rows.offsets[rows.layers] / (4 * num_threads());
  const int64_t height = round_up(most(kFewestRows, least(kMostRows, share)), 12);
  int64_t count = 0;
  walk_blocks(rows, height, width, [&](const Block&) { ++count; });
  Block* const blocks = static_cast<Block*>(call_scratch(count * sizeof(Block)));
  Block* next = blocks;
  walk_blocks(rows, height, width, [&](const Block& block) { *next++ = block; });
  const int64_t step = 1 + count / (kUnitsPerThread * num_threads());
  for_each_unit((count + step - 1) / step, [&](int64_t unit) {
    for (int64_t i = unit * step; i < least(count, (unit + 1) * step); ++i) f(blocks[i]);
  });
}

}  // namespace fastprompt::FASTPROMPT_ISA
