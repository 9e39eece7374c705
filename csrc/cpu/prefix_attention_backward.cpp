// Gradients of attention over a prefix in place and own keys.
//
// A unit is one key-value head of some rows of one prompt, taken in order. Their own keys' gradients are finished
// there; the prefix's are summed in float32 per unit and the units' sums added in a fixed order, whatever thread did
// them. So gradients of the same output and lse are equal to the last bit on every run, with any number of threads.
#include "cpu/attend_many.h"
#include "cpu/schedule.h"

namespace fastprompt::FASTPROMPT_ISA {

namespace {

constexpr int64_t kUnits = 32;   // units that a call should have at least, by cutting the rows of a prompt into chunks
constexpr int64_t kChunks = 8;   // most chunks of the rows of a prompt: each needs a copy of its gradient
constexpr int64_t kTokens = 64;  // arena tokens whose sums are put together at a time

// Rows order[row] .. order[row + rows - 1], which read one prompt; its sums begin at `sums`, in floats.
struct Chunk {
  int64_t row, rows;
  int64_t start, tokens;
  int64_t sums;
};

// Numbers of a tile's rows that the softmax needs: exponents and what the weighted gradients lack, by row.
struct Softmax {
  alignas(64) float lse[kTile];
  alignas(64) float delta[kTile];
};

template <class F, class T>
class Backward {
 public:
  static constexpr int64_t kUnit = kWidth * F::kPack;

  Backward(const Problem& p, const Gradients& g, const List<Row>& rows, const List<int64_t>& order,
           const List<Chunk>& chunks, float* sums)
      : p_(p), g_(g), rows_(rows), order_(order), chunks_(chunks), sums_(sums) {
    dim_ = round_up(p.dim, kUnit);
    value_dim_ = round_up(p.value_dim, kUnit);
    for (int64_t b = 0; b < rows.size(); ++b) own_ = most(own_, rows[b].own);
    staged_ = sizeof(T) != sizeof(typename F::Storage) || dim_ != p.dim || value_dim_ != p.value_dim;
    constexpr int64_t kLogits = (kBlock + 2 * kRuns) * kTile;
    scratch_ = 4 * (kTile * 3 * (dim_ + value_dim_) + 6 * kLogits + (own_ + kBlock) * (dim_ + value_dim_)) + 8192;
  }

  static int64_t token_floats(const Problem& p) { return round_up(p.dim, kUnit) + round_up(p.value_dim, kUnit); }

  void work(int64_t unit) {
    const int64_t head = unit % p_.call.kv_heads();
    const Chunk& chunk = chunks_[unit / p_.call.kv_heads()];
    Memory m(*this);
    float* prefix = sums_ + chunk.sums + head * chunk.tokens * (dim_ + value_dim_);
    memset(prefix, 0, chunk.tokens * (dim_ + value_dim_) * 4);
    const Sums prefix_sums{prefix, prefix + chunk.tokens * dim_};
    for (int64_t i = chunk.row; i < chunk.row + chunk.rows; ++i) {
      const Row& row = rows_[order_[i]];
      memset(m.own.k, 0, row.own * dim_ * 4);
      memset(m.own.v, 0, row.own * value_dim_ * 4);
      for (int64_t from = 0, to; from < row.queries * p_.group; from = to) {
        to = Schedule::tile_end(p_, row, from);
        ask(row, i + 1 < chunk.row + chunk.rows ? &rows_[order_[i + 1]] : nullptr, head, from, to, m.ahead);
        tile(row, head, from, to, prefix_sums, m);
      }
      put_own(g_.k, row, head, m.own.k, dim_, p_.dim, p_.call.scale);
      put_own(g_.v, row, head, m.own.v, value_dim_, p_.value_dim, 1.0f);
    }
  }

