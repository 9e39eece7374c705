// Attention over a prefix in place and own keys, dense or paged: forward.
#include "cpu/attend_few.h"
#include "cpu/attend_many.h"
#include "cpu/schedule.h"

namespace fastprompt::FASTPROMPT_ISA {

namespace {

// Which inner loops serve a tile, and whether keys and values must be brought to float32 in whole vectors first.
struct Way {
  bool few, pairs, staged;
};

Way way_of(const Problem& p, int rows) {
  const bool few = rows <= kFew, whole = p.value_dim % kWidth == 0 && (!few || p.dim % kWidth == 0);
#if defined(__AVX512BF16__)
  const int64_t unit = 2 * kWidth;
  const bool pairs = p.call.dtype == Dtype::bf16 && p.value_dim % unit == 0 && p.dim % (few ? unit : 2) == 0;
#else
  const bool pairs = false;
#endif
  return {few, pairs, !pairs && (!whole || (!few && p.call.dtype != Dtype::f32))};
}

// Float32 copies of a block's keys and values, padded with zeros to whole vectors.
template <class T>
class Stage {
 public:
  static int64_t scratch(const Problem& p) { return kBlock * (round_up(p.dim, kWidth) + p.width); }

  Stage(const Problem& p, Scratch& scratch)
      : p_(p), k_(scratch.floats(scratch_k())), v_(scratch.floats(kBlock * p.width)) {}

  void operator()(KeyBlock& block) const {
    float *k = k_, *v = v_;
    for (int i = 0; i < block.count; ++i) {
      Run& run = block.runs[i];
      const int64_t wide = round_up(p_.dim, kWidth);
      convert_rows<T>(run.k, run.k_stride, run.count, p_.dim, k, wide);
      convert_rows<T>(run.v, run.v_stride, run.count, p_.value_dim, v, p_.width);
      run.k = reinterpret_cast<const char*>(k);
      run.v = reinterpret_cast<const char*>(v);
      run.k_stride = wide * 4;
      run.v_stride = p_.width * 4;
      k += run.count * wide;
      v += run.count * p_.width;
    }
  }

 private:
  int64_t scratch_k() const { return kBlock * round_up(p_.dim, kWidth); }
  const Problem& p_;
  float *k_, *v_;
};

template <class T>
class Forward {
 public:
  // `counts` are zeros, one a row and key-value head.
  Forward(const Problem& p, const Schedule& schedule, float* states, int32_t* counts)
      : p_(p), plan_(schedule), states_(states), counts_(counts) {
    scratch_ = 4 * (kTile * p.width + Stage<T>::scratch(p) + kTile * round_up(p.dim, kWidth) +
                    most(Many<Singles>::scratch(p), Few<Widened<float>>::scratch(p))) +
               4096;
  }

  void work(const Work& w, int64_t head) const {
    Tile tile;
    Ahead ahead;
    if (w.rows) {
      for (int64_t i = w.row; i < w.row + w.rows; ++i)
        add(tile, plan_.order[i], head, 0, plan_.rows[plan_.order[i]].queries * p_.group);
      attend(tile, plan_.rows[plan_.order[w.row]], head, w, ahead);
      return;
    }
    const Row& row = plan_.rows[w.row];
    for (int64_t from = w.from, to; from < w.to; from = to) {
      to = least(w.to, Schedule::tile_end(p_, row, from));
      tile.count = 0;
      tile.first = INT64_MAX;
      tile.last = INT64_MIN;
      add(tile, w.row, head, from, to);
      ask(row, head, from, to, ahead);
      attend(tile, row, head, w, ahead);
    }
  }

 private:
  void add(Tile& tile, int64_t b, int64_t head, int64_t from, int64_t to) const {
    const Row& row = plan_.rows[b];
    for (int64_t r = from; r < to; ++r) tile.add(p_, b, head * p_.group + r / row.queries, r % row.queries);
  }

