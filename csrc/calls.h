// The arguments of one call of each op, as the kernels of every instruction set take them.
#pragma once

#include "view.h"

namespace fastprompt {

// `out*`, `dout*` [B, N, Hq, Dv] in one dtype; `lse*`, `dlse*` float32 [B, Hq, N].
struct MergeStates {
  View out, lse;
  View out_a, lse_a, out_b, lse_b;
};

struct MergeStatesBackward {
  View dout_a, dlse_a, dout_b, dlse_b;
  View dout, dlse;
  View out_a, lse_a, out_b, lse_b;
};

// `out` [B, length, E] contiguous in the dtype of `weight` [V, E]; `prompts` [T, E]; rows of all three are contiguous.
// Positions and both bounds of the text may be missing.
struct EmbedPrompts {
  View out;
  IndexTable input_ids;
  View weight, prompts;
  Index prompt_start, prompt_len;
  IndexTable positions;
  Index text_start, text_len;
  bool left;
  float scale;
};

// The kernel under it: row i of `out` [B * length, E] is a text token, a virtual token or zeros, as `source[i]` says.
struct GatherRows {
  static constexpr int64_t kPadding = -1;
  static constexpr int64_t virtual_token(int64_t token) { return -2 - token; }  // its own inverse

  View out, weight, prompts;
  const int64_t* source;
  float scale;
};

// Rows in order of the layers that they belong to: those of layer g are `offsets[g]` to `offsets[g + 1]`, and it has
// the weight rows from `starts[g]` on, `lengths[g]` of them (none for rows without a layer).
struct GroupedRows {
  int64_t layers;
  const int64_t *offsets, *starts, *lengths;
  const void* const* x;  // a pointer a row, as for all that follows: E numbers
};

// `out` [max_out] a row.
struct GroupedLinear {
  GroupedRows rows;
  void* const* out;
  int64_t max_out;
  View weight, bias;  // [R, E] with contiguous rows; contiguous [R], or missing
};

// `dx` a row in the dtype of `weight`, or missing; `dweight` [R, E] and `dbias` [R], each contiguous or missing, are
// added to.
struct GroupedLinearBackward {
  GroupedRows rows;
  const float* const* dout;
  View weight;
  void* const* dx;
  float *dweight, *dbias;
};

// Row `targets[i]` of `out` [rows, E] is `scale` times the sum of the rows `places[offsets[i]] ..` of `rows` [B,
// length, E], counted through, in that order; other rows stay as they are.
struct SumRows {
  View out, rows;
  int64_t count;
  const int64_t *targets, *offsets, *places;
  float scale;
};

}  // namespace fastprompt
