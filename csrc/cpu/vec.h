// Vectors of float32 in the width of the instruction set this file is compiled for, and what kernels do with them.
//
// Everything is written with the compiler's own vector types; intrinsics stand only where those say it worse.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastprompt::FASTPROMPT_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

#define FP_INLINE inline __attribute__((always_inline))

using vf = float __attribute__((vector_size(kWidth * 4)));
using vi = int32_t __attribute__((vector_size(kWidth * 4)));
using vu = uint32_t __attribute__((vector_size(kWidth * 4)));
using vh = uint16_t __attribute__((vector_size(kWidth * 2)));

// Storage of the two half formats; numbers in them are only ever loaded to and stored from float32.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

constexpr float kInf = __builtin_inff();
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.693147180559945309417f;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
template <class T>
constexpr T least(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T most(T a, T b) {
  return a < b ? b : a;
}

FP_INLINE vf splat(float x) { return x - vf{}; }
FP_INLINE vi splat(int32_t x) { return x - vi{}; }

template <class V>
FP_INLINE V load_as(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
FP_INLINE vf load(const float* p) { return load_as<vf>(p); }
FP_INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

// The greater of two numbers; b where one is NaN.
FP_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

FP_INLINE float sum_of(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float s = 0;
  for (int i = 0; i < kWidth; ++i) s += v[i];
  return s;
#endif
}

FP_INLINE float max_of(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float m = v[0];
  for (int i = 1; i < kWidth; ++i) m = most(m, v[i]);
  return m;
#endif
}

// The numbers 0, 1, 2, ... one a lane.
FP_INLINE vi lanes() {
  vi v;
  for (int i = 0; i < kWidth; ++i) v[i] = i;
  return v;
}

// ---- storage formats

FP_INLINE vf load(const Bf16* p) { return (vf)(__builtin_convertvector(load_as<vh>(p), vu) << 16); }

FP_INLINE void store(Bf16* p, vf v) {
  const vu bits = (vu)v;
  const vu even = bits + 0x7fff + ((bits >> 16) & 1);
  const vu kept = v == v ? even : (bits | 0x400000);  // a NaN stays one
  const vh half = __builtin_convertvector(kept >> 16, vh);
  memcpy(p, &half, sizeof half);
}

#if defined(__AVX512F__)
FP_INLINE vf load(const F16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
FP_INLINE void store(F16* p, vf v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
FP_INLINE vf load(const F16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
FP_INLINE void store(F16* p, vf v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
FP_INLINE vf load(const F16* p) {
  vf v;
  for (int i = 0; i < kWidth; ++i) v[i] = static_cast<float>(load_as<__fp16>(p + i));
  return v;
}
FP_INLINE void store(F16* p, vf v) {
  for (int i = 0; i < kWidth; ++i) {
    const __fp16 half = static_cast<__fp16>(v[i]);
    memcpy(p + i, &half, sizeof half);
  }
}
#else
// IEEE 754 binary16 with integer arithmetic: the exponent is moved by a multiplication, which also takes subnormals.
FP_INLINE vf load(const F16* p) {
  const vu bits = __builtin_convertvector(load_as<vh>(p), vu);
  const vu sign = (bits & 0x8000) << 16, rest = (bits & 0x7fff) << 13;
  const vf scaled = (vf)rest * 0x1p112f;
  const vu wide = rest >= 0x0f800000u ? (rest | 0x7f800000u) : (vu)scaled;
  return (vf)(wide | sign);
}
FP_INLINE void store(F16* p, vf v) {
  const vu sign = (vu)v & 0x80000000u;
  const vf size = (vf)((vu)v ^ sign);
  const vf near_zero = size + 0.5f;  // below 2^-14 the sum's last bits are the subnormal half, rounded
  const vu bits = (vu)size;
  const vu normal = (bits + 0xfff + ((bits >> 13) & 1) - 0x38000000u) >> 13;
  const vu finite = size < 0x1p-14f ? (vu)near_zero - 0x3f000000u : normal;
  const vu large = size == size ? (vu{} + 0x7c00u) : (vu{} + 0x7e00u);
  const vu half = (size < 65520.0f ? finite : large) | (sign >> 16);
  const vh out = __builtin_convertvector(half, vh);
  memcpy(p, &out, sizeof out);
}
#endif

// The first n < kWidth numbers at p, zeros behind them; nothing past them is read.
template <class T>
FP_INLINE vf load_first(const T* p, int n) {
  T kept[kWidth] = {};
  memcpy(kept, p, n * sizeof(T));
  return load(kept);
}
template <class T>
FP_INLINE void store_first(T* p, vf v, int n) {
  T all[kWidth];
  store(all, v);
  memcpy(p, all, n * sizeof(T));
}

// ---- exponentials

// 2^x for x <= 0 or moderately above; below 2^-126 the result is that or 0. The polynomial is the minimax one in
// relative error on [-1/2, 1/2]: 1.9e-9 in degree 6, 2.6e-6 in degree 4.
template <int kDegree>
FP_INLINE vf exp2(vf x) {
#if defined(__AVX512F__)
  const vf n = _mm512_roundscale_ps(vmax(splat(-200.0f), x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  const vf n = _mm256_round_ps(vmax(splat(-126.0f), x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf n = (vmax(splat(-126.0f), x) + 0x1.8p23f) - 0x1.8p23f;
#endif
  const vf f = vmax(splat(-200.0f), x) - n;
  vf p;
  if constexpr (kDegree == 6) {
    p = splat(0.000153458124f);
    p = p * f + 0.00133999309f;
    p = p * f + 0.00961848907f;
    p = p * f + 0.0555032864f;
    p = p * f + 0.240226462f;
    p = p * f + 0.693147182f;
    p = p * f + 1.0f;
  } else {
    p = splat(0.00957010221f);
    p = p * f + 0.0559178591f;
    p = p * f + 0.240247443f;
    p = p * f + 0.693121791f;
    p = p * f + 0.999999285f;
  }
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  const vf scaled = (vf)((vi)p + (__builtin_convertvector(n, vi) << 23));
  return x < -125.0f ? vf{} : scaled;
#endif
}

// ---- 32-bit transposition

#if defined(__AVX512F__)
// Rows r[0..15] become columns.
FP_INLINE void transpose(vf (&r)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  __m512 u[16];
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + 2 + j]);
      u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  for (int i = 0; i < 4; ++i) {  // u[4 g + i] holds columns i, i + 4, i + 8, i + 12 of rows 4 g .. 4 g + 3
    const __m512 even_lo = _mm512_shuffle_f32x4(u[i], u[4 + i], 0x88),
                 odd_lo = _mm512_shuffle_f32x4(u[i], u[4 + i], 0xdd);
    const __m512 even_hi = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0x88),
                 odd_hi = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0xdd);
    r[i] = _mm512_shuffle_f32x4(even_lo, even_hi, 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(even_lo, even_hi, 0xdd);
    r[4 + i] = _mm512_shuffle_f32x4(odd_lo, odd_hi, 0x88);
    r[12 + i] = _mm512_shuffle_f32x4(odd_lo, odd_hi, 0xdd);
  }
}
#endif

// Sums of kWidth vectors, one a lane.
FP_INLINE vf sums_of(const vf (&a)[kWidth]) {
#if defined(__AVX512F__)
  __m512 t[8], w[4];
  for (int i = 0; i < 8; ++i)
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(t[2 * i]), y = _mm512_castps_pd(t[2 * i + 1]);
    w[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  const __m512 lo = _mm512_add_ps(_mm512_shuffle_f32x4(w[0], w[1], 0x88), _mm512_shuffle_f32x4(w[0], w[1], 0xdd));
  const __m512 hi = _mm512_add_ps(_mm512_shuffle_f32x4(w[2], w[3], 0x88), _mm512_shuffle_f32x4(w[2], w[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(lo, hi, 0x88), _mm512_shuffle_f32x4(lo, hi, 0xdd));
#elif defined(__AVX2__)
  const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  const __m256 y = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
#else
  vf s;
  for (int i = 0; i < kWidth; ++i) s[i] = sum_of(a[i]);
  return s;
#endif
}

// ---- what a matrix product is made of

// Float32 numbers: one number a step of the inner dimension.
struct Singles {
  using Storage = float;
  static constexpr int kPack = 1;
  static constexpr int kExpDegree = 6;
  static FP_INLINE vf mul_add(vf a, vf b, vf c) { return a * b + c; }
};

#if defined(__AVX512BF16__)
// Bfloat16 numbers in pairs: two numbers a step of the inner dimension, side by side in 32 bits.
struct Pairs {
  using Storage = Bf16;
  static constexpr int kPack = 2;
  static constexpr int kExpDegree = 4;
  static FP_INLINE vf mul_add(vf a, vf b, vf c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
  // Two vectors rounded to bfloat16, lane i of the result holding the pair (a[i], b[i]).
  static FP_INLINE vf join(vf a, vf b) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (vf)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
  // The same with all of `a` before all of `b`.
  static FP_INLINE vf in_order(vf a, vf b) { return (vf)_mm512_cvtne2ps_pbh(b, a); }
  // 32 numbers of two rows as 32 pairs: `lo` the first 16 columns, `hi` the others.
  static FP_INLINE void interleave(const void* a, const void* b, vf& lo, vf& hi) {
    interleave(_mm512_loadu_si512(a), _mm512_loadu_si512(b), lo, hi);
  }
  static FP_INLINE void interleave_zero(const void* a, vf& lo, vf& hi) {
    interleave(_mm512_loadu_si512(a), _mm512_setzero_si512(), lo, hi);
  }

 private:
  static FP_INLINE void interleave(__m512i x, __m512i y, vf& lo, vf& hi) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    lo = (vf)_mm512_permutex2var_epi16(x, first, y);
    hi = (vf)_mm512_permutex2var_epi16(x, second, y);
  }
};
#endif

}  // namespace fastprompt::FASTPROMPT_ISA