  // Adds the sums of all chunks that read some tokens, in order, and writes the prefix's gradients.
  void reduce(int64_t unit) const {
    const int64_t tokens = p_.call.prefix_k.size[1], blocks = (tokens + kTokens - 1) / kTokens;
    const int64_t head = unit / blocks, first = unit % blocks * kTokens, last = least(tokens, first + kTokens);
    float* sum = Scratch(thread_scratch(scratch_)).floats(kTokens * (dim_ + value_dim_));
    float* sum_v = sum + kTokens * dim_;
    memset(sum, 0, kTokens * (dim_ + value_dim_) * 4);
    for (int64_t c = 0; c < chunks_.size(); ++c) {
      const Chunk& chunk = chunks_[c];
      const int64_t lo = most(first, chunk.start), hi = least(last, chunk.start + chunk.tokens);
      if (lo >= hi) continue;
      const float* k = sums_ + chunk.sums + head * chunk.tokens * (dim_ + value_dim_);
      const float* v = k + chunk.tokens * dim_;
      add(sum + (lo - first) * dim_, k + (lo - chunk.start) * dim_, (hi - lo) * dim_);
      add(sum_v + (lo - first) * value_dim_, v + (lo - chunk.start) * value_dim_, (hi - lo) * value_dim_);
    }
    for (int64_t t = first; t < last; ++t) {
      if (g_.prefix_k) put(at(g_.prefix_k, head, t, 0), sum + (t - first) * dim_, p_.dim, p_.call.scale);
      if (g_.prefix_v) put(at(g_.prefix_v, head, t, 0), sum_v + (t - first) * value_dim_, p_.value_dim, 1.0f);
    }
  }

 private:
  struct Sums {
    float *k, *v;
  };

  // What one unit works in.
  struct Memory {
    explicit Memory(const Backward& b) : scratch(thread_scratch(b.scratch_)) {
      constexpr int64_t kLogits = (kBlock + 2 * kRuns) * kTile;
      q = scratch.floats(kTile * b.dim_);
      dout = scratch.floats(kTile * b.value_dim_);
      q_columns = scratch.floats(kTile * b.dim_);
      dout_columns = scratch.floats(kTile * b.value_dim_);
      dq = scratch.floats(kTile * b.dim_);
      weights = scratch.floats(kLogits);
      slopes = scratch.floats(kLogits);
      extra = scratch.floats(kLogits);
      weights_rows = F::kPack == 2 ? scratch.floats(kLogits) : weights;
      slopes_rows = F::kPack == 2 ? scratch.floats(kLogits) : slopes;
      bias = scratch.floats(kLogits);
      own = {scratch.floats(b.own_ * b.dim_), scratch.floats(b.own_ * b.value_dim_)};
      k = scratch.floats(kBlock * b.dim_);
      v = scratch.floats(kBlock * b.value_dim_);
    }
    Scratch scratch;
    Ahead ahead;
    float *q, *dout;                  // the tile's rows, in F's storage
    float *q_columns, *dout_columns;  // the same, transposed
    float* dq;
    float *weights, *slopes;            // [keys, rows]: softmax, and gradient of logits; as kColumns of a product
    float *weights_rows, *slopes_rows;  // the same as kRows of a product
    float *extra, *bias;                // factors of the softcap's derivative, bias
    Sums own;
    float *k, *v;  // staged keys and values
  };