  // What the tile of query rows from .. to - 1 will write, the queries of the next one, and a share of the next head's
  // keys and values.
  void ask(const Row& row, int64_t head, int64_t from, int64_t to, Ahead& ahead) const {
    ahead.clear();
    const AttentionCall& call = p_.call;
    if (row.queries < kWidth || call.paged()) return;
    const int64_t all = row.queries * p_.group, h = head * p_.group + from / row.queries, bytes = p_.dim * p_.bytes;
    ahead.add(row.out + h * p_.out_head + from % row.queries * p_.out_token, p_.out_token, to - from, p_.out_head);
    const int64_t next = to == all ? (head + 1) * all : head * all + to;
    if (next / all == call.kv_heads()) return;
    const int64_t g = next / row.queries, i = next % row.queries;
    ahead.add(row.q + g * p_.q_head + i * p_.q_token, p_.q_token, Schedule::tile_end(p_, row, next % all) - next % all,
              bytes);
    if (head + 1 == call.kv_heads()) return;
    const int64_t first = row.own * from / all, last = row.own * to / all, b = row.number;
    const auto part = [&](const View& x, int64_t width) {
      const int64_t at = b * x.stride[0] + (head + 1) * x.stride[1] + (row.own_start + first) * x.stride[2];
      ahead.add(x.as<const char>() + at * p_.bytes, x.stride[2] * p_.bytes, last - first, width * p_.bytes);
    };
    part(call.k, p_.dim);
    part(call.v, p_.value_dim);
  }

  float* state(const Row& row, int64_t part, int64_t head, int64_t i) const {
    return states_ + (row.partial + (part * p_.call.heads() + head) * row.queries + i) * (p_.width + 2);
  }

  // A tile against the keys of a piece of work, which are those of `row`.
  void attend(const Tile& tile, const Row& row, int64_t head, const Work& w, Ahead& ahead) const {
    Scratch scratch(thread_scratch(scratch_));
    State state;
    for (int r = 0; r < kTile; ++r) state.top[r] = -kInf, state.sum[r] = 0;
    state.out = scratch.floats(kTile * p_.width);
    memset(state.out, 0, tile.count * p_.width * 4);
    const Way way = way_of(p_, tile.count);
    Keys keys(p_, row, head, w.first, w.last);
    if (way.few) {
      if (way.staged) {
        few<Widened<float>>(tile, keys, true, state, scratch);
      } else if (way.pairs) {
#if defined(__AVX512BF16__)
        few<Dotted>(tile, keys, false, state, scratch);
#endif
      } else {
        few<Widened<T>>(tile, keys, false, state, scratch);
      }
    } else if (way.pairs) {
#if defined(__AVX512BF16__)
      many<Pairs>(tile, keys, false, state, scratch, ahead);
#endif
    } else {
      many<Singles>(tile, keys, way.staged, state, scratch, ahead);
    }
    for (int r = 0; r < tile.count; ++r) put(tile, r, w.part, state);
    if (w.part < 0) return;
    for (int from = 0, to; from < tile.count; from = to) {
      for (to = from + 1; to < tile.count && tile.row[to] == tile.row[from];) ++to;
      const Row& done = plan_.rows[tile.row[from]];
      int32_t* count = counts_ + tile.row[from] * p_.call.kv_heads() + head;
      if (__atomic_add_fetch(count, to - from, __ATOMIC_ACQ_REL) == done.parts * done.queries * p_.group)
        merge(done, head, state.out);
    }
  }

  // Puts the partial states of a row together, in their order; whoever wrote the last of them does it. `out` is room
  // for one.
  void merge(const Row& row, int64_t kv_head, float* out) const {
    const int64_t step = p_.call.heads() * row.queries * (p_.width + 2);
    for (int64_t h = kv_head * p_.group; h < (kv_head + 1) * p_.group; ++h)
      for (int64_t i = 0; i < row.queries; ++i) {
        const float* first = state(row, 0, h, i);
        float top = -kInf, sum = 0;
        for (int64_t n = 0; n < row.parts; ++n) top = most(top, first[n * step]);
        const float base = top == -kInf ? 0.0f : top;
        for (int64_t c = 0; c < p_.width; c += kWidth) store(out + c, vf{});
        for (int64_t n = 0; n < row.parts; ++n) {
          const float* part = first + n * step;
          const float share = exp2<6>(splat(part[0] - base))[0];
          sum += share * part[1];
          for (int64_t c = 0; c < p_.width; c += kWidth) store(out + c, load(out + c) + load(part + 2 + c) * share);
        }
        finish(row, h, i, top, sum, out);
      }
  }

