// The unit of attention: a tile of query rows against runs of keys, and who of them sees whom.
#pragma once

#include "attention.h"
#include "cpu/formats.h"

namespace fastprompt::FASTPROMPT_ISA {

constexpr int kTile = 64;    // most query rows in a tile
constexpr int kBlock = 256;  // most keys that pass through one softmax step
constexpr int kFew = 8;      // up to so many query rows, dot products along the head beat matrix products
constexpr int kRuns = 32;    // most runs of keys in a block

// One row of the batch. Pointers are at its first query and head 0; positions count the prefix in front of the text.
struct Row {
  const char* q;
  char* out;
  float* lse;
  int64_t number;
  int64_t queries;
  int64_t prefix_start, prefix;  // arena tokens
  int64_t own_start, own;        // real own keys
  int64_t position;              // of the first query
  int64_t own_position;          // of the first real own key
  int64_t partial;               // its first partial state, in states; with `parts` of them a query and head
  int64_t parts;
};

// A call with what all its rows share. Strides in bytes, `lse_head` in floats.
struct Problem {
  const AttentionCall& call;
  const Row* rows = nullptr;
  int64_t group = 0, dim = 0, value_dim = 0;
  int64_t width = 0;  // value_dim rounded up to whole vectors
  int64_t bytes = 0;  // of a number
  int64_t q_head = 0, q_token = 0, out_head = 0, out_token = 0, lse_head = 0;
  bool reshape = false;  // logits take more than a factor: softcap, bias, or a scale that is not positive
  float factor = 1;      // from dot product to the exponent of 2, 1 with `reshape`

  explicit Problem(const AttentionCall& c) : call(c) {}
};

// A run of keys in memory at consecutive positions, seen in part by the rows of a tile.
struct Run {
  const char* k;
  const char* v;
  int64_t k_stride, v_stride;  // bytes
  const char* next;            // keys to ask for while the values of this run are used
  int64_t next_stride;
  int64_t count;
  int64_t position;  // of its first key
  int64_t index;     // of its first key among the row's own keys, or the prefix's
  int64_t column;    // where its logits stand in the block
  bool own;
  bool partial;  // some row of the tile does not see all of it
};

// Query rows of one key-value head that meet the same keys.
struct Tile {
  int count = 0;
  int64_t first = INT64_MAX, last = INT64_MIN;  // least and greatest position
  const char* q[kTile];
  int64_t position[kTile];
  int64_t row[kTile], head[kTile], query[kTile];

  void add(const Problem& p, int64_t row_number, int64_t query_head, int64_t i) {
    const Row& r = p.rows[row_number];
    q[count] = r.q + query_head * p.q_head + i * p.q_token;
    position[count] = r.position + i;
    row[count] = row_number;
    head[count] = query_head;
    query[count] = i;
    first = least(first, position[count]);
    last = most(last, position[count]);
    ++count;
  }
};

// Which keys of a run a query sees: lo <= t < hi.
struct Span {
  int64_t lo, hi;
};

inline Span seen(const AttentionCall& call, const Run& run, int64_t position) {
  const int64_t ahead = position - run.position;  // distance to the first key; key t is at ahead - t
  Span s{0, run.count};
  if (call.causal && run.own) s.hi = least(s.hi, ahead + 1);
  if (call.window) {
    s.lo = most(s.lo, ahead - call.window + 1);
    if (!call.causal) s.hi = least(s.hi, ahead + call.window);
  }
  s.hi = most<int64_t>(s.hi, 0);
  s.lo = least(s.lo, s.hi);
  return s;
}

// Keys `first` .. `last` - 1 of a row, counted with its prefix in front, run by run.
class Keys {
 public:
  Keys(const Problem& p, const Row& row, int64_t kv_head, int64_t first, int64_t last)
      : p_(p), row_(row), head_(kv_head), first_(first), at_(first), last_(last) {}