  void tile(const Row& row, int64_t head, int64_t from, int64_t to, const Sums& prefix, Memory& m) const {
    Tile tile;
    Softmax soft;
    for (int64_t r = from; r < to; ++r) tile.add(p_, row.number, head * p_.group + r / row.queries, r % row.queries);
    const int64_t stride = round_up(tile.count, kWidth);
    gather(tile, soft, m);
    memset(m.dq, 0, tile.count * dim_ * 4);
    if (tile.count <= kFew) sharpen(tile, row, head, soft, m, stride);
    Keys keys(p_, row, head, 0, row.prefix + row.own);
    KeyBlock block;
    while (block.fill(p_, tile, keys)) {
      for (int i = 0; i < block.count; ++i) {
        Run& run = block.runs[i];
        if (!(g_.q || g_.logits() || (run.own ? g_.k || g_.v : g_.prefix_k || g_.prefix_v))) continue;
        if (staged_) stage(run, m);
        weigh(tile, run, soft, m, stride);
        if (g_.logits()) put_logits(tile, run, m, stride);
        const Sums& to_sums = run.own ? m.own : prefix;
        const int64_t index = run.own ? run.index - row.own_start : run.index;
        if (run.own ? g_.v : g_.prefix_v)
          add_keys(tile, run, m.weights_rows, m.dout, value_dim_, to_sums.v + index * value_dim_, stride);
        if (run.own ? g_.k : g_.prefix_k)
          add_keys(tile, run, m.slopes_rows, m.q, dim_, to_sums.k + index * dim_, stride);
        if (g_.q) add_queries(tile, run, m, stride);
      }
    }
    if (!g_.q) return;
    for (int r = 0; r < tile.count; ++r)
      put(at(g_.q, tile.row[r], tile.head[r], tile.query[r]), m.dq + r * dim_, p_.dim, p_.call.scale);
  }

  // What the tile of query rows from .. to - 1 will write, what the next one reads, and a share of the keys and values
  // of the next row.
  void ask(const Row& row, const Row* next, int64_t head, int64_t from, int64_t to, Ahead& ahead) const {
    ahead.clear();
    if (row.queries < kWidth) return;
    const int64_t all = row.queries * p_.group, key_bytes = p_.dim * p_.bytes, value_bytes = p_.value_dim * p_.bytes;
    const auto rows = [&](const View& x, int64_t b, int64_t i, int64_t j, int step, int64_t count, int64_t bytes) {
      if (x) ahead.add(reinterpret_cast<const char*>(at(x, b, i, j)), x.stride[step] * p_.bytes, count, bytes);
    };
    rows(g_.q, row.number, head * p_.group + from / row.queries, from % row.queries, 2, to - from, key_bytes);
    const Row* after = to == all ? next : &row;
    if (after && after->queries == row.queries) {
      const int64_t first = to % all, count = Schedule::tile_end(p_, row, first) - first;
      const int64_t h = head * p_.group + first / row.queries, i = first % row.queries;
      rows(p_.call.q, after->number, h, i, 2, count, key_bytes);
      rows(g_.dout, after->number, i, h, 1, count, value_bytes);
      ahead.add(after->out + h * p_.out_head + i * p_.out_token, p_.out_token, count, value_bytes);
    }
    if (!next) return;
    const int64_t first = next->own * from / all, last = next->own * to / all;
    rows(p_.call.k, next->number, head, next->own_start + first, 2, last - first, key_bytes);
    rows(p_.call.v, next->number, head, next->own_start + first, 2, last - first, value_bytes);
  }

  // Brings the rows' queries and output gradients together, both ways round, and what the softmax needs.
  void gather(const Tile& tile, Softmax& soft, Memory& m) const {
    const char *q[kTile], *dout[kTile];
    for (int r = 0; r < tile.count; ++r) {
      const Row& row = rows_[tile.row[r]];
      const T* d = at(g_.dout, tile.row[r], tile.query[r], tile.head[r]);
      const T* o = reinterpret_cast<const T*>(row.out + tile.head[r] * p_.out_head + tile.query[r] * p_.out_token);
      q[r] = keep(tile.q[r], p_.dim, m.q, r, dim_);
      dout[r] = keep(reinterpret_cast<const char*>(d), p_.value_dim, m.dout, r, value_dim_);
      const int64_t i = tile.head[r] * p_.lse_head + tile.query[r];
      const float lse = row.lse[i];
      soft.lse[r] = lse == -kInf ? kInf : lse * kLog2e;  // a query that sees nothing weighs nothing
      soft.delta[r] = dot(d, o) - dlse(tile, r);
    }
    for (int r = tile.count; r < kTile; ++r) soft.lse[r] = kInf, soft.delta[r] = 0;
    const int64_t stride = round_up(tile.count, kWidth);
    transpose_rows(q, tile.count, dim_ / F::kPack, m.q_columns, stride);
    transpose_rows(dout, tile.count, value_dim_ / F::kPack, m.dout_columns, stride);
  }

