// bfloat16, float16 and products of their matrices, as tensor cores define them but for the order of sums.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace fastprompt::cuda::host {

inline uint32_t bits(float x) {
  uint32_t r;
  memcpy(&r, &x, 4);
  return r;
}
inline float from_bits(uint32_t x) {
  float r;
  memcpy(&r, &x, 4);
  return r;
}

inline float widen_bf16(uint16_t x) { return from_bits(uint32_t{x} << 16); }
inline uint16_t round_bf16(float x) {
  if (isnan(x)) return 0x7fff;
  const uint32_t b = bits(x);
  return static_cast<uint16_t>((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

inline float widen_fp16(uint16_t x) {
  const int exponent = x >> 10 & 31, digits = x & 1023;
  const float size = exponent == 31 ? (digits ? NAN : INFINITY)
                     : exponent     ? ldexpf(static_cast<float>(1024 + digits), exponent - 25)
                                    : ldexpf(static_cast<float>(digits), -24);
  return x >> 15 ? -size : size;
}
// Rounds to even by adding a number whose last digit is the last that float16 keeps.
inline uint16_t round_fp16(float x) {
  const uint16_t sign = bits(x) >> 16 & 0x8000;
  const float size = fabsf(x);
  if (isnan(x)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 6.103515625e-05f) return sign | static_cast<uint16_t>(bits(size + 0.5f) - bits(0.5f));
  const uint32_t b = bits(size);
  return sign | static_cast<uint16_t>((b + 0xfff + (b >> 13 & 1) - (112u << 23)) >> 13);
}

// One lane's part of d [16, 8] += a [16, 16] . b [16, 8].
struct Fragment {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <float (*WIDEN)(uint16_t)>
void multiply(Fragment* const* lanes) {
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < 8; ++i) {
      const uint32_t word = lanes[l]->a[i / 2];
      a[l / 4 + i / 2 % 2 * 8][l % 4 * 2 + i % 2 + i / 4 * 8] = WIDEN(static_cast<uint16_t>(word >> 16 * (i % 2)));
    }
    for (int i = 0; i < 4; ++i)
      b[l % 4 * 2 + i % 2 + i / 2 * 8][l / 4] = WIDEN(static_cast<uint16_t>(lanes[l]->b[i / 2] >> 16 * (i % 2)));
  }
  float d[16][8] = {};
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) lanes[l]->d[i] += d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}

}  // namespace fastprompt::cuda::host