  // The next run of at most `room` keys; false at the end.
  bool next(int64_t room, Run& run) {
    if (at_ >= last_) return false;
    run.own = at_ >= row_.prefix;
    run.count = least(room, (run.own ? last_ : least(last_, row_.prefix)) - at_);
    run.index = run.own ? row_.own_start + at_ - row_.prefix : at_;
    run.position = run.own ? row_.own_position + at_ - row_.prefix : at_;
    if (run.own && p_.call.paged()) run.count = least(run.count, in_one_piece(run.index, run.count));
    const View &k = run.own ? p_.call.k : p_.call.prefix_k, &v = run.own ? p_.call.v : p_.call.prefix_v;
    run.k = place(k, at_, head_, run.k_stride);
    run.v = place(v, at_, head_, run.v_stride);
    look_ahead(run);
    at_ += run.count;
    return true;
  }

 private:
  // Where key `at` of a head, or its value, lies in the tensor `x` that has it; `stride` is the distance to the next.
  const char* place(const View& x, int64_t at, int64_t head, int64_t& stride) const {
    if (at < row_.prefix) {  // [H, tokens, D]
      stride = x.stride[1] * p_.bytes;
      return x.as<const char>() + head * x.stride[0] * p_.bytes + (row_.prefix_start + at) * stride;
    }
    const int64_t own = row_.own_start + at - row_.prefix;
    if (!p_.call.paged()) {  // [B, H, tokens, D]
      stride = x.stride[2] * p_.bytes;
      return x.as<const char>() + (row_.number * x.stride[0] + head * x.stride[1]) * p_.bytes + own * stride;
    }
    const Index table = p_.call.block_table[row_.number];  // [blocks, block_size, H, D]
    const int64_t size = x.size[1];
    stride = x.stride[1] * p_.bytes;
    return x.as<const char>() + (table[own / size] * x.stride[0] + head * x.stride[2]) * p_.bytes + own % size * stride;
  }

  // What will be read after the values of this run's block: keys one block on, at the end those of the next head.
  void look_ahead(Run& run) const {
    int64_t at = at_ + kBlock, head = head_;
    if (at >= last_) at = first_ + (at_ - first_) % kBlock, ++head;
    if (head == p_.call.kv_heads()) at = at_, head = head_;
    run.next = place(at < row_.prefix ? p_.call.prefix_k : p_.call.k, at, head, run.next_stride);
  }

  // As many own keys as lie one behind the other, through pages that happen to be neighbours.
  int64_t in_one_piece(int64_t index, int64_t most) const {
    const View &k = p_.call.k, &v = p_.call.v;
    const Index table = p_.call.block_table[row_.number];
    const int64_t size = k.size[1], first = index / size;
    const bool dense = k.stride[0] == size * k.stride[1] && v.stride[0] == size * v.stride[1];
    int64_t reach = size - index % size;
    for (int64_t n = 1; dense && reach < most && table[first + n] == table[first] + n; ++n) reach += size;
    return reach;
  }

  const Problem& p_;
  const Row& row_;
  int64_t head_, first_, at_, last_;
};

// Runs whose logits share one softmax step.
struct KeyBlock {
  Run runs[kRuns];
  int count = 0;
  int64_t columns = 0;  // of logits; a run of odd length leaves one empty behind it