  float dlse(const Tile& tile, int r) const {
    return g_.dlse ? *at_single(g_.dlse, tile.row[r], tile.head[r], tile.query[r]) : 0.0f;
  }

  // Makes the weights of each row sum up to 1 and their gradients to 0, which lse and outputs rounded to storage miss
  // by some units in the last place. Over many queries such errors average out; of few they would be the largest there
  // are.
  void sharpen(const Tile& tile, const Row& row, int64_t head, Softmax& soft, Memory& m, int64_t stride) const {
    alignas(64) float sums[kTile] = {}, moments[kTile] = {};
    Keys keys(p_, row, head, 0, row.prefix + row.own);
    KeyBlock block;
    while (block.fill(p_, tile, keys)) {
      for (int i = 0; i < block.count; ++i) {
        Run& run = block.runs[i];
        if (staged_) stage(run, m);
        products_of(tile, run, nullptr, m, stride);
        for (int64_t c = 0; c < stride; c += kWidth) {
          vf sum = load(sums + c), moment = load(moments + c);
          for (int64_t t = 0; t < run.count; ++t) {
            const vf weight = exp2<6>(load(m.weights + t * stride + c) * p_.factor - load(soft.lse + c));
            sum = sum + weight;
            moment = moment + (weight == 0.0f ? vf{} : weight * load(m.slopes + t * stride + c));
          }
          store(sums + c, sum);
          store(moments + c, moment);
        }
      }
    }
    for (int r = 0; r < tile.count; ++r) {
      const int64_t h = tile.head[r];
      const float sink =
          p_.call.sinks ? exp2<6>(splat(p_.call.sinks.as<const float>()[h] * kLog2e - soft.lse[r]))[0] : 0.0f;
      if (soft.lse[r] == kInf) continue;
      soft.lse[r] += __builtin_log2f(sums[r] + sink);
      soft.delta[r] = moments[r] / (sums[r] + sink) - dlse(tile, r);
    }
  }

  // Row r of a buffer in F's storage, filled with `count` numbers and zeros up to `stride`.
  const char* keep(const char* from, int64_t count, float* buffer, int r, int64_t stride) const {
    if constexpr (F::kPack == 2) {
      char* to = reinterpret_cast<char*>(buffer) + r * stride * 2;
      memcpy(to, from, count * 2);
      return to;
    } else {
      convert_rows<T>(from, 0, 1, count, buffer + r * stride, stride);
      return reinterpret_cast<const char*>(buffer + r * stride);
    }
  }

  float dot(const T* a, const T* b) const {
    vf sum{};
    int64_t c = 0;
    for (; c + kWidth <= p_.value_dim; c += kWidth) sum = sum + load(a + c) * load(b + c);
    const int rest = static_cast<int>(p_.value_dim - c);
    if (rest) sum = sum + load_first(a + c, rest) * load_first(b + c, rest);
    return sum_of(sum);
  }

  void stage(Run& run, Memory& m) const {
    convert_rows<T>(run.k, run.k_stride, run.count, p_.dim, m.k, dim_);
    convert_rows<T>(run.v, run.v_stride, run.count, p_.value_dim, m.v, value_dim_);
    run.k = reinterpret_cast<const char*>(m.k);
    run.v = reinterpret_cast<const char*>(m.v);
    run.k_stride = dim_ * 4;
    run.v_stride = value_dim_ * 4;
  }

  // Softmax weights of a run and the gradients of its logits before scaling, [run.count, stride].
  void weigh(const Tile& tile, const Run& run, const Softmax& soft, Memory& m, int64_t stride) const {
    float* extra = p_.call.softcap > 0 ? m.extra : nullptr;
    products_of(tile, run, extra, m, stride);
    if constexpr (F::kPack == 2)
      weigh_pairs(run, soft, extra, m, stride);
    else
      weigh_singles(run, soft, extra, m, stride);
  }

