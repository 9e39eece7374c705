// The machine's operations on a GPU: thin names for single instructions.
#pragma once

#include <math.h>
#include <stdint.h>

#define FP_DEVICE __device__ __forceinline__

namespace fastprompt::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasBulk = true;
#else
constexpr bool kHasBulk = false;
#endif

FP_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
FP_DEVICE int block() { return static_cast<int>(blockIdx.x); }
FP_DEVICE int blocks() { return static_cast<int>(gridDim.x); }

FP_DEVICE void block_sync() { __syncthreads(); }
FP_DEVICE void warp_sync() { __syncwarp(); }
template <class T>
FP_DEVICE T shfl(T x, int from) {
  return __shfl_sync(0xffffffffu, x, from);
}
template <class T>
FP_DEVICE T shfl_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
FP_DEVICE uint32_t ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
FP_DEVICE int count_bits(uint32_t x) { return __popc(x); }

FP_DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FP_DEVICE float log2_of(float x) { return __log2f(x); }

FP_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Four 8x8 matrices of 16-bit numbers; lane 8j + r names row r of matrix j, 16 bytes in shared memory.
FP_DEVICE void load_matrices(uint32_t (&r)[4], const char* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
FP_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const char* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d [16, 8] += a [16, 16] . b [16, 8] on tensor cores, summed in float32.
#define FP_MMA(TYPE)                                                         \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// Number formats of 16 bits: two rounded into one register, one widened.
struct Bf16 {
  static FP_DEVICE uint32_t pack(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  static FP_DEVICE float widen(uint16_t x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }
  static FP_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { FP_MMA("bf16"); }
};
struct Fp16 {
  static FP_DEVICE uint32_t pack(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  static FP_DEVICE float widen(uint16_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
  }
  static FP_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { FP_MMA("f16"); }
};
#undef FP_MMA

// Copies of 16 bytes to shared memory that the lane waits for in groups, past the first cache.
FP_DEVICE void copy_async(char* to, const char* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
FP_DEVICE void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
FP_DEVICE void wait_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Barriers in shared memory that count arrivals and bytes, and bulk copies that report to them.
FP_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
FP_DEVICE void barrier_arrive(uint64_t* barrier, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}
FP_DEVICE void barrier_wait(uint64_t* barrier, int parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  while (!done) {
    asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  }
#endif
}
FP_DEVICE void copy_bulk(char* to, const char* from, int bytes, uint64_t* barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}
// Orders what threads wrote to and read from shared memory, new barriers too, before later bulk copies.
FP_DEVICE void fence_bulk() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Programmatic dependent launch: the next kernel may start, and waits here for the results of the one before.
FP_DEVICE void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
FP_DEVICE void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace fastprompt::cuda
