// The mask of fastlora/dropout.py, bit for bit: drawing a byte of it, and applying it to the eight
// 16-bit elements it decides.
#pragma once

#include "device.cuh"

namespace fastlora::cuda {

constexpr uint32_t kLaneRange = 1 << 16;
constexpr int kRounds = 7;

// Bytes in one row of the packed mask.
__host__ __device__ constexpr int64_t mask_bytes(int64_t K) { return (K + 31) / 32 * 4; }

__host__ __device__ inline uint2 halves(uint64_t x) { return {uint32_t(x), uint32_t(x >> 32)}; }

__host__ __device__ inline uint2 multiply_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  // of a product of 64-bit integers, the compiler adds zero to the upper half
  uint2 out;
  asm("{ .reg .b64 p; mul.wide.u32 p, %2, %3; mov.b64 {%0, %1}, p; }"
      : "=r"(out.x), "=r"(out.y)
      : "r"(a), "r"(b));
  return out;
#else
  return halves(uint64_t(a) * b);
#endif
}

// The compiler would shift, mask and add, which units with more to do are for.
__host__ __device__ inline uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
#else
  return a * b + c;
#endif
}

// Philox4x32
__host__ __device__ inline uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const uint2 p0 = multiply_wide(counter.x, 0xD2511F53);
    const uint2 p1 = multiply_wide(counter.z, 0xCD9E8D57);
    counter = {p1.y ^ counter.y ^ key.x, p1.x, p0.y ^ counter.w ^ key.y, p0.x};
    key.x += 0x9E3779B9;
    key.y += 0xBB67AE85;
  }
  return counter;
}

// Four bytes, each one of those of `low` (0 to 3) and `high` (4 to 7) or, with 8 added, its sign
// eight times. From the last of the selector's hexadecimal digits on.
__host__ __device__ inline uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(selector));
  return out;
#else
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t from = selector >> 4 * i & 15;
    uint32_t byte = ((uint64_t(high) << 32 | low) >> 8 * (from & 7)) & 0xFF;
    if (from & 8) byte = byte & 0x80 ? 0xFF : 0;
    out |= byte << 8 * i;
  }
  return out;
#endif
}

// Of eight elements, the ones dropped: words of pairs, the first in the low half, with all of a
// dropped element's bits set.
struct Dropped {
  uint32_t pairs[4];

  __host__ __device__ uint4 keep(uint4 x) const {
    return {x.x & ~pairs[0], x.y & ~pairs[1], x.z & ~pairs[2], x.w & ~pairs[3]};
  }
};

// What draw takes of the threshold t: a lane in the 16 bits under the sign is negative with this
// added, if it is less than t; which holds for t = 65536, too.
__host__ __device__ inline uint32_t limit_of(uint32_t t) { return 0 - (t << 15); }

// Those whose byte of the mask has this index.
__host__ __device__ inline Dropped draw(uint64_t index, uint2 key, uint32_t limit) {
  const uint2 counter = halves(index);
  const uint4 drawn = philox({counter.x, counter.y, 0, 0}, key);
  const uint32_t words[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
  Dropped dropped;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = multiply_add(words[i] & 0xFFFF, 1 << 15, limit);
    const uint32_t high = (words[i] >> 1) + limit;
    dropped.pairs[i] = permute(low, high, 0xFFBB);
  }
  return dropped;
}

// c and the products of the bytes of a and b
__host__ __device__ inline uint32_t multiply_add_bytes(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  return __dp4a(a, b, c);
#else
  for (int i = 0; i < 32; i += 8) c += (a >> i & 0xFF) * (b >> i & 0xFF);
  return c;
#endif
}

// The byte of the mask, under bits of no meaning: modulo 256, what is dropped counts -1 times the
// weight of its bit, and all is kept at first.
__host__ __device__ inline uint32_t byte_of(const Dropped& dropped) {
  uint32_t byte = 0xFF;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    byte = multiply_add_bytes(dropped.pairs[i], 0x00020001 << 2 * i, byte);
  return byte;
}

// And back.
__host__ __device__ inline Dropped dropped_by(uint32_t byte) {
  // bit i of each half of the byte becomes the sign of byte i of a word
  const uint32_t low = (~byte & 0xF) * 0x10204080, high = (~byte >> 4 & 0xF) * 0x10204080;
  return {{permute(low, 0, 0x9988), permute(low, 0, 0xBBAA), permute(high, 0, 0x9988),
           permute(high, 0, 0xBBAA)}};
}

}  // namespace fastlora::cuda