  // The logits of a run before `factor`, with the derivative of their softcap, and the gradients of their weights.
  void products_of(const Tile& tile, const Run& run, float* extra, Memory& m, int64_t stride) const {
    products(tile, run, run.k, run.k_stride, m.q, m.q_columns, dim_, m.weights, stride);
    if (run.partial || p_.reshape)
      adjust_logits(p_, tile, run, p_.reshape ? bias_columns(p_, tile, run, m.bias, stride) : nullptr, m.weights,
                    stride, extra);
    products(tile, run, run.v, run.v_stride, m.dout, m.dout_columns, value_dim_, m.slopes, stride);
  }

  // Dot products [keys, rows of the tile]. With few rows each is summed in several parts, which rounds less.
  void products(const Tile& tile, const Run& run, const char* keys, int64_t key_stride, const float* rows,
                const float* columns, int64_t depth, float* to, int64_t stride) const {
    if (tile.count <= kFew) {
      const int64_t vectors = depth / kUnit;
      for (int64_t t = 0; t < run.count; ++t)
        for (int64_t r = 0; r < stride; ++r) {
          vf sum{};
          for (int64_t d = 0; r < tile.count && d < vectors; ++d)
            sum = F::mul_add(load(rows + (r * vectors + d) * kWidth),
                             load_as<vf>(keys + t * key_stride + d * kWidth * 4), sum);
          to[t * stride + r] = sum_of(sum);
        }
      return;
    }
    const Operands o{keys, key_stride, reinterpret_cast<const char*>(columns), stride * 4, to, stride, depth / F::kPack,
                     false};
    visible_products<F>(p_, tile, run, o);
  }

  struct Weighed {
    vf weight, logit, slope;  // gradients of the logit and of the dot product, up to the scale
  };

  FP_INLINE Weighed weigh_one(const float* product, const float* gradient, const float* extra, vf lse, vf delta) const {
    const vf weight = exp2<F::kExpDegree>(load(product) * p_.factor - lse);
    // Where the weight is 0 the other factors may be anything, left over where nothing was computed.
    const vf logit = weight == 0.0f ? vf{} : weight * (load(gradient) - delta);
    if (!extra) return {weight, logit, logit};
    return {weight, logit, weight == 0.0f ? vf{} : logit * load(extra)};
  }

  void weigh_singles(const Run& run, const Softmax& soft, const float* extra, Memory& m, int64_t stride) const {
    for (int64_t c = 0; c < stride; c += kWidth) {
      const vf lse = load(soft.lse + c), delta = load(soft.delta + c);
      for (int64_t t = 0; t < run.count; ++t) {
        m.ahead.step();
        const int64_t i = t * stride + c;
        const Weighed w = weigh_one(m.weights + i, m.slopes + i, extra ? extra + i : nullptr, lse, delta);
        store(m.weights + i, w.weight);
        store(m.slopes + i, w.slope);
        if (g_.logits()) store(m.bias + i, w.logit);
      }
    }
  }

  // Rows of a product of pairs need neighbours along the tile's rows together, columns neighbours along the keys.
  void weigh_pairs(const Run& run, const Softmax& soft, const float* extra, Memory& m, int64_t stride) const {
    const int64_t half = half_stride(stride);
    for (int64_t t = 0; t < run.count; t += 2)
      for (int64_t c = 0; c < stride; c += 2 * kWidth) {
        m.ahead.step();
        m.ahead.step();
        Weighed w[2][2] = {};
        for (int j = 0; j < 2; ++j)
          for (int i = 0; i < 2; ++i) {
            if (t + j >= run.count || c + i * kWidth >= stride) continue;
            const int64_t at = (t + j) * stride + c + i * kWidth, lane = c + i * kWidth;
            w[j][i] = weigh_one(m.weights + at, m.slopes + at, extra ? extra + at : nullptr, load(soft.lse + lane),
                                load(soft.delta + lane));
            if (g_.logits()) store(m.bias + at, w[j][i].logit);
          }
        for (int j = 0; j < 2; ++j) {
          store(m.weights_rows + (t + j) * half + c / 2, F::in_order(w[j][0].weight, w[j][1].weight));
          store(m.slopes_rows + (t + j) * half + c / 2, F::in_order(w[j][0].slope, w[j][1].slope));
        }
        for (int i = 0; i < 2; ++i)
          if (c + i * kWidth < stride)
            store(m.slopes + t / 2 * stride + c + i * kWidth, F::join(w[0][i].slope, w[1][i].slope));
      }
  }

