// Attention of a tile with many query rows: logits stand transposed, [keys, rows], so that queries fill the vectors.
//
// Keys and values are broadcast or read as they lie in memory; only the tile's queries are transposed. The softmax runs
// down the keys, lane by lane, and needs no sums across a vector.
#pragma once

#include "cpu/product.h"
#include "cpu/tile.h"

namespace fastprompt::FASTPROMPT_ISA {

// Lowers what rows do not see to -inf and, with `reshape`, turns dot products into exponents of 2. `s` is
// [run.count, stride], as are `bias` and `slope`, which may be null; `slope` gets the derivative of the softcap.
inline void adjust_logits(const Problem& p, const Tile& tile, const Run& run, const float* bias, float* s,
                          int64_t stride, float* slope = nullptr) {
  int32_t lo[kTile], hi[kTile];
  for (int r = 0; r < kTile; ++r) {
    const Span span = r < tile.count ? seen(p.call, run, tile.position[r]) : Span{0, run.count};
    lo[r] = static_cast<int32_t>(span.lo);
    hi[r] = static_cast<int32_t>(span.hi);
  }
  const float cap = p.call.softcap;
  for (int64_t t = 0; t < run.count; ++t, s += stride) {
    const vi key = splat(static_cast<int32_t>(t));
    for (int64_t c = 0; c < stride; c += kWidth) {
      vf x = load(s + c);
      if (p.reshape) {
        x = x * p.call.scale;
        if (cap > 0) {
          const vf y = tanh_of(x / cap);
          if (slope) store(slope + t * stride + c, 1.0f - y * y);
          x = cap * y;
        }
        if (bias) x = x + load(bias + t * stride + c);
        x = x * kLog2e;
      }
      if (run.partial) x = (key >= load_as<vi>(lo + c)) & (key < load_as<vi>(hi + c)) ? x : splat(-kInf);
      store(s + c, x);
    }
  }
}

// The bias of a run as [run.count, stride], or null where its kind of key has none.
inline const float* bias_columns(const Problem& p, const Tile& tile, const Run& run, float* to, int64_t stride) {
  const View& bias = run.own ? p.call.bias : p.call.prefix_bias;
  if (!bias) return nullptr;
  const char* rows[kTile];
  for (int r = 0; r < tile.count; ++r)
    rows[r] = reinterpret_cast<const char*>(bias.as<const float>() + p.rows[tile.row[r]].number * bias.stride[0] +
                                            tile.head[r] * bias.stride[1] + tile.query[r] * bias.stride[2] + run.index);
  transpose_rows(rows, tile.count, run.count, to, stride);
  return to;
}

// The product [run.count, rows] that `o` describes, B holding the tile's rows as columns. Where rows come in order of
// position, vectors of them that see nothing more are left out.
template <class F>
void visible_products(const Problem& p, const Tile& tile, const Run& run, Operands o) {
  const int64_t vectors = o.c_stride / kWidth;
  if (!(run.partial && run.own && p.call.causal)) {
    multiply<F, A::kRows, B::kReady, false>(o, run.count, vectors);
    return;
  }
  int64_t t = 0;
  for (int64_t skip = 0; t < run.count && skip < vectors; ++skip) {
    int64_t until = 0;  // keys that the next vector's rows see
    for (int64_t r = skip * kWidth; r < least<int64_t>((skip + 1) * kWidth, tile.count); ++r)
      until = most(until, seen(p.call, run, tile.position[r]).hi);
    const int64_t n = most<int64_t>(until - t, 0);
    multiply<F, A::kRows, B::kReady, false>(o, n, vectors - skip);
    t += n;
    o.a += n * o.a_stride;
    o.b += kWidth * 4;  // beyond here this vector sees nothing
    o.c += n * o.c_stride + kWidth;
  }
}

// to[r, :] += sum over keys t of weights[t, r] * rows[t, :], for the rows r of a tile. `weights` [keys, stride] (of
// pairs of keys where F has them) must be 0 where nothing is seen.
template <class F>
void weighted_rows(const Problem& p, const Tile& tile, const Run& run, const float* weights, int64_t stride,
                   const char* rows, int64_t row_stride, float* to, int64_t width) {
  constexpr B kB = F::kPack == 2 ? B::kPair : B::kReady;
  constexpr int kGroup = rows_beside(kMaxVectors);
  const auto part = [&](int64_t r, int64_t count, int64_t lo, int64_t hi) {
    lo = lo / F::kPack * F::kPack;
    const Operands o{reinterpret_cast<const char*>(weights + lo / F::kPack * stride + r),
                     stride * 4,
                     rows + lo * row_stride,
                     row_stride,
                     to + r * width,
                     width,
                     (hi - lo) / F::kPack,
                     F::kPack == 2 && (hi - lo) % 2};
    multiply<F, A::kColumns, kB, true>(o, count, width / kWidth);
  };
  if (!run.partial) return part(0, tile.count, 0, run.count);
  for (int r = 0; r < tile.count; r += kGroup) {
    const int count = least(kGroup, tile.count - r);
    Span all{run.count, 0};
    for (int i = r; i < r + count; ++i) {
      const Span s = seen(p.call, run, tile.position[i]);
      all = {least(all.lo, s.lo), most(all.hi, s.hi)};
    }
    if (all.lo < all.hi) part(r, count, all.lo, all.hi);
  }
}

template <class F>
class Many {
 public:
  // Floats of scratch that a tile of `p` needs.
  static int64_t scratch(const Problem& p) { return (p.dim + 2 * (kBlock + kRuns)) * kTile + p.dim * kTile; }

