// Attention of a tile with few query rows, as in decoding: dot products along the head, logits [rows, keys].
//
// Each key and value is read from memory once, for all rows of the tile, in the format it is stored in.
#pragma once

#include "cpu/tile.h"

namespace fastprompt::FASTPROMPT_ISA {

// Numbers of any storage format, multiplied in float32.
template <class T>
struct Widened {
  using Stored = T;
  static constexpr int kPack = 1;
  static constexpr int kExpDegree = sizeof(T) == 4 ? 6 : 4;
  static FP_INLINE vf unit(const char* p, int64_t i) { return load(reinterpret_cast<const T*>(p) + i * kWidth); }
  static FP_INLINE vf mul_add(vf a, vf b, vf c) { return a * b + c; }
};

#if defined(__AVX512BF16__)
// Bfloat16 by dot product instructions.
struct Dotted : Pairs {
  using Stored = Bf16;
  static FP_INLINE vf unit(const char* p, int64_t i) { return load_as<vf>(p + i * kWidth * 4); }
};
#endif

template <class R>
class Few {
 public:
  static constexpr int64_t kUnit = kWidth * R::kPack;  // numbers in a vector

  // Floats of scratch that a tile of `p` needs.
  static int64_t scratch(const Problem& p) { return kFew * (round_up(p.dim, kWidth) + 2 * (kBlock + 2 * kRuns)); }

  Few(const Problem& p, const Tile& tile, Scratch& scratch)
      : p_(p), tile_(tile), depth_(round_up(p.dim, kWidth) / kUnit) {
    queries_ = scratch.floats(kFew * depth_ * kWidth);
    logits_ = scratch.floats(kFew * kStride);
    weights_ = R::kPack == 2 ? scratch.floats(kFew * kStride / 2) : logits_;
  }

  // Takes the queries: numbers as in T, kept in float32 or, for pairs, as they are.
  template <class T>
  void queries(const char* const* rows) {
    for (int r = 0; r < tile_.count; ++r) {
      float* to = queries_ + r * depth_ * kWidth;
      if constexpr (R::kPack == 2)
        memcpy(to, rows[r], p_.dim * 2);
      else
        convert_rows<T>(rows[r], 0, 1, p_.dim, to, depth_ * kWidth);
    }
  }

  void block(const KeyBlock& block, State& state) {
    for (int i = 0; i < block.count; ++i) {
      const Run& run = block.runs[i];
      dots(run);
      for (int r = 0; r < tile_.count; ++r) {
        float* s = logits_ + r * kStride + run.column;
        if (run.partial || p_.reshape) adjust(run, r, s);
        if (run.count & 1) s[run.count] = -kInf;
      }
    }
    for (int r = 0; r < tile_.count; ++r) softmax(r, block.columns, state);
    for (int i = 0; i < block.count; ++i) values(block.runs[i], state.out);
  }

 private:
  static constexpr int64_t kStride = kBlock + 2 * kRuns;  // of logits
  static constexpr int64_t kReach = 64;                   // keys whose values stay in first-level cache for all rows

  // Calls f(r, Count<n>) for n = 4 (at most `most`), 2 or 1 rows from r on until all are done.
  template <class Function>
  void in_groups(int most, Function&& f) const {
    int r = 0;
    for (; most == 4 && r + 4 <= tile_.count; r += 4) f(r, Count<4>{});
    for (; r + 2 <= tile_.count; r += 2) f(r, Count<2>{});
    if (r < tile_.count) f(r, Count<1>{});
  }
  template <int kN>
  struct Count {
    static constexpr int value = kN;
  };

  void dots(const Run& run) {
    constexpr int kKeys = kWidth;
    for (int64_t t = 0; t < run.count; t += kKeys) {
      const int64_t n = least<int64_t>(kKeys, run.count - t);
      const char* k = run.k + t * run.k_stride;
      const char* v = run.v + t * run.v_stride;
      in_groups(4, [&](int r, auto g) {
        constexpr int kRows = decltype(g)::value, kAtOnce = kWidth / kRows;
        const float* q = queries_ + r * depth_ * kWidth;
        float* s = logits_ + r * kStride + run.column + t;
        int64_t i = 0;
        for (; i + kAtOnce <= n; i += kAtOnce)
          dot_tile<kRows, kAtOnce>(q, k + i * run.k_stride, run.k_stride, v + i * run.v_stride, run.v_stride, s + i);
        for (; i < n; ++i)
          dot_tile<kRows, 1>(q, k + i * run.k_stride, run.k_stride, v + i * run.v_stride, run.v_stride, s + i);
      });
    }
  }

