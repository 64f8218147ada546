// What kernels ask of a device beyond C++: launches, asynchronous copies and tensor cores.
//
// A quad is four lanes: lane 4g + q is thread q of quad g. Of a 16 x 16 left operand, thread (g, q)
// has rows g and g + 8 of columns 2q, 2q + 1, 2q + 8, 2q + 9; of a 16 x 8 right operand, column g
// of these as rows; of their 16 x 8 product, rows g and g + 8 of columns 2q and 2q + 1.
#pragma once

#if defined(FASTLORA_EMULATED)
#include "emulation.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace fastlora::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
  if (!grid.x || !grid.y || !grid.z) return cudaSuccess;
  // more than this has to be asked for
  if (shared_bytes > 48 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

template <class T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) char fastlora_shared[];
  return reinterpret_cast<T*>(fastlora_shared);
}

// Of two roundings, which the compiler would make one.
__device__ inline double multiply_rounded(double a, double b) { return __dmul_rn(a, b); }
__device__ inline double add_rounded(double a, double b) { return __dadd_rn(a, b); }

__device__ inline uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// 16 bytes to shared memory, or, if not `exists`, zeros.
__device__ inline void copy_async(void* shared, const void* global, bool exists) {
  asm volatile(
      "{ .reg .pred p; setp.eq.s32 p, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, p; }" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(int(exists))
      : "memory");
}

// The copies since the last call are a group.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most the last `Left` groups are under way.
template <int Left>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane 8i + j names row j of matrix i. Thread (g, q) gets
// of each elements 2q and 2q + 1 of row g, or, transposed, of column g.
template <bool Transposed>
__device__ void load_matrices(uint32_t (&out)[4], const void* row) {
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// sum += left right, by a warp.
template <class T>
__device__ void multiply(float (&sum)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

}  // namespace fastlora::cuda
#endif