  template <class R>
  void few(const Tile& tile, Keys& keys, bool staged, State& state, Scratch& scratch) const {
    Few<R> loops(p_, tile, scratch);
    loops.template queries<T>(tile.q);
    blocks(loops, tile, keys, staged, state, scratch);
  }

  template <class F>
  void many(const Tile& tile, Keys& keys, bool staged, State& state, Scratch& scratch, Ahead& ahead) const {
    Many<F> loops(p_, tile, scratch, ahead);
    if constexpr (F::kPack == 2 || sizeof(T) == 4) {
      loops.queries(tile.q);
    } else {
      float* wide = scratch.floats(kTile * round_up(p_.dim, kWidth));
      const char* rows[kTile];
      for (int r = 0; r < tile.count; ++r) {
        float* to = wide + r * round_up(p_.dim, kWidth);
        convert_rows<T>(tile.q[r], 0, 1, p_.dim, to, round_up(p_.dim, kWidth));
        rows[r] = reinterpret_cast<const char*>(to);
      }
      loops.queries(rows);
    }
    blocks(loops, tile, keys, staged, state, scratch);
  }

  template <class Loops>
  void blocks(Loops& loops, const Tile& tile, Keys& keys, bool staged, State& state, Scratch& scratch) const {
    KeyBlock block;
    if (!staged) {
      while (block.fill(p_, tile, keys)) loops.block(block, state);
      return;
    }
    const Stage<T> stage(p_, scratch);
    while (block.fill(p_, tile, keys)) {
      stage(block);
      loops.block(block, state);
    }
  }

  // A finished row of a tile: to the output, or to its partial state.
  void put(const Tile& tile, int r, int64_t part, const State& s) const {
    const Row& row = plan_.rows[tile.row[r]];
    if (part < 0) return finish(row, tile.head[r], tile.query[r], s.top[r], s.sum[r], s.out + r * p_.width);
    float* to = state(row, part, tile.head[r], tile.query[r]);
    to[0] = s.top[r];
    to[1] = s.sum[r];
    memcpy(to + 2, s.out + r * p_.width, p_.width * 4);
  }

  void finish(const Row& row, int64_t head, int64_t i, float top, float sum, const float* values) const {
    float share = 1;
    if (p_.call.sinks) {
      const float sink = p_.call.sinks.as<const float>()[head] * kLog2e, both = most(top, sink);
      const float base = both == -kInf ? 0.0f : both;
      share = exp2<6>(splat(top - base))[0];
      sum = sum * share + exp2<6>(splat(sink - base))[0];
      top = both;
    }
    const float scale = sum == 0 ? 0.0f : share / sum;
    T* out = reinterpret_cast<T*>(row.out + head * p_.out_head + i * p_.out_token);
    int64_t c = 0;
    for (; c + kWidth <= p_.value_dim; c += kWidth) store(out + c, load(values + c) * scale);
    if (c < p_.value_dim) store_first(out + c, load(values + c) * scale, static_cast<int>(p_.value_dim - c));
    if (row.lse) row.lse[head * p_.lse_head + i] = sum == 0 ? -kInf : top * kLn2 + __builtin_logf(sum);
  }

  const Problem& p_;
  const Schedule& plan_;
  float* states_;
  int32_t* counts_;  // query rows of partial states written so far
  int64_t scratch_;
};

template <class T>
void run(const AttentionCall& call) {
  Problem p = problem_of(call);
  Schedule schedule(p);
  schedule.plan(p);
  p.rows = schedule.rows.data();
  const int64_t counts = schedule.states ? call.rows * call.kv_heads() : 0;
  const int64_t states = schedule.states * (p.width + 2);
  float* memory = static_cast<float*>(call_scratch((states + counts) * 4));
  if (counts) memset(memory + states, 0, counts * 4);
  const Forward<T> forward(p, schedule, memory, reinterpret_cast<int32_t*>(memory + states));
  for_each_unit(schedule.units.size(), [&](int64_t i) {
    const Unit& unit = schedule.units[i];
    for (int64_t head = unit.head; head < unit.head + unit.heads; ++head) forward.work(schedule.work[unit.work], head);
  });
}

}  // namespace

void prefix_attention(const AttentionCall& call) {
  if (call.dtype == Dtype::f32) return run<float>(call);
  if (call.dtype == Dtype::bf16) return run<Bf16>(call);
  run<F16>(call);
}

}  // namespace fastprompt::FASTPROMPT_ISA