  template <int kRows, int kKeys>
  FP_INLINE void dot_tile(const float* q, const char* k, int64_t stride, const char* v, int64_t v_stride,
                          float* s) const {
    vf sum[kWidth] = {};
    int64_t d = 0;
    for (; d + 8 <= depth_; d += 8) add_dots<kRows, kKeys, 8>(q, k, stride, v, v_stride, d, sum);
    if (d + 4 <= depth_) add_dots<kRows, kKeys, 4>(q, k, stride, v, v_stride, d, sum), d += 4;
    if (d + 2 <= depth_) add_dots<kRows, kKeys, 2>(q, k, stride, v, v_stride, d, sum), d += 2;
    if (d < depth_) add_dots<kRows, kKeys, 1>(q, k, stride, v, v_stride, d, sum);
    if constexpr (kRows * kKeys == kWidth) {
      alignas(64) float all[kWidth];
      store(all, sums_of(sum));
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) memcpy(s + r * kStride, all + r * kKeys, kKeys * 4);
    } else {
      for (int r = 0; r < kRows * kKeys; ++r) s[r / kKeys * kStride + r % kKeys] = sum_of(sum[r]);
    }
  }

  // Vectors d .. d + kDepth - 1 of the dot products. Each key is read whole before the next: only so does the processor
  // fetch ahead what comes from memory.
  template <int kRows, int kKeys, int kDepth>
  FP_INLINE void add_dots(const float* q, const char* k, int64_t stride, const char* v, int64_t v_stride, int64_t d,
                          vf (&sum)[kWidth]) const {
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < kDepth; ++j) {
        const vf y = R::unit(k + i * stride, d + j);
        __builtin_prefetch(v + i * v_stride + (d + j) * kUnit * sizeof(typename R::Stored), 0, 2);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r)
          sum[r * kKeys + i] = R::mul_add(load(q + (r * depth_ + d + j) * kWidth), y, sum[r * kKeys + i]);
      }
  }

  // Lowers what row r does not see to -inf and, with `reshape`, turns dot products into exponents of 2.
  void adjust(const Run& run, int r, float* s) const {
    const Span span = seen(p_.call, run, tile_.position[r]);
    const View& bias = run.own ? p_.call.bias : p_.call.prefix_bias;
    const float* b = nullptr;
    if (bias)
      b = bias.as<const float>() + p_.rows[tile_.row[r]].number * bias.stride[0] + tile_.head[r] * bias.stride[1] +
          tile_.query[r] * bias.stride[2] + run.index;
    const float cap = p_.call.softcap;
    for (int64_t t = 0; t < run.count; t += kWidth) {
      const int n = static_cast<int>(least<int64_t>(kWidth, run.count - t));
      vf x = load(s + t);  // what stands behind the run is overwritten later
      if (p_.reshape) {
        x = x * p_.call.scale;
        if (cap > 0) x = cap * tanh_of(x / cap);
        if (b) x = x + (n == kWidth ? load(b + t) : load_first(b + t, n));
        x = x * kLog2e;
      }
      const vi key = lanes() + static_cast<int32_t>(t);
      x = (key >= static_cast<int32_t>(span.lo)) & (key < static_cast<int32_t>(span.hi)) ? x : splat(-kInf);
      n == kWidth ? store(s + t, x) : store_first(s + t, x, n);
    }
  }

  void softmax(int r, int64_t columns, State& state) {
    float* s = logits_ + r * kStride;
    for (int64_t t = columns; t < round_up(columns, kUnit); ++t) s[t] = -kInf;
    vf tops = splat(-kInf);
    for (int64_t t = 0; t < columns; t += kWidth) tops = vmax(tops, load(s + t));
    const float old = state.top[r], top = most(old, max_of(tops) * p_.factor), base = top == -kInf ? 0.0f : top;
    vf sum{};
    float* to = weights_ + r * kStride / R::kPack;
    for (int64_t t = 0; t < columns; t += kUnit, to += kWidth) {
      const vf x = exp2<R::kExpDegree>(load(s + t) * p_.factor - base);
      sum = sum + x;
      if constexpr (R::kPack == 2) {
        const vf y = exp2<R::kExpDegree>(load(s + t + kWidth) * p_.factor - base);
        sum = sum + y;
        store(to, R::in_order(x, y));
      } else {
        store(to, x);
      }
    }
    state.top[r] = top;
    if (old == top) {
      state.sum[r] += sum_of(sum);
      return;
    }
    const float fade = exp2<6>(splat(old - base))[0];
    state.sum[r] = state.sum[r] * fade + sum_of(sum);
    float* o = state.out + r * p_.width;
    for (int64_t c = 0; c < p_.width; c += kWidth) store(o + c, load(o + c) * fade);
  }

  void values(const Run& run, float* out) {
    for (int64_t t = 0; t < run.count; t += kReach) {
      const int64_t n = least(kReach, run.count - t);
      const char* v = run.v + t * run.v_stride;
      const char* next = run.next + t * run.next_stride;
      in_groups(p_.width < 8 * kWidth ? 4 : 2, [&](int r, auto g) {
        constexpr int kRows = decltype(g)::value;
        constexpr int kWide = kRows == 4 ? 4 : 8;  // vectors of values at a time
        const float* w = weights_ + (r * kStride + run.column + t) / R::kPack;
        float* o = out + r * p_.width;
        int64_t c = 0;
        for (; c + kWide * kWidth <= p_.width; c += kWide * kWidth)
          value_tile<kRows, kWide>(w, v, run.v_stride, next, run.next_stride, n, o, c);
        if (c + 4 * kWidth <= p_.width)
          value_tile<kRows, 4>(w, v, run.v_stride, next, run.next_stride, n, o, c), c += 4 * kWidth;
        for (; c + 2 * kWidth <= p_.width; c += 2 * kWidth)
          value_tile<kRows, 2>(w, v, run.v_stride, next, run.next_stride, n, o, c);
        if constexpr (R::kPack == 1) {
          if (c < p_.width) value_tile<kRows, 1>(w, v, run.v_stride, next, run.next_stride, n, o, c);
        }
      });
    }
  }

  // out[r, c ...] += sum_t w[r, t] v[t, c ...] over kWide vectors.
  template <int kRows, int kWide>
  FP_INLINE void value_tile(const float* w, const char* v, int64_t stride, const char* next, int64_t next_stride,
                            int64_t n, float* out, int64_t c) const {
    constexpr int64_t w_stride = kStride / R::kPack;
    vf sum[kRows][kWide];
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int i = 0; i < kWide; ++i) sum[r][i] = load(out + r * p_.width + c + i * kWidth);
    v += c * sizeof(typename R::Stored);
    const auto step = [&](int64_t t, const vf(&x)[kWide]) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const vf y = splat(w[r * w_stride + t]);
