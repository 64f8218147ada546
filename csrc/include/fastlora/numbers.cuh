// Numbers of 16 and 32 bits, one at a time and in pairs.
#pragma once

#include <cstring>
#include <type_traits>

#include "device.cuh"
#include "stages.h"

namespace fastlora::cuda {

// Calls `f` with a value of the 16-bit type.
template <class F>
cudaError_t with_type(Dtype dtype, const F& f) {
  return dtype == Dtype::bf16 ? f(__nv_bfloat16{}) : f(__half{});
}

__device__ inline float load(const void* data, Dtype dtype, int64_t i) {
  if (dtype == Dtype::f32) return static_cast<const float*>(data)[i];
  if (dtype == Dtype::bf16) return static_cast<const __nv_bfloat16*>(data)[i];
  return static_cast<const __half*>(data)[i];
}

__device__ inline void store(void* data, Dtype dtype, int64_t i, float x) {
  if (dtype == Dtype::f32)
    static_cast<float*>(data)[i] = x;
  else if (dtype == Dtype::bf16)
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(x);
  else
    static_cast<__half*>(data)[i] = __float2half_rn(x);
}

// The first in the low half.
template <class T>
__device__ uint32_t pack(float first, float second) {
  uint32_t word;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    memcpy(&word, &pair, sizeof word);
  } else {
    const __half2 pair = __floats2half2_rn(first, second);
    memcpy(&word, &pair, sizeof word);
  }
  return word;
}

template <class T>
__device__ uint32_t pack(T first, T second) {
  uint16_t low, high;
  memcpy(&low, &first, sizeof low);
  memcpy(&high, &second, sizeof high);
  return low | uint32_t(high) << 16;
}

// With these added to a pair.
template <class T>
__device__ uint32_t pack_sum(uint32_t pair, float first, float second) {
  using Bits = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat16_raw, __half_raw>;
  const T low(Bits{uint16_t(pair)}), high(Bits{uint16_t(pair >> 16)});
  return pack<T>(float(low) + first, float(high) + second);
}

// x as the sum of numbers of 16 bits, so that tensor cores multiply it with more bits of mantissa.
template <class T, int Parts>
struct Split {
  T parts[Parts];

  __device__ explicit Split(float x) {
#pragma unroll
    for (int i = 0; i < Parts; ++i) {
      parts[i] = T(x);
      const float rest = x - float(parts[i]);
      // Inf - Inf: what is not finite is all in the first
      x = fabsf(rest) <= fabsf(x) ? rest : 0.f;
    }
  }
};

__device__ inline float value(Factor factor) {
  return factor.scale ? factor.c * *factor.scale : factor.c;
}

__host__ __device__ constexpr int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}
__host__ __device__ constexpr int64_t blocks_of(int64_t n, int64_t block) {
  return (n + block - 1) / block;
}

// Whether its rows are vectors of 16 bytes.
inline bool is_vectors(const Matrix& X) {
  return X.dtype != Dtype::f32 && X.col_stride == 1 && X.row_stride % 8 == 0 && X.cols % 8 == 0 &&
         reinterpret_cast<uintptr_t>(X.data) % 16 == 0;
}

}  // namespace fastlora::cuda
