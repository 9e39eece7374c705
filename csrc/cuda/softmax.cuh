// Queries, logits and one online softmax: 16 query rows of a warp meet a slice of 16 keys.
//
// Lane l holds, of every product [16, 8], the rows l/4 and l/4 + 8 and the columns 2 (l mod 4) and the next. Logits are
// in base 2.
#pragma once

#include "cuda/work.cuh"

namespace fastprompt::cuda {

// From products to logits; two factors, as e4m3 keys of a prefix have a scale of their own.
struct Logits {
  float own, prefix;  // factors of products with own keys and with those of the prefix
  float softcap;      // in base 2, 0: none
};

FP_DEVICE Logits logits_of(const Call& c, int32_t kv_head) {
  const float cap = c.args.softcap, own = c.args.scale * (cap > 0 ? 1.0f / cap : kLog2e);
  const bool scaled = c.args.prefix_dtype == FASTPROMPT_E4M3 && c.args.prefix_k_scale != nullptr;
  return {own, scaled ? own * c.args.prefix_k_scale[kv_head] : own, cap * kLog2e};
}

// Exact to float32, near zero too, where a quotient of exponentials is not.
FP_DEVICE float tanh_of(float y) {
  const float z = y * y, size = y < 0 ? -y : y;
  if (z < 0.36f) {
    const float p = -0.05376993f + z * (0.02075749f + z * -0.00585643f);
    return y * (1.0f + z * (-0.33333284f + z * (0.13331705f + z * p)));
  }
  const float e = exp2_of(-2.0f * kLog2e * size), far = (1.0f - e) / (1.0f + e);
  return y < 0 ? -far : far;
}

// 16 query rows as the left side of products: in registers, or each lane's part in shared memory.
template <int D>
class Queries {
 public:
  static constexpr bool kShared = Slice<D>::kQueries > 0;

  FP_DEVICE explicit Queries(char* shared) : shared_(reinterpret_cast<Part*>(shared) + lane()) {}

  FP_DEVICE void load(const Call& c, const Work& w, int32_t tile) {
    const uint32_t* rows[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const QueryRow row = query_row(c, w, tile * kTileRows + lane() / 4 + 8 * h);
      const int64_t at = row.place * c.args.q_token_stride + row.head * c.args.q_head_stride + lane() % 4 * 2;
      const uint16_t* q = static_cast<const uint16_t*>(c.args.q);
      rows[h] = row.place < 0 ? nullptr : reinterpret_cast<const uint32_t*>(q + at);
    }
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      Part part;
#pragma unroll
      for (int i = 0; i < 4; ++i) part.words[i] = rows[i % 2] == nullptr ? 0 : rows[i % 2][k * 8 + i / 2 * 4];
      if constexpr (kShared)
        shared_[k * kLanes] = part;
      else
        parts_[k] = part;
    }
  }

  FP_DEVICE Bytes16 part(int k) const {
    if constexpr (kShared)
      return shared_[k * kLanes];
    else
      return parts_[k];
  }

 private:
  using Part = Bytes16;

  Part* shared_;
  Part parts_[kShared ? 1 : D / 16];
};

// The softmax of 16 query rows over the keys so far: values weighted, largest logit, sum of weights (of this lane's).
template <int D>
struct State {
  float values[D / 8][4];
  float top[2], sum[2];

  FP_DEVICE void clear() {
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) values[j][i] = 0.0f;
    top[0] = top[1] = no_weight();
    sum[0] = sum[1] = 0.0f;
  }

  // Puts all on the scale of higher logits.
  FP_DEVICE void raise(const float (&higher)[2]) {
    float shrink[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      shrink[h] = higher[h] == top[h] ? 1.0f : exp2_of(top[h] - higher[h]);
      sum[h] *= shrink[h];
      top[h] = higher[h];
    }
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) values[j][i] *= shrink[i / 2];
  }
};

// Products of queries with the keys of N slices.
template <class F, int D, int N>
FP_DEVICE void multiply_keys(const Queries<D>& q, const char* const (&slices)[N], float (&s)[N][2][4]) {
  const int at = (lane() / 16 * 8 + lane() % 8) * Slice<D>::kPitch + lane() / 8 % 2 * 16;
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    const Bytes16 part = q.part(k);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      uint32_t b[4];
      load_matrices(b, slices[n] + at + k * 32);
      F::multiply(s[n][0], part.words, b[0], b[1]);
      F::multiply(s[n][1], part.words, b[2], b[3]);
    }
  }
}

// Adds the values of a slice, weighted.
template <class F, int D>
FP_DEVICE void add_values(const uint32_t (&weights)[4], const char* slice, State<D>& state) {
  const char* at = slice + Slice<D>::kValues + lane() % 16 * Slice<D>::kPitch + lane() / 16 * 16;
#pragma unroll
  for (int j = 0; j < D / 16; ++j) {
    uint32_t b[4];
    load_matrices_transposed(b, at + j * 32);
    F::multiply(state.values[2 * j], weights, b[0], b[1]);
    F::multiply(state.values[2 * j + 1], weights, b[2], b[3]);
  }
}

// Logits of the slice of keys t..t+15, none of those from `end` on.
FP_DEVICE void make_logits(float (&s)[2][4], int32_t t, int32_t end, int32_t prefix, const Logits& logits) {
  const int32_t behind = t + kSliceKeys;
  if (logits.softcap == 0 && behind <= end && (t >= prefix || behind <= prefix)) {  // nearly all slices
    const float factor = t < prefix ? logits.prefix : logits.own;
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i / 4][i % 4] *= factor;
    return;
  }
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t key = t + n * 8 + lane() % 4 * 2 + i % 2;
      float x = s[n][i] * (key < prefix ? logits.prefix : logits.own);
      if (logits.softcap > 0) x = logits.softcap * tanh_of(x);
      s[n][i] = key < end ? x : no_weight();
    }
}

// Takes N slices of keys into the softmax, which begin at t, t + step and so on; keys from `end` on are not there.
template <class F, int D, int N>
FP_DEVICE void attend_slices(const Queries<D>& q, const char* const (&slices)[N], int32_t t, int32_t step, int32_t end,
                             int32_t prefix, const Logits& logits, State<D>& state) {
  float s[N][2][4] = {};
  multiply_keys<F, D, N>(q, slices, s);
  float higher[2] = {state.top[0], state.top[1]};
#pragma unroll
  for (int n = 0; n < N; ++n) {
    make_logits(s[n], t + n * step, end, prefix, logits);
#pragma unroll
    for (int i = 0; i < 8; ++i) higher[i / 2 % 2] = larger(higher[i / 2 % 2], s[n][i / 4][i % 4]);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    higher[h] = larger(higher[h], shfl_xor(higher[h], 1));
    higher[h] = larger(higher[h], shfl_xor(higher[h], 2));
  }
  if (ballot(higher[0] > state.top[0] || higher[1] > state.top[1])) state.raise(higher);
  const float base[2] = {state.top[0] == no_weight() ? 0.0f : state.top[0],
                         state.top[1] == no_weight() ? 0.0f : state.top[1]};
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& x = s[n][i / 4][i % 4];
      x = exp2_of(x - base[i / 2 % 2]);
      state.sum[i / 2 % 2] += x;
    }
    const uint32_t weights[4] = {F::pack(s[n][0][0], s[n][0][1]), F::pack(s[n][0][2], s[n][0][3]),
                                 F::pack(s[n][1][0], s[n][1][1]), F::pack(s[n][1][2], s[n][1][3])};
    add_values<F, D>(weights, slices[n], state);
  }
}

}  // namespace fastprompt::cuda
