// e4m3 numbers widened to the 16 bits that tensor cores take.
#pragma once

#include "cuda/machine.cuh"

namespace fastprompt::cuda {

// Two e4m3 in the high bytes of two halves, as float16 of the same sign, exponent and digits: 2^-8 times their value.
FP_DEVICE uint32_t as_halves(uint32_t x) { return (x & 0x80008000u) | (x & 0x7f007f00u) >> 1; }

// 16 numbers times `scale`, each rounded once (not at all for scale 1), to 32 bytes. e4m3's NaN is taken for 480.
template <class F>
FP_DEVICE void widen_e4m3(const Bytes16& raw, float scale, char* to) {
  const float factor = 256.0f * scale;
  Bytes16 wide[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t w = raw.words[i];
    const uint32_t low = as_halves((w & 0xffu) << 8 | (w & 0xff00u) << 16);
    const uint32_t high = as_halves((w >> 8 & 0xff00u) | (w & 0xff000000u));
    wide[i / 2].words[i % 2 * 2] = F::pack(Fp16::widen(low & 0xffffu) * factor, Fp16::widen(low >> 16) * factor);
    wide[i / 2].words[i % 2 * 2 + 1] = F::pack(Fp16::widen(high & 0xffffu) * factor, Fp16::widen(high >> 16) * factor);
  }
  reinterpret_cast<Bytes16*>(to)[0] = wide[0];
  reinterpret_cast<Bytes16*>(to)[1] = wide[1];
}

}  // namespace fastprompt::cuda
