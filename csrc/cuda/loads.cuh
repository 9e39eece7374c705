// The ring of tiles in shared memory: keys and values on their way from memory while earlier ones are used.
//
//   stage 0                 stage 1
//   [slice|slice|slice|slice][slice|slice|slice|slice]...    a slice for each warp
//    16 keys, 16 values, rows padded by 16 bytes
//
// A warp loads its slice of every tile: lanes 0 to 15 know where its keys are, lanes 16 to 31 its values. Prefix and
// own keys differ in nothing but that address. Rows behind the last key repeat it, so that nothing unread is loaded.
// e4m3 rows land in the second half of their place and are widened there by the warp that loaded them.
#pragma once

#include "cuda/widen.cuh"
#include "cuda/work.cuh"

namespace fastprompt::cuda {

template <class F, int D>
class Ring {
 public:
  FP_DEVICE Ring(const Call& call, char* shared, uint64_t* barriers)
      : call_(call), shared_(shared), barriers_(barriers + warp() * call.schedule.stages) {
    if (!bulk()) return;
    if (lane() == 0)
      for (int s = 0; s < call.schedule.stages; ++s) barrier_init(barriers_ + s, 1);
    fence_bulk();
    warp_sync();  // nobody else uses them
  }

  // Takes the keys of new work; the ring is empty.
  FP_DEVICE void start(const Work& work) {
    const fastprompt_decode_args& a = call_.args;
    const int64_t head = work.kv_head;
    end_ = work.end;
    prefix_ = work.extent.prefix;
    table_ = a.block_table + work.row * a.block_table_stride;
    arena_ = bytes(pick(a.prefix_k, a.prefix_v)) + work.extent.start * arena_step() +
             head * pick(a.prefix_k_head_stride, a.prefix_v_head_stride) * arena_unit();
    cache_ = bytes(pick(a.k_cache, a.v_cache)) + head * pick(a.k_head_stride, a.v_head_stride) * 2;
    value_scale_ = narrow() && a.prefix_v_scale != nullptr ? a.prefix_v_scale[head] : 1.0f;
    next_ = work.begin + warp() * kSliceKeys;
    look_up();
  }

  // Sets out to load the next tile; does nothing behind the last.
  FP_DEVICE void load() {
    const bool tile = next_ - warp() * kSliceKeys < end_;
    if (tile) {
      char* to = slice(fill_, warp());
      if (next_ < end_) bulk() ? load_bulk(to) : load_async(to);
      if (bulk() && next_ >= end_ && lane() == 0) barrier_arrive(barriers_ + fill_, 0);
      advance(fill_);
      next_ += kSliceKeys * call_.schedule.warps;
      look_up();
    }
    if (!bulk()) close_group();
  }

  // Waits for this warp's slice of the tile whose first key is `tile`. Other warps' slices are there after a barrier.
  FP_DEVICE void wait(int32_t tile) {
    if (bulk()) {
      barrier_wait(barriers_ + drain_, parity_);
    } else {
      if (call_.schedule.stages == 2) wait_groups<0>();
      if (call_.schedule.stages == 3) wait_groups<1>();
      if (call_.schedule.stages == 4) wait_groups<2>();
      warp_sync();  // a lane waits for its own copies only
    }
    if (narrow()) widen(slice(drain_, warp()), tile + warp() * kSliceKeys);
  }

  // The slice of a warp in the tile that was waited for.
  FP_DEVICE const char* slice(int which) const { return slice(drain_, which); }

  // The tile that was waited for is not used any more, once all warps have come to the next barrier.
  FP_DEVICE void done() {
    advance(drain_);
    if (drain_ == 0) parity_ ^= 1;
  }

  // Before a barrier behind which bulk copies overwrite what threads have read or written.
  FP_DEVICE void fence() const {
    if (bulk()) fence_bulk();
  }

 private:
  FP_DEVICE bool bulk() const { return kHasBulk && call_.schedule.bulk; }
  FP_DEVICE bool narrow() const { return call_.args.prefix_dtype == FASTPROMPT_E4M3; }

  // What this lane loads: a key or a value.
  template <class T>
  FP_DEVICE static T pick(T key, T value) {
    return lane() < kSliceKeys ? key : value;
  }
  FP_DEVICE static const char* bytes(const void* p) { return static_cast<const char*>(p); }
  FP_DEVICE int64_t arena_unit() const { return narrow() ? 1 : 2; }
  FP_DEVICE int64_t arena_step() const {
    return pick(call_.args.prefix_k_token_stride, call_.args.prefix_v_token_stride) * arena_unit();
  }

