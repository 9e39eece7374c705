// Which rows, keys and heads a block works on next: items of the plan's lists and of the batch, found by number.
//
// A row's keys have one index t, first its prefix, then its own. A row reads them alone, or leaves the prefix to a tile
// of rows that read it together. Either way they may be cut into parts.
#pragma once

#include "cuda/call.h"
#include "cuda/machine.cuh"

namespace fastprompt::cuda {

struct Extent {
  int32_t start, prefix, total;  // first arena token, keys of the prefix, all keys
};

struct Work {
  Extent extent;           // of the first row
  int32_t row;             // the row that reads alone
  const int32_t* members;  // the tile of rows that read together; NULL: one row reads alone
  int32_t kv_head;
  int32_t begin, end;   // keys
  int32_t first, rows;  // query rows: (row, head of the key-value head) from `first` on
  int32_t slot;         // of the partial results
  bool whole;           // nothing is merged into the results
  bool sinks;           // these keys bring the sinks
};

// A query row: the row of the batch, the head, and the query's place among the tokens, -1 where there is none.
struct QueryRow {
  int32_t row, head;
  int64_t place;
};

FP_DEVICE int32_t group(const Call& c) { return c.args.heads / c.args.kv_heads; }

// Where the query of a row is, -1 unless it has exactly one.
FP_DEVICE int64_t query_place(const Call& c, int32_t row) {
  if (c.args.q_start == nullptr) return row;
  const int32_t first = c.args.q_start[row];
  return c.args.q_start[row + 1] - first == 1 ? first : -1;
}

// Whether a row of one query leaves its prefix to a tile.
FP_DEVICE bool row_shares(const Call& c, int32_t row) {
  return c.schedule.shared_parts > 0 && c.args.tile_of_row[row] >= 0;
}

FP_DEVICE Extent row_extent(const Call& c, int32_t row) {
  const int32_t arena = static_cast<int32_t>(c.args.arena_tokens);
  const int32_t own = static_cast<int32_t>(c.args.max_blocks) * c.args.block_size;
  const int32_t start = lesser(larger(c.args.prefix_start[row], 0), arena);
  const int32_t prefix = lesser(larger(c.args.prefix_len[row], 0), arena - start);
  return {start, prefix, prefix + lesser(larger(c.args.kv_len[row], 0), own)};
}

// A part of the keys begin..end-1: whole tiles, as many as the other parts have, and no fewer keys than `least`.
FP_DEVICE void take_part(const Call& c, int32_t part, int32_t count, int32_t least, Work& w) {
  const int32_t tile = kSliceKeys * c.schedule.warps;
  const int32_t size = larger(ceil_div(ceil_div(larger(w.end - w.begin, 0), count), tile) * tile, least);
  w.begin = lesser(w.begin + part * size, w.end);
  w.end = lesser(w.begin + size, w.end);
}

// Tiles in use: they stand before the empty ones. All lanes of a warp ask.
FP_DEVICE int32_t used_tiles(const Call& c) {
  int32_t used = 0;
  const int32_t room = c.schedule.shared_parts == 0 ? 0 : static_cast<int32_t>(c.args.num_tiles);
  for (int32_t tile = lane(); tile < room; tile += kLanes)  // loads that do not wait for each other
    used += c.args.tiles[int64_t{tile} * FASTPROMPT_SHARERS] >= 0;
#pragma unroll
  for (int apart = kLanes / 2; apart > 0; apart /= 2) used += shfl_xor(used, apart);
  return used;
}

// Item = (part, key-value head, cut of a tile's query rows): neighbours read the same keys.
FP_DEVICE bool find_shared(const Call& c, int32_t item, int32_t tiles, Work& w) {
  const int32_t rows = kTileRows * c.schedule.warps, cuts = ceil_div(FASTPROMPT_SHARERS * group(c), rows);
  const int32_t tile = item % (tiles * cuts), part = item / (tiles * cuts) / c.args.kv_heads;
  w.kv_head = item / (tiles * cuts) % c.args.kv_heads;
  w.members = c.args.tiles + int64_t{tile / cuts} * FASTPROMPT_SHARERS;
  const int32_t member = w.members[lane() % FASTPROMPT_SHARERS];
  const int32_t members = count_bits(ballot(lane() < FASTPROMPT_SHARERS && member >= 0));
  w.first = tile % cuts * rows;
  w.rows = lesser(members * group(c) - w.first, rows);
  if (w.rows <= 0) return false;
  w.row = lesser(shfl(member, 0), static_cast<int32_t>(c.args.rows) - 1);  // whatever the plan was made for
  w.extent = row_extent(c, w.row);
  w.begin = 0;
  w.end = w.extent.prefix;
  w.slot = c.schedule.alone_parts + part;
  w.whole = w.sinks = false;
  take_part(c, part, c.schedule.shared_parts, kSharedPart, w);
  return true;
}

// Item = (row, part, key-value head): neighbours read neighbouring memory of the own cache.
FP_DEVICE bool find_alone(const Call& c, int32_t item, Work& w) {
  w.kv_head = item % c.args.kv_heads;
  w.slot = item / c.args.kv_heads % c.schedule.alone_parts;
  w.row = item / c.args.kv_heads / c.schedule.alone_parts;
  w.members = nullptr;
  if (query_place(c, w.row) < 0) return false;
  const bool shares = row_shares(c, w.row);
  w.extent = row_extent(c, w.row);
  w.first = 0;
  w.rows = group(c);
  const int32_t window = static_cast<int32_t>(c.args.window);
  w.begin = shares ? w.extent.prefix : window > 0 ? larger(w.extent.total - window, 0) : 0;
  w.end = w.extent.total;
  w.whole = c.schedule.alone_parts == 1 && !shares;
  w.sinks = w.slot == 0 && c.args.sinks != nullptr;
  take_part(c, w.slot, c.schedule.alone_parts, kAlonePart, w);
  return true;
}

FP_DEVICE QueryRow query_row(const Call& c, const Work& w, int32_t r) {
  const int32_t i = (w.first + r) / group(c), head = w.kv_head * group(c) + (w.first + r) % group(c);
  if (r >= w.rows) return {0, head, -1};
  const int32_t row = w.members == nullptr ? w.row : w.members[i];
  const bool known = row >= 0 && row < c.args.rows;
  return {row, head, known ? query_place(c, row) : -1};
}

// Where a partial result is, in states of D numbers.
FP_DEVICE int64_t state_index(const Call& c, int32_t row, int32_t head, int32_t slot) {
  return (int64_t{row} * c.args.heads + head) * (c.schedule.alone_parts + c.schedule.shared_parts) + slot;
}
// Two numbers of a state, from an even one on; behind all states, their logs.
FP_DEVICE Pair* state_pair(const Call& c, int64_t at) { return static_cast<Pair*>(c.args.workspace) + at / 2; }
FP_DEVICE float* state_logs(const Call& c) {
  return static_cast<float*>(c.args.workspace) +
         state_index(c, static_cast<int32_t>(c.args.rows), 0, 0) * c.args.head_dim;
}

}  // namespace fastprompt::cuda
