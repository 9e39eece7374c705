// Grouped decode on NVIDIA GPUs: paged_prefix_attention of rows with one query, as a plain C interface.
//
// Rows of any other number of queries are passed over: nothing is read or written for them (Triton takes those).
// The header knows neither CUDA's nor Python's types, so bindings and tests compile it with any C or C++ compiler.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { FASTPROMPT_SHARERS = 16 };  // rows of a tile in a plan's sharing lists

typedef enum {
  FASTPROMPT_BF16 = 0,
  FASTPROMPT_FP16 = 1,
  FASTPROMPT_E4M3 = 2,  // prefixes only, with a scale for each head
  FASTPROMPT_FP32 = 3   // sinks only
} fastprompt_dtype;

typedef enum {
  FASTPROMPT_LOADS_AUTO = 0,   // cp.async, until somebody measures that bulk copies are faster
  FASTPROMPT_LOADS_ASYNC = 1,  // cp.async of 16 bytes
  FASTPROMPT_LOADS_BULK = 2    // cp.async.bulk of a key or value with mbarriers; an error before compute capability 9.0
} fastprompt_loads;

typedef struct {
  // Sizes.
  int64_t rows;          // B: rows of the batch, of any number of queries
  int64_t tokens;        // queries in q, out and lse: the last entry of q_start
  int32_t heads;         // Hq: a multiple of kv_heads, at most 16 times that
  int32_t kv_heads;      // Hkv
  int32_t head_dim;      // D of keys and values alike: 64, 96, 128 or 256
  int32_t block_size;    // tokens of a page of the own cache
  int64_t arena_tokens;  // T: extents are cut to it
  int64_t max_blocks;    // columns of block_table; with block_size, the most own keys a row may have

  // Queries [tokens, Hq, D]; all pointers in this struct are to memory of `device`.
  const void* q;
  fastprompt_dtype dtype;  // bf16 or fp16, of q, k_cache, v_cache and out
  int64_t q_token_stride;  // all strides are in elements; the last dimension has stride 1
  int64_t q_head_stride;

  // Own keys and values: pages [blocks, block_size, Hkv, D]. Page, row and head strides are multiples of 8 elements and
  // the pointers of 16 bytes. Slots behind a row's keys may hold anything, NaN too.
  const void* k_cache;
  const void* v_cache;
  int64_t k_block_stride, k_slot_stride, k_head_stride;
  int64_t v_block_stride, v_slot_stride, v_head_stride;
  const int32_t* block_table;  // [B, max_blocks]; entries behind a row's keys are not read
  int64_t block_table_stride;  // from row to row
  const int32_t* kv_len;       // [B]: own keys, that of the query included; below 0 counts as 0
  const int32_t* q_start;      // [B + 1]: where each row's queries begin; NULL: row b has one query, token b

  // Prefixes: one layer of an arena, [Hkv, T, D].
  const void* prefix_k;
  const void* prefix_v;
  fastprompt_dtype prefix_dtype;                        // that of q, or e4m3
  int64_t prefix_k_head_stride, prefix_k_token_stride;  // multiples of 16 bytes, as the pointers
  int64_t prefix_v_head_stride, prefix_v_token_stride;
  const int32_t* prefix_start;  // [B]
  const int32_t* prefix_len;    // [B]
  const float* prefix_k_scale;  // [Hkv]: what e4m3 keys of a head are multiplied by; NULL: 1
  const float* prefix_v_scale;  // [Hkv]: and values

  // The softmax.
  float scale;                   // of q . k
  float softcap;                 // 0: none
  int64_t window;                // keys seen, the query's own included; 0: all
  const void* sinks;             // [Hq] logits, contiguous; NULL: none
  fastprompt_dtype sinks_dtype;  // bf16, fp16 or fp32

  // Which rows read their prefix together: the two lists of BatchPlan.sharing, or NULL. Not used with a window. Used
  // tiles stand before empty ones. The rows of a tile have one prompt and one query each.
  const int32_t* tile_of_row;  // [at least B]: -1 for rows that read alone
  const int32_t* tiles;        // [num_tiles, FASTPROMPT_SHARERS] row numbers in order, then -1; a tile of -1 is empty
  int64_t num_tiles;           // what the lists have room for

  // Results.
  void* out;   // [tokens, Hq, D] contiguous; zeros where a query sees nothing
  float* lse;  // [Hq, tokens] contiguous, natural log of the softmax denominator, -inf where nothing is seen; or NULL

  // How it runs.
  void* workspace;          // fastprompt_decode_schedule says how much; aligned to 16 bytes; contents do not matter
  int64_t workspace_bytes;  // what there is
  int32_t device;           // CUDA's number of it
  fastprompt_loads loads;   // AUTO but in measurements
  void* stream;             // cudaStream_t; the launch may be captured
} fastprompt_decode_args;

// What of a chip matters for a schedule.
typedef struct {
  int32_t multiprocessors;
  int32_t shared_per_multiprocessor;  // bytes
  int32_t shared_per_block;           // bytes a block may opt in to
  int32_t capability;                 // 80, 89, 90, 100
} fastprompt_chip;

// How a call runs: from sizes, capacities and the chip alone, never from what tensors hold. So a captured launch serves
// every batch that fits.
typedef struct {
  int32_t blocks;           // of the persistent grid
  int32_t warps;            // of a block
  int32_t stages;           // tiles of keys and values a block has room for
  int32_t shared_bytes;     // of a block
  int32_t alone_parts;      // parts of the keys that a row reads alone
  int32_t shared_parts;     // parts of a prefix that several read together; 0: nobody does
  int32_t merge_blocks;     // of the merging kernel; 0: it is not launched
  int32_t bulk;             // 1: cp.async.bulk
  int64_t workspace_bytes;  // float32 partial results
} fastprompt_decode_schedule_t;

// Return codes: 0, one of these, or a cudaError_t (above 0).
enum {
  FASTPROMPT_DECODE_OK = 0,
  FASTPROMPT_DECODE_DTYPE = -1,      // a dtype this kernel has no code for
  FASTPROMPT_DECODE_HEAD_DIM = -2,   // not 64, 96, 128 or 256
  FASTPROMPT_DECODE_HEADS = -3,      // heads are not 1 to 16 times kv_heads
  FASTPROMPT_DECODE_ALIGNMENT = -4,  // pointers or strides that are no multiples of 16 bytes
  FASTPROMPT_DECODE_SIZES = -5,      // negative sizes, or too many for 32-bit indices of keys and work
  FASTPROMPT_DECODE_WORKSPACE = -6,  // too small
  FASTPROMPT_DECODE_LOADS = -7,      // bulk copies asked for on a chip without them
  FASTPROMPT_DECODE_CHIP = -8        // compute capability below 8.0, or too little shared memory
};

// Checks sizes, dtypes and alignment, and fills *schedule. Needs no GPU; workspace and stream are not looked at.
int fastprompt_decode_schedule(const fastprompt_decode_args* args, const fastprompt_chip* chip,
                               fastprompt_decode_schedule_t* schedule);

// The chip behind a device number; asked once a device, remembered after.
int fastprompt_decode_chip(int32_t device, fastprompt_chip* chip);

// Enqueues the kernel, and the merging one where the schedule has it. Does not wait and does not allocate.
int fastprompt_decode(const fastprompt_decode_args* args);

// What a return code means; a constant string.
const char* fastprompt_decode_message(int code);

#ifdef __cplusplus
}
#endif
