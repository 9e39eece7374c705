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

// ---- exponentials and logarithms

// 2^x for x <= 0 or moderately above; below 2^-126 the result is that or 0. On [-1/2, 1/2] the polynomial is off by
// at most 1.6e-8 of its value in degree 6 and by 2.7e-6 in degree 4, rounding apart.
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

// The natural logarithm of 1 + x for 0 <= x <= 1, as 2 artanh(x / (2 + x)): off by at most 8e-9 of its value, rounding
// apart.
FP_INLINE vf log1p(vf x) {
  const vf s = x / (x + 2.0f), z = s * s;
  vf p = splat(0.281783342f);
  p = p * z + 0.279606014f;
  p = p * z + 0.400249094f;
  p = p * z + 0.66666317f;
  p = p * z + 2.0f;
  return s * p;
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

}  // namespace fastprompt::FASTPROMPT_ISA