  FP_DEVICE void advance(int& stage) const { stage = stage + 1 == call_.schedule.stages ? 0 : stage + 1; }
  FP_DEVICE char* slice(int stage, int which) const {
    return shared_ + (stage * call_.schedule.warps + which) * Slice<D>::kBytes;
  }
  FP_DEVICE int32_t key(int32_t first) const { return lesser(first + lane() % kSliceKeys, end_ - 1); }

  // The page of this lane's next key and its place there, ahead of their use.
  FP_DEVICE void look_up() {
    const int32_t own = larger(key(next_) - prefix_, 0), page = own / call_.args.block_size;
    slot_ = own - page * call_.args.block_size;
    page_ = next_ < end_ && key(next_) >= prefix_ ? table_[page] : 0;
  }

  // Where this lane's next key is.
  FP_DEVICE const char* row(int32_t t) const {
    if (t < prefix_) return arena_ + t * arena_step();
    return cache_ + 2 * (int64_t{page_} * pick(call_.args.k_block_stride, call_.args.v_block_stride) +
                         int64_t{slot_} * pick(call_.args.k_slot_stride, call_.args.v_slot_stride));
  }
  FP_DEVICE bool is_narrow(int32_t t) const { return narrow() && t < prefix_; }

  FP_DEVICE void load_bulk(char* to) {
    const int32_t t = key(next_);
    const bool narrow = is_narrow(t);
    const int total = (2 * kLanes - count_bits(ballot(narrow))) * D;
    if (lane() == 0) barrier_arrive(barriers_ + fill_, total);
    copy_bulk(to + lane() * Slice<D>::kPitch + (narrow ? D : 0), row(t), narrow ? D : 2 * D, barriers_ + fill_);
  }

  // Neighbouring lanes copy neighbouring 16 bytes, of rows whose addresses other lanes know.
  FP_DEVICE void load_async(char* to) {
    constexpr int kUnits = D / 8;  // of 16 bytes in a row
    const int32_t t = key(next_);
    const uint64_t at = reinterpret_cast<uint64_t>(row(t));
    const uint32_t narrow = ballot(is_narrow(t));
    if (narrow != 0) {  // some rows of half as many bytes
#pragma unroll 1
      for (int i = 0; i < kUnits; ++i) {
        const int unit = i * kLanes + lane(), from = unit / kUnits, offset = unit % kUnits * 16;
        const char* source = reinterpret_cast<const char*>(shfl(at, from)) + offset;
        const bool half = narrow >> from & 1;
        if (!half || offset < D) copy_async(to + from * Slice<D>::kPitch + (half ? D : 0) + offset, source);
      }
      return;
    }
#pragma unroll 8
    for (int i = 0; i < kUnits; ++i) {
      const int unit = i * kLanes + lane(), from = unit / kUnits, offset = unit % kUnits * 16;
      copy_async(to + from * Slice<D>::kPitch + offset, reinterpret_cast<const char*>(shfl(at, from)) + offset);
    }
  }

  // Rows never meet: all lanes of a row read before one of them writes.
  FP_DEVICE void widen(char* slice, int32_t first) {
    constexpr int kUnits = D / 16, kRows = kLanes / kUnits;  // of 16 bytes in a row; rows at once
    if (first >= lesser(end_, prefix_)) return;
    for (int at = 0; at < 2 * kSliceKeys; at += kRows) {
      const int r = at + lane() / kUnits, unit = lane() % kUnits;
      const bool mine =
          lane() < kRows * kUnits && r < 2 * kSliceKeys && lesser(first + r % kSliceKeys, end_ - 1) < prefix_;
      char* here = slice + r * Slice<D>::kPitch;
      Bytes16 raw = {};
      if (mine) raw = *reinterpret_cast<const Bytes16*>(here + D + 16 * unit);
      warp_sync();
      if (mine) widen_e4m3<F>(raw, r < kSliceKeys ? 1.0f : value_scale_, here + 32 * unit);
    }
    warp_sync();
  }

  const Call& call_;
  char* shared_;
  uint64_t* barriers_;
  int fill_ = 0, drain_ = 0, parity_ = 0;
  int32_t end_, prefix_, next_, page_, slot_;
  const int32_t* table_;
  const char *arena_, *cache_;
  float value_scale_;
};

}  // namespace fastprompt::cuda
