// The mask of fastlora/dropout.py, bit for bit: drawing it, and applying it to vectors.
#pragma once

#include "simd.h"

namespace fastlora::cpu::FASTLORA_ISA {

constexpr uint32_t kLaneRange = 1 << 16;
constexpr int kRounds = 7;

// Philox4x32: one call a 64-bit lane, each 32-bit word in the low half of its lane. What the high
// halves hold is never looked at: it is cheaper to carry than to clear.
template <class V>
struct Philox {
  V c0, c1, c2, c3;

  Philox(V index, uint64_t seed) : c0(index), c1(index >> 32), c2(V{}), c3(V{}) {
    const V m0 = broadcast<V>(uint64_t(0xD2511F53)), m1 = broadcast<V>(uint64_t(0xCD9E8D57));
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 7
    for (int round = 0; round < kRounds; ++round) {
      const V p0 = multiply_low_halves(c0, m0), p1 = multiply_low_halves(c2, m1);
      c0 = (p1 >> 32) ^ c1 ^ uint64_t(k0);
      c1 = p1;
      c2 = (p0 >> 32) ^ c3 ^ uint64_t(k1);
      c3 = p0;
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
  }

  // of each call, the byte whose bit b says whether the b-th 16-bit lane is at least t
  V bytes(uint16_t t) const {
    constexpr int n = 4 * sizeof(V) / sizeof(uint64_t);
    using Lanes = Vector<uint16_t, n>;
    constexpr uint64_t low = 0xFFFFFFFF, weights = 0x0008000400020001;
    const Lanes first = Lanes((c0 & low) | (c1 << 32)), second = Lanes((c2 & low) | (c3 << 32));
    V kept = (V(first >= t) & weights) | (V(second >= t) & (weights << 4));
    kept |= kept >> 32;
    return kept | kept >> 16;
  }
};

// Bytes [begin, begin + count) of a row of K elements whose first byte is byte `start` of the mask;
// `begin` is a multiple of 8, where out is written; count is too, or ends with the row.
inline void draw(uint64_t seed, uint32_t t, int64_t start, int64_t begin, int64_t count, int64_t K,
                 uint8_t* out) {
  constexpr int n = lanes<uint64_t>;
  using V = Vector<uint64_t, n>;
  V step;
  for (int i = 0; i < n; ++i) step[i] = i;
  for (int64_t j = 0; j < count; j += n) {
    const Philox<V> calls(step + uint64_t(start + begin + j), seed);
    const auto bytes = __builtin_convertvector(calls.bytes(uint16_t(t)), Vector<uint8_t, n>);
    if (j + n <= count)
      store(out + j, bytes);
    else
      __builtin_memcpy(out + j, &bytes, count - j);
  }
  // bits past K are zero, and so is everything where p = 1, which no 16-bit t can say
  const int64_t kept = t >= kLaneRange ? 0 : K - 8 * begin;
  for (int64_t j = kept < 0 ? 0 : kept / 8; j < count; ++j)
    out[j] &= 8 * j >= kept ? 0 : (1 << (kept - 8 * j)) - 1;
}

// x where the bits of the mask from element k on are set, else 0; k is a multiple of the lanes
template <class V>
inline V keep(V x, const uint8_t* mask, int64_t k) {
  constexpr int n = sizeof(V) / sizeof(x[0]);
  using Bits = std::conditional_t<sizeof(x[0]) == 8, Vector<int64_t, n>, Vector<int32_t, n>>;
  Bits lane;
  for (int i = 0; i < n; ++i) lane[i] = 1 << i;
  int bits = mask[k / 8];
  if constexpr (n > 8) bits |= mask[k / 8 + 1] << 8;
  if constexpr (n < 8) bits >>= k % 8;
  return V(Bits(x) & ((lane & bits) != 0));
}

}  // namespace fastlora::cpu::FASTLORA_ISA
