// A call as kernels get it, and the sizes that kernels and their schedule agree on.
#pragma once

#include "cuda/decode.h"

namespace fastprompt::cuda {

constexpr int kSliceKeys = 16;  // keys of a slice: what one warp loads of a tile, and one step of the softmax takes
constexpr int kTileRows = 16;   // query rows of a warp: the M of its products
// As fastprompt/costs.py counts them. Fewer keys are not worth a merge; whole tiles.
constexpr int kAlonePart = 512;   // fewest keys of a part that one row reads
constexpr int kSharedPart = 128;  // and of a prefix that several read together

// Bytes of a row of keys or values in shared memory: 16 more than it holds, so that rows begin in different banks.
constexpr int pitch(int head_dim) { return 2 * head_dim + 16; }
constexpr int slice_bytes(int head_dim) { return 2 * kSliceKeys * pitch(head_dim); }

// Bytes that a warp's queries take in shared memory: large heads find no room for them in registers.
constexpr bool shared_queries(int head_dim) { return head_dim > 128; }
constexpr int query_bytes(int head_dim) { return shared_queries(head_dim) ? kTileRows * 2 * head_dim : 0; }

template <int D>
struct Slice {
  static constexpr int kPitch = pitch(D), kValues = kSliceKeys * kPitch, kBytes = slice_bytes(D);
  static constexpr int kQueries = query_bytes(D);
};

constexpr int kMergeWarps = 4;  // of a block of the merging kernel

struct Call {
  fastprompt_decode_args args;
  fastprompt_decode_schedule_t schedule;
};

}  // namespace fastprompt::cuda
