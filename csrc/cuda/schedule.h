// Which calls this kernel takes, and how they run: plain C++ that needs no GPU.
#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <iterator>

#include "cuda/call.h"

namespace fastprompt::cuda {

constexpr int kMostWarps = 4, kMostStages = 4, kMostBlocks = 2, kMostParts = 16;
constexpr int64_t kMostIndex = (int64_t{1} << 31) - (1 << 14);  // of 32-bit indices, room for all parts left

inline bool shares(const fastprompt_decode_args& a) {
  return a.tiles != nullptr && a.tile_of_row != nullptr && a.num_tiles > 0 && a.window == 0;
}

inline bool multiples(int64_t of, std::initializer_list<int64_t> values) {
  return std::all_of(values.begin(), values.end(), [of](int64_t x) { return x % of == 0; });
}

inline int check(const fastprompt_decode_args& a) {
  const bool half = a.dtype == FASTPROMPT_BF16 || a.dtype == FASTPROMPT_FP16;
  const bool sinks = a.sinks == nullptr || a.sinks_dtype != FASTPROMPT_E4M3;
  if (!half || !sinks || (a.prefix_dtype != a.dtype && a.prefix_dtype != FASTPROMPT_E4M3))
    return FASTPROMPT_DECODE_DTYPE;
  if (a.head_dim != 64 && a.head_dim != 96 && a.head_dim != 128 && a.head_dim != 256) return FASTPROMPT_DECODE_HEAD_DIM;
  if (a.kv_heads <= 0 || a.heads < a.kv_heads || a.heads % a.kv_heads || a.heads > 16 * a.kv_heads)
    return FASTPROMPT_DECODE_HEADS;
  const int64_t sizes[] = {a.rows, a.tokens, a.arena_tokens, a.max_blocks, a.num_tiles, a.window, a.block_size - 1};
  if (std::any_of(std::begin(sizes), std::end(sizes), [](int64_t n) { return n < 0 || n > kMostIndex; }) ||
      a.max_blocks > kMostIndex / a.block_size || a.arena_tokens + a.max_blocks * a.block_size > kMostIndex ||
      a.rows > kMostIndex / a.heads / (2 * kMostParts) || a.num_tiles > kMostIndex / a.heads / (2 * kMostParts))
    return FASTPROMPT_DECODE_SIZES;
  const auto at = [](const void* p) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)); };
  const int64_t unit = a.prefix_dtype == FASTPROMPT_E4M3 ? 16 : 8;
  if (!multiples(16, {at(a.q), at(a.k_cache), at(a.v_cache), at(a.prefix_k), at(a.prefix_v), at(a.out)}) ||
      !multiples(8, {a.q_token_stride, a.q_head_stride, a.k_block_stride, a.k_slot_stride, a.k_head_stride,
                     a.v_block_stride, a.v_slot_stride, a.v_head_stride}) ||
      !multiples(unit,
                 {a.prefix_k_head_stride, a.prefix_k_token_stride, a.prefix_v_head_stride, a.prefix_v_token_stride}))
    return FASTPROMPT_DECODE_ALIGNMENT;
  return FASTPROMPT_DECODE_OK;
}

// Shared memory of a block: tiles, queries, barriers, the softmax of each warp's rows.
inline int32_t shared_bytes(int head_dim, int warps, int stages) {
  const int stage = slice_bytes(head_dim) + int{sizeof(uint64_t)};
  return warps * (stages * stage + query_bytes(head_dim) + kTileRows * 2 * int{sizeof(float)});
}

// Warps, stages and blocks a multiprocessor that find room; false where nothing does.
inline bool find_room(const fastprompt_chip& chip, int head_dim, fastprompt_decode_schedule_t& s, int& resident) {
  constexpr int kReserved = 1024;  // what the chip keeps of each block's shared memory
  for (const int warps : {kMostWarps, kMostWarps / 2}) {
    for (resident = kMostBlocks; resident > 0; --resident) {
      const int room = std::min(chip.shared_per_multiprocessor / resident - kReserved, chip.shared_per_block);
      int stages = kMostStages;
      while (stages > 1 && shared_bytes(head_dim, warps, stages) > room) --stages;
      if (stages == 1) continue;
      s.warps = warps;
      s.stages = stages;
      s.shared_bytes = shared_bytes(head_dim, warps, stages);
      return true;
    }
  }
  return false;
}

inline int32_t parts(int64_t slots, int64_t programs, int64_t keys, int64_t least) {
  const int64_t most = std::min<int64_t>(slots / std::max<int64_t>(programs, 1), keys / least);
  return static_cast<int32_t>(std::clamp<int64_t>(most, 1, kMostParts));
}

// Blocks of query rows that a tile of SHARERS rows is cut into.
inline int32_t cuts(const fastprompt_decode_args& a, int warps) {
  const int rows = kTileRows * warps;
  return (FASTPROMPT_SHARERS * (a.heads / a.kv_heads) + rows - 1) / rows;
}

inline int make_schedule(const fastprompt_decode_args& a, const fastprompt_chip& chip,
                         fastprompt_decode_schedule_t& s) {
  std::memset(&s, 0, sizeof s);
  const int wrong = check(a);
  if (wrong != FASTPROMPT_DECODE_OK) return wrong;
  if (a.loads == FASTPROMPT_LOADS_BULK && chip.capability < 90) return FASTPROMPT_DECODE_LOADS;
  int resident = 0;
  if (chip.capability < 80 || !find_room(chip, a.head_dim, s, resident)) return FASTPROMPT_DECODE_CHIP;
  s.bulk = a.loads == FASTPROMPT_LOADS_BULK;

  const int64_t slots = int64_t{chip.multiprocessors} * resident;
  const int64_t all_keys = a.arena_tokens + a.max_blocks * a.block_size;
  const int64_t keys = a.window > 0 ? std::min(a.window, all_keys) : all_keys;
  if (a.rows == 0) return FASTPROMPT_DECODE_OK;
  s.alone_parts = parts(slots, a.rows * a.kv_heads, keys, kAlonePart);
  int64_t work = a.rows * a.kv_heads * s.alone_parts;
  if (shares(a)) {
    const int64_t each = int64_t{cuts(a, s.warps)} * a.kv_heads;
    const int64_t likely = (a.rows + FASTPROMPT_SHARERS - 1) / FASTPROMPT_SHARERS;  // tiles, were there few prompts
    s.shared_parts = parts(slots, likely * each, a.arena_tokens, kSharedPart);
    work += a.num_tiles * each * s.shared_parts;
  }
  s.blocks = static_cast<int32_t>(std::min(work, slots));
  if (s.shared_parts > 0 || s.alone_parts > 1) {
    const int64_t results = a.rows * a.heads;
    s.merge_blocks = static_cast<int32_t>((results + kMergeWarps - 1) / kMergeWarps);
    s.workspace_bytes = results * (s.alone_parts + s.shared_parts) * (a.head_dim + 1) * int64_t{sizeof(float)};
  }
  return FASTPROMPT_DECODE_OK;
}

}  // namespace fastprompt::cuda