  // Fills the block with what the tile sees of the next keys; false when there are none.
  bool fill(const Problem& p, const Tile& tile, Keys& keys) {
    count = 0;
    columns = 0;
    while (count < kRuns && columns < kBlock && keys.next(kBlock - columns, runs[count])) {
      Run& run = runs[count];
      const Span early = seen(p.call, run, tile.first), late = seen(p.call, run, tile.last);
      const int64_t lo = early.lo, hi = late.hi;
      if (lo >= hi) continue;
      run.partial = late.lo > lo || early.hi < hi;
      run.k += lo * run.k_stride;
      run.v += lo * run.v_stride;
      run.position += lo;
      run.index += lo;
      run.count = hi - lo;
      run.column = columns;
      columns += round_up(run.count, 2);
      ++count;
    }
    return count > 0;
  }
};

// The running softmax of a tile: maximum and sum of exponentials of 2, and weighted values [kTile, width].
struct State {
  float top[kTile];
  float sum[kTile];
  float* out;
};

// Rows of memory that will be needed soon, asked for one at a time while something else is computed. A burst of
// requests would hold up the loads of that computation.
class Ahead {
 public:
  void clear() { count_ = at_ = 0; }
  void add(const char* row, int64_t stride, int64_t rows, int64_t bytes) {
    if (rows > 0) regions_[count_++] = {row, stride, rows, bytes};
  }
  FP_INLINE void step() {
    if (at_ == count_) return;
    Region& r = regions_[at_];
    for (int64_t x = 0; x < r.bytes; x += kLine) __builtin_prefetch(r.row + x, 0, 2);
    r.row += r.stride;
    if (--r.rows == 0) ++at_;
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Region {
    const char* row;
    int64_t stride, rows, bytes;
  };
  Region regions_[8];
  int count_ = 0, at_ = 0;
};

// Float32 copies of `count` rows of `columns` numbers, with zeros up to `to_stride`.
template <class T>
inline void convert_rows(const char* from, int64_t stride, int64_t count, int64_t columns, float* to,
                         int64_t to_stride) {
  for (int64_t r = 0; r < count; ++r, from += stride, to += to_stride) {
    const T* row = reinterpret_cast<const T*>(from);
    int64_t c = 0;
    for (; c + kWidth <= columns; c += kWidth) store(to + c, load(row + c));
    if (c < to_stride) store(to + c, load_first(row + c, static_cast<int>(columns - c)));
  }
}

// Rows of 4-byte units as columns: to[d * stride + r] = rows[r][d], zeros for r >= count up to the stride.
inline void transpose_rows(const char* const* rows, int count, int64_t depth, float* to, int64_t stride) {
  for (int64_t r = 0; r < stride; r += kWidth) {
    const int n = static_cast<int>(most<int64_t>(0, least<int64_t>(kWidth, count - r)));
    int64_t d = 0;
#if defined(__AVX512F__)
    for (; d + kWidth <= depth; d += kWidth) {
      vf square[kWidth];
      for (int i = 0; i < kWidth; ++i) square[i] = i < n ? load_as<vf>(rows[r + i] + d * 4) : vf{};
      transpose(square);
      for (int i = 0; i < kWidth; ++i) store(to + (d + i) * stride + r, square[i]);
    }
#endif
    for (; d < depth; ++d)
      for (int i = 0; i < kWidth; ++i) to[d * stride + r + i] = i < n ? load_as<float>(rows[r + i] + d * 4) : 0.0f;
  }
}

// Memory of one thread, handed out piece by piece.
class Scratch {
 public:
  explicit Scratch(void* memory) : at_(static_cast<char*>(memory)) {}
  float* floats(int64_t n) {
    float* p = reinterpret_cast<float*>(at_);
    at_ += round_up(n * 4, 64);
    return p;
  }

 private:
  char* at_;
};

// tanh, in relative accuracy near 0 as far out: a polynomial there, exponentials elsewhere.
inline vf tanh_of(vf x) {
  const vf size = x < 0.0f ? -x : x;
  const vf e = exp2<6>(size * (-2.0f * kLog2e));
  const vf far = (1.0f - e) / (1.0f + e);
  const vf s = x * x;
  const vf near = size * (1.0f + s * (-1.0f / 3 + s * (2.0f / 15 + s * (-17.0f / 315 + s * (62.0f / 2835)))));
  const vf result = size < 0.25f ? near : far;
  return x < 0.0f ? -result : result;
}

}  // namespace fastprompt::FASTPROMPT_ISA