  Many(const Problem& p, const Tile& tile, Scratch& scratch, Ahead& ahead) : p_(p), tile_(tile), ahead_(ahead) {
    stride_ = round_up(tile.count, kWidth);
    queries_ = scratch.floats(p.dim / F::kPack * stride_);
    logits_ = scratch.floats((kBlock + kRuns) * stride_);
    bias_ = p.reshape ? scratch.floats(kBlock * stride_) : nullptr;
  }

  // Takes the queries, whose numbers are of F's storage format.
  void queries(const char* const* rows) { transpose_rows(rows, tile_.count, p_.dim / F::kPack, queries_, stride_); }

  void block(const KeyBlock& block, State& state) {
    for (int i = 0; i < block.count; ++i) {
      const Run& run = block.runs[i];
      float* s = logits_ + run.column * stride_;
      dots(run, s);
      if (run.partial || p_.reshape)
        adjust_logits(p_, tile_, run, p_.reshape ? bias_columns(p_, tile_, run, bias_, stride_) : nullptr, s, stride_);
      if (run.count & 1)
        for (int64_t c = 0; c < stride_; c += kWidth) store(s + run.count * stride_ + c, splat(-kInf));
    }
    softmax(block.columns, state);
    for (int i = 0; i < block.count; ++i) values(block.runs[i], state.out);
  }

 private:
  void dots(const Run& run, float* s) {
    visible_products<F>(p_, tile_, run,
                        {run.k, run.k_stride, reinterpret_cast<const char*>(queries_), stride_ * 4, s, stride_,
                         p_.dim / F::kPack, false});
  }

  void softmax(int64_t columns, State& state) {
    alignas(64) float shrink[kTile];
    bool any = false;
    for (int64_t c = 0; c < stride_; c += kWidth) {
      float* s = logits_ + c;
      const vf old = load(state.top + c), top = vmax(old, top_of(s, columns) * p_.factor);
      const vf base = top == -kInf ? vf{} : top;
      const vf fade = exp2<6>(old - base);
      store(state.sum + c, load(state.sum + c) * fade + exponentials(s, columns, base));
      store(state.top + c, top);
      store(shrink + c, fade);
    }
    for (int r = 0; r < tile_.count; ++r) any |= shrink[r] != 1.0f;
    if (!any) return;
    for (int r = 0; r < tile_.count; ++r) {
      float* o = state.out + r * p_.width;
      for (int64_t c = 0; c < p_.width; c += kWidth) store(o + c, load(o + c) * shrink[r]);
    }
  }

  vf top_of(const float* s, int64_t columns) const {
    vf a = splat(-kInf), b = a, c = a, d = a;
    int64_t t = 0;
    for (; t + 4 <= columns; t += 4, s += 4 * stride_) {
      a = vmax(a, load(s));
      b = vmax(b, load(s + stride_));
      c = vmax(c, load(s + 2 * stride_));
      d = vmax(d, load(s + 3 * stride_));
    }
    for (; t < columns; t += 2, s += 2 * stride_) a = vmax(a, vmax(load(s), load(s + stride_)));
    return vmax(vmax(a, b), vmax(c, d));
  }

  // Replaces one vector of logits by what weighs the values, and returns the sums.
  vf exponentials(float* s, int64_t columns, vf base) {
    vf a{}, b{};
    float* to = s;
    for (int64_t t = 0; t < columns; t += 2, s += 2 * stride_) {
      ahead_.step();
      const vf x = exp2<F::kExpDegree>(load(s) * p_.factor - base);
      const vf y = exp2<F::kExpDegree>(load(s + stride_) * p_.factor - base);
      a = a + x;
      b = b + y;
      if constexpr (F::kPack == 2) {
        store(to, F::join(x, y));
        to += stride_;
      } else {
        store(s, x);
        store(s + stride_, y);
      }
    }
    return a + b;
  }

  void values(const Run& run, float* out) {
    weighted_rows<F>(p_, tile_, run, logits_ + run.column / F::kPack * stride_, stride_, run.v, run.v_stride, out,
                     p_.width);
  }

  const Problem& p_;
  const Tile& tile_;
  Ahead& ahead_;
  int64_t stride_;
  float *queries_, *logits_, *bias_;
};

}  // namespace fastprompt::FASTPROMPT_ISA