  static int64_t half_stride(int64_t stride) { return F::kPack == 2 ? round_up(stride, 2 * kWidth) / 2 : stride; }

  // to[t, :] += sum over rows r of weights[t, r] * rows[r, :], for the keys t of a run.
  void add_keys(const Tile& tile, const Run& run, const float* weights, const float* rows, int64_t width, float* to,
                int64_t stride) const {
    constexpr B kB = F::kPack == 2 ? B::kPair : B::kReady;
    constexpr int64_t kNumber = F::kPack == 2 ? 2 : 4;
    const int64_t step = half_stride(stride) * 4;
    const auto part = [&](int64_t t, int64_t keys, int64_t lo, int64_t hi) {
      lo = lo / F::kPack * F::kPack;
      const Operands o{reinterpret_cast<const char*>(weights) + t * step + lo / F::kPack * 4,
                       step,
                       reinterpret_cast<const char*>(rows) + lo * width * kNumber,
                       width * kNumber,
                       to + t * width,
                       width,
                       (hi - lo) / F::kPack,
                       F::kPack == 2 && (hi - lo) % 2};
      multiply<F, A::kRows, kB, true>(o, keys, width / kWidth);
    };
    if (!run.partial) return part(0, run.count, 0, tile.count);
    constexpr int64_t kKeys = 2 * rows_beside(kMaxVectors);
    for (int64_t t = 0; t < run.count; t += kKeys) {
      const int64_t keys = least(kKeys, run.count - t);
      int64_t lo = tile.count, hi = 0;
      for (int r = 0; r < tile.count; ++r) {
        const Span s = seen(p_.call, run, tile.position[r]);
        if (s.lo < t + keys && s.hi > t) lo = least<int64_t>(lo, r), hi = r + 1;
      }
      if (lo < hi) part(t, keys, lo, hi);
    }
  }

  void add_queries(const Tile& tile, const Run& run, Memory& m, int64_t stride) const {
    weighted_rows<F>(p_, tile, run, m.slopes, stride, run.k, run.k_stride, m.dq, dim_);
  }

  // Gradients of the logits themselves, for biases: [B, Hq, N, keys] in float32.
  void put_logits(const Tile& tile, const Run& run, const Memory& m, int64_t stride) const {
    const View& to = run.own ? g_.logits_own : g_.logits_prefix;
    if (!to) return;
    for (int r = 0; r < tile.count; ++r) {
      float* row = at_single(to, tile.row[r], tile.head[r], tile.query[r]) + run.index;
      for (int64_t t = 0; t < run.count; ++t) row[t] = m.bias[t * stride + r];
    }
  }

  void put_own(const View& to, const Row& row, int64_t head, const float* from, int64_t stride, int64_t count,
               float scale) const {
    if (!to) return;
    for (int64_t j = 0; j < p_.call.k.size[2]; ++j) {
      T* out = at(to, row.number, head, j);
      const int64_t i = j - row.own_start;
      if (i >= 0 && i < row.own)
        put(out, from + i * stride, count, scale);
      else
        memset(static_cast<void*>(out), 0, count * sizeof(T));
    }
  }