#pragma GCC unroll 16
        for (int i = 0; i < kWide; ++i) sum[r][i] = R::mul_add(y, x[i], sum[r][i]);
      }
    };
    vf x[kWide];
    if constexpr (R::kPack == 1) {
      for (int64_t t = 0; t < n; ++t, v += stride) {
#pragma GCC unroll 16
        for (int i = 0; i < kWide; ++i) {
          x[i] = R::unit(v, i);
          __builtin_prefetch(next + i * kWidth * sizeof(typename R::Stored), 0, 2);
        }
        next += next_stride;
        step(t, x);
      }
    } else {
      for (int64_t t = 0; t < n / 2; ++t, v += 2 * stride) {
#pragma GCC unroll 16
        for (int i = 0; i < kWide; i += 2) {
          R::interleave(v + i * kWidth * 2, v + stride + i * kWidth * 2, x[i], x[i + 1]);
          __builtin_prefetch(next + i * kWidth * 2, 0, 2);
          __builtin_prefetch(next + next_stride + i * kWidth * 2, 0, 2);
        }
        next += 2 * next_stride;
        step(t, x);
      }
      if (n & 1) {
#pragma GCC unroll 16
        for (int i = 0; i < kWide; i += 2) R::interleave_zero(v + i * kWidth * 2, x[i], x[i + 1]);
        step(n / 2, x);
      }
    }
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int i = 0; i < kWide; ++i) store(out + r * p_.width + c + i * kWidth, sum[r][i]);
  }

  const Problem& p_;
  const Tile& tile_;
  int64_t depth_;  // vectors a query
  float *queries_, *logits_, *weights_;
};

}  // namespace fastprompt::FASTPROMPT_ISA
