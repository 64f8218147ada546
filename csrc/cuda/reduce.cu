// Sums of parts, in their order.
#include <algorithm>

#include "fastlora/numbers.cuh"
#include "fastlora/reduce.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256;
// that are under way together
constexpr int kLoads = 8;

struct Sums {
  Sum of[kMostSums];
};

__global__ void sum_parts_kernel(Sums sums) {
  const Sum& of = sums.of[blockIdx.z];
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, cols = of.out.cols;
  if (i >= of.out.rows * cols) return;
  // where both have 32 bits, so has the division
  const int64_t row = i / cols, col = i % cols;
  float sum = 0;
  // the last are the smallest
  for (int side = of.stacked - 1; side >= 0; --side) {
    const float* next = of.parts + (row * of.stacked + side) * cols + col;
    for (int part = 0; part < of.count; part += kLoads) {
      float loaded[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j, next += of.distance)
        loaded[j] = part + j < of.count ? *next : 0;
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
        if (part + j < of.count) sum += loaded[j];
    }
  }
  const int64_t place = row * of.out.row_stride + col * of.out.col_stride;
  store(of.out.data, of.out.dtype, place, value(of.c) * sum);
}

}  // namespace

Chunks::Chunks(int64_t M, int step, int64_t others, int programs, int least) {
  const int64_t wanted = std::max<int64_t>(1, programs / std::max<int64_t>(1, others));
  rows = step * std::max(blocks_of(least, step), blocks_of(blocks_of(M, step), wanted));
  count = int(blocks_of(M, rows));
}

cudaError_t sum_parts(const Sum* sums, int count, cudaStream_t stream) {
  Sums all{};
  dim3 grid(0, 1, count);
  for (int i = 0; i < count; ++i) {
    all.of[i] = sums[i];
    grid.x = std::max(grid.x, unsigned(blocks_of(sums[i].out.rows * sums[i].out.cols, kThreads)));
  }
  return launch(sum_parts_kernel, grid, kThreads, 0, stream, all);
}

}  // namespace fastlora::cuda
