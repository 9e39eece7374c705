// One call of attention with a prefix, as the kernels of every instruction set take it.
#pragma once

#include "view.h"

namespace fastprompt {

// Own keys and values lie row by row (`k`, `v` of four dimensions: [B, Hkv, S, D]) or, with a `block_table` [B,
// blocks], in pages (`k`, `v`: [blocks, block_size, Hkv, D]). In the first case `q` is [B, Hq, N, D] and `q_start` [B]
// the own index of each row's first query (S - N where not given); in the second `q` is [tokens, Hq, D] and `q_start`
// [B + 1] says where each row's queries begin. Index arguments, `sinks` and both biases (float32) may be missing.
struct AttentionCall {
  Dtype dtype = Dtype::f32;
  View q, k, v, prefix_k, prefix_v;
  Index prefix_start, prefix_len, kv_start, kv_len, q_start;
  IndexTable block_table;
  View sinks, bias, prefix_bias;
  const int32_t* order = nullptr;  // rows sorted by prompt
  int64_t rows = 0;
  bool causal = true;
  float scale = 1;
  int64_t window = 0;  // 0 for none
  float softcap = 0;   // 0 for none
  View out;            // [B, N, Hq, Dv] or [tokens, Hq, Dv], contiguous
  View lse;            // float32 [B, Hq, N] or [Hq, tokens], contiguous; may be missing

  bool paged() const { return static_cast<bool>(block_table); }
  int64_t heads() const { return q.size[1]; }
  int64_t kv_heads() const { return prefix_k.size[0]; }
  int64_t group() const { return heads() / kv_heads(); }
  int64_t dim() const { return prefix_k.size[2]; }
  int64_t value_dim() const { return prefix_v.size[2]; }
};

// Where gradients come from and go to; those without data are not wanted. `dout` is [B, N, Hq, Dv], `dlse` float32
// [B, Hq, N]; the others are laid out as what they are gradients of. `logits_own` [B, Hq, N, S] and `logits_prefix`
// [B, Hq, N, P] in float32, zeros before, get the gradients of the logits where there is something to see.
struct Gradients {
  View dout, dlse;
  View q, k, v, prefix_k, prefix_v;
  View logits_own, logits_prefix;

  bool logits() const { return logits_own || logits_prefix; }
};

// `forward` with the results it had.
struct AttentionGradients {
  AttentionCall forward;
  Gradients gradients;
};

}  // namespace fastprompt
