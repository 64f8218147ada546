// What the four threads of a quad give each other.
#pragma once

#include "device.cuh"

namespace fastlora::cuda {

// Of a 4 x 4 matrix that has a row in each thread, gives thread q column q.
__device__ inline void transpose_in_quad(uint32_t (&words)[4]) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      uint32_t &first = words[i], &second = words[i + bit];
      const bool gives_first = q & bit;
      const uint32_t got = __shfl_xor_sync(~0u, gives_first ? first : second, bit);
      first = gives_first ? got : first;
      second = gives_first ? second : got;
    }
}

}  // namespace fastlora::cuda