  static void put(T* to, const float* from, int64_t count, float scale) {
    int64_t c = 0;
    for (; c + kWidth <= count; c += kWidth) store(to + c, load(from + c) * scale);
    if (c < count) store_first(to + c, load(from + c) * scale, static_cast<int>(count - c));
  }

  static void add(float* to, const float* from, int64_t count) {
    for (int64_t c = 0; c < count; c += kWidth) store(to + c, load(to + c) + load(from + c));
  }

  static T* at(const View& x, int64_t i, int64_t j, int64_t k) {
    return x.as<T>() + i * x.stride[0] + j * x.stride[1] + k * x.stride[2];
  }
  static float* at_single(const View& x, int64_t i, int64_t j, int64_t k) {
    return x.as<float>() + i * x.stride[0] + j * x.stride[1] + k * x.stride[2];
  }

  const Problem& p_;
  const Gradients& g_;
  const List<Row>& rows_;
  const List<int64_t>& order_;
  const List<Chunk>& chunks_;
  float* sums_;
  int64_t dim_, value_dim_, own_ = 0, scratch_;
  bool staged_;
};

// Rows of one prompt in chunks, whose number depends on the call alone.
int64_t chunks_of(const Problem& p, const Schedule& schedule, int64_t token_floats, List<Chunk>& chunks) {
  const List<Row>& rows = schedule.rows;
  const List<int64_t>& order = schedule.order;
  const auto end_of = [&](int64_t i) {
    int64_t j = i + 1;
    while (j < order.size() && Schedule::same_prompt(rows[order[i]], rows[order[j]])) ++j;
    return j;
  };
  int64_t prompts = 0, sums = 0;
  for (int64_t i = 0; i < order.size(); i = end_of(i)) ++prompts;
  const int64_t units = most<int64_t>(1, prompts * p.call.kv_heads());
  const int64_t wanted = least(kChunks, (kUnits + units - 1) / units);
  for (int64_t i = 0, j; i < order.size(); i = j) {
    j = end_of(i);
    const Row& row = rows[order[i]];
    const int64_t count = row.prefix ? least(wanted, j - i) : j - i;
    for (int64_t c = 0; c < count; ++c) {
      const int64_t first = i + (j - i) * c / count, last = i + (j - i) * (c + 1) / count;
      chunks.push({first, last - first, row.prefix_start, row.prefix, sums});
      sums += p.call.kv_heads() * row.prefix * token_floats;
    }
  }
  return sums;
}

template <class F, class T>
void run(const Problem& p, const Gradients& g, const Schedule& schedule) {
  using Loops = Backward<F, T>;
  List<Chunk> chunks;
  const int64_t floats = chunks_of(p, schedule, Loops::token_floats(p), chunks);
  Loops loops(p, g, schedule.rows, schedule.order, chunks, static_cast<float*>(call_scratch(floats * 4)));
  for_each_unit(chunks.size() * p.call.kv_heads(), [&](int64_t unit) { loops.work(unit); });
  if (!g.prefix_k && !g.prefix_v) return;
  const int64_t blocks = (p.call.prefix_k.size[1] + kTokens - 1) / kTokens;
  for_each_unit(blocks * p.call.kv_heads(), [&](int64_t unit) { loops.reduce(unit); });
}

template <class T>
void run(const AttentionGradients& call) {
  Problem p = problem_of(call.forward);
  const Schedule schedule(p);
  p.rows = schedule.rows.data();
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2) {
    if (p.call.dtype == Dtype::bf16 && p.dim % (2 * kWidth) == 0 && p.value_dim % (2 * kWidth) == 0)
      return run<Pairs, Bf16>(p, call.gradients, schedule);
  }
#endif
  run<Singles, T>(p, call.gradients, schedule);
}

}  // namespace

void prefix_attention_backward(const AttentionGradients& call) {
  if (call.forward.dtype == Dtype::f32) return run<float>(call);
  if (call.forward.dtype == Dtype::bf16) return run<Bf16>(call);
  run<F16>(call);
}

}  // namespace fastprompt::FASTPROMPT_ISA
