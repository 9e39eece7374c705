// The machine's operations on a host: what csrc/cuda/ptx.cuh is on a GPU.
#pragma once

#include <utility>

#include "machine/block.h"
#include "machine/numbers.h"

#define FP_DEVICE inline

namespace fastprompt::cuda {

constexpr bool kHasBulk = true;

inline int thread() { return host::running().fibers.current(); }
inline int block() { return host::running().number(); }
inline int blocks() { return host::running().count(); }

// Names of operations, so that lanes in different ones are found out.
enum Operation { kSync, kShuffle, kShuffleXor, kBallot, kMatrices, kTransposed, kProduct };

inline void block_sync() { host::running().meet_block(); }
inline void warp_sync() {
  host::running().meet_warp(kSync, nullptr, [](void**) {});
  host::running().fibers.perhaps_switch();
}

template <class T>
struct Shuffled {
  T value, result;
  int from;
};
template <class T>
T exchange(Operation kind, T x, int from) {
  Shuffled<T> mine = {x, x, from};
  host::running().meet_warp(kind, &mine, [](void** all) {
    for (int l = 0; l < 32; ++l) {
      auto& to = *static_cast<Shuffled<T>*>(all[l]);
      to.result = static_cast<Shuffled<T>*>(all[to.from])->value;
    }
  });
  return mine.result;
}
template <class T>
T shfl(T x, int from) {
  return exchange(kShuffle, x, from % 32);
}
template <class T>
T shfl_xor(T x, int mask) {
  return exchange(kShuffleXor, x, (thread() % 32) ^ mask);
}
inline uint32_t ballot(bool x) {
  Shuffled<uint32_t> mine = {x, 0, 0};
  host::running().meet_warp(kBallot, &mine, [](void** all) {
    uint32_t votes = 0;
    for (int l = 0; l < 32; ++l) votes |= static_cast<Shuffled<uint32_t>*>(all[l])->value << l;
    for (int l = 0; l < 32; ++l) static_cast<Shuffled<uint32_t>*>(all[l])->result = votes;
  });
  return mine.result;
}
inline int count_bits(uint32_t x) { return __builtin_popcount(x); }

inline float exp2_of(float x) { return exp2f(x); }
inline float log2_of(float x) { return log2f(x); }

struct Loaded {
  uint32_t* to;
  const char* row;
};
// `from(lane, half)`: which matrix row and column a lane's half register is.
template <class F>
void matrices(Operation kind, uint32_t (&r)[4], const char* row, F from) {
  host::running().check_shared(row, 16, 16);
  Loaded mine = {r, row};
  host::running().meet_warp(kind, &mine, [&from](void** all) {
    for (int l = 0; l < 32; ++l)
      for (int j = 0; j < 4; ++j) {
        uint16_t halves[2];
        for (int h = 0; h < 2; ++h) {
          const auto [line, column] = from(l, h);
          memcpy(halves + h, static_cast<Loaded*>(all[8 * j + line])->row + 2 * column, 2);
        }
        memcpy(static_cast<Loaded*>(all[l])->to + j, halves, 4);
      }
  });
}
inline void load_matrices(uint32_t (&r)[4], const char* row) {
  matrices(kMatrices, r, row, [](int l, int h) { return std::pair(l / 4, l % 4 * 2 + h); });
}
inline void load_matrices_transposed(uint32_t (&r)[4], const char* row) {
  matrices(kTransposed, r, row, [](int l, int h) { return std::pair(l % 4 * 2 + h, l / 4); });
}

template <float (*WIDEN)(uint16_t)>
void product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  host::Fragment mine = {d, a, {b0, b1}};
  host::running().meet_warp(kProduct, &mine,
                            [](void** all) { host::multiply<WIDEN>(reinterpret_cast<host::Fragment* const*>(all)); });
}

struct Bf16 {
  static uint32_t pack(float low, float high) { return host::round_bf16(low) | uint32_t{host::round_bf16(high)} << 16; }
  static float widen(uint16_t x) { return host::widen_bf16(x); }
  static void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    product<host::widen_bf16>(d, a, b0, b1);
  }
};
struct Fp16 {
  static uint32_t pack(float low, float high) { return host::round_fp16(low) | uint32_t{host::round_fp16(high)} << 16; }
  static float widen(uint16_t x) { return host::widen_fp16(x); }
  static void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    product<host::widen_fp16>(d, a, b0, b1);
  }
};

inline void copy_async(char* to, const char* from) { host::running().copy_async({to, from, 16}); }
inline void close_group() { host::running().close_group(); }
template <int PENDING>
void wait_groups() {
  host::running().wait_groups(PENDING);
}

inline void barrier_init(uint64_t* barrier, int arrivals) { host::running().barrier_init(barrier, arrivals); }
inline void barrier_arrive(uint64_t* barrier, int bytes) { host::running().barrier_arrive(barrier, bytes); }
inline void barrier_wait(uint64_t* barrier, int parity) { host::running().barrier_wait(barrier, parity); }
inline void copy_bulk(char* to, const char* from, int bytes, uint64_t* barrier) {
  host::running().copy_bulk({to, from, bytes}, barrier);
}

// Orders between threads and copies: memory here has one order, so these prove nothing and do nothing.
inline void fence_bulk() {}
inline void allow_next_kernel() {}
inline void wait_for_previous_kernel() {}

}  // namespace fastprompt::cuda
