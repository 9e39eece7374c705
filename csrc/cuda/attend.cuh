// The kernel's body: blocks take items of work in turn, and walk their keys tile by tile.
//
//   query rows <= 16:  warp 0 | warp 1 | warp 2 | warp 3     each its own slice, no barrier between warps
//   17 to 32:          warps 0, 2 take rows 0-15, warps 1, 3 rows 16-31, each half of the slices
//   33 to 64:          a warp for each 16 rows, all slices, two at a time
#pragma once

#include "cuda/finish.cuh"
#include "cuda/loads.cuh"

namespace fastprompt::cuda {

// The slices of one tile that fall to a warp, from `first` in steps of `step`: two at once where there is room for it.
template <class F, int D>
FP_DEVICE void attend_tile(const Ring<F, D>& ring, const Queries<D>& queries, int32_t t, int first, int last, int step,
                           const Work& w, const Logits& logits, State<D>& state) {
  const int there = lesser(last, ceil_div(w.end - t, kSliceKeys)), apart = step * kSliceKeys;
  int s = first;
  if constexpr (D <= 128) {
#pragma unroll 1
    for (; s + step < there; s += 2 * step) {
      const char* const slices[2] = {ring.slice(s), ring.slice(s + step)};
      attend_slices<F, D, 2>(queries, slices, t + s * kSliceKeys, apart, w.end, w.extent.prefix, logits, state);
    }
  }
#pragma unroll 1
  for (; s < there; s += step) {
    const char* const slices[1] = {ring.slice(s)};
    attend_slices<F, D, 1>(queries, slices, t + s * kSliceKeys, apart, w.end, w.extent.prefix, logits, state);
  }
}

template <class F, int D>
FP_DEVICE void attend(const Call& c, const Work& w, Ring<F, D>& ring, char* queries_at, const Exchange<D>& exchange) {
  const int warps = c.schedule.warps, tiles = ceil_div(w.rows, kTileRows), copies = warps / tiles;
  const int mine = warp() / tiles;  // which of the copies of its rows this warp is; none from `copies` on
  const bool solo = tiles == 1;
  ring.start(w);
  for (int i = 0; i < c.schedule.stages - 1; ++i) ring.load();

  Queries<D> queries(queries_at + warp() * Slice<D>::kQueries);
  queries.load(c, w, warp() % tiles);
  const Logits logits = logits_of(c, w.kv_head);
  State<D> state;
  state.clear();
#pragma unroll 1
  for (int32_t t = w.begin; t < w.end; t += kSliceKeys * warps) {
    ring.wait(t);
    ring.fence();
    solo ? warp_sync() : block_sync();  // all have their slices, and nobody uses the tile before this one
    ring.load();
    attend_tile(ring, queries, t, mine, mine < copies ? warps : 0, copies, w, logits, state);
    ring.done();
  }
  block_sync();
  exchange.put(state);
  block_sync();
  finish<F, D>(c, w, exchange, tiles, copies);
  ring.fence();
  block_sync();
}

template <class F, int D>
FP_DEVICE void decode(const Call& c, char* shared) {
  const int warps = c.schedule.warps;
  char* queries = shared + c.schedule.stages * warps * Slice<D>::kBytes;
  auto* barriers = reinterpret_cast<uint64_t*>(queries + warps * Slice<D>::kQueries);
  const Exchange<D> exchange = {reinterpret_cast<float*>(shared),
                                reinterpret_cast<float*>(barriers + c.schedule.stages * warps)};
  allow_next_kernel();
  Ring<F, D> ring(c, shared, barriers);
  const int32_t tiles = used_tiles(c), heads = c.args.kv_heads;
  const int32_t cuts = ceil_div(FASTPROMPT_SHARERS * group(c), kTileRows * warps);
  const int32_t together = tiles * cuts * heads * c.schedule.shared_parts;
  const int32_t all = together + static_cast<int32_t>(c.args.rows) * heads * c.schedule.alone_parts;
#pragma unroll 1
  for (int32_t item = block(); item < all; item += blocks()) {
    Work work;
    const bool found = item < together ? find_shared(c, item, tiles, work) : find_alone(c, item - together, work);
    if (!found) continue;
    if (work.begin == work.end && !work.whole && !work.sinks)
      leave_empty(c, work);
    else
      attend<F, D>(c, work, ring, queries, exchange);
  }
}

}  // namespace fastprompt::cuda
