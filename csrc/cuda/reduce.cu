// Sums of parts, in their order.
#include <algorithm>

#include "fastlora/numbers.cuh"
#include "fastlora/reduce.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void sum_parts_kernel(const float* parts, int count, int64_t distance, int stacked,
                                 Factor c, Matrix out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= out.rows * out.cols) return;
  const int64_t row = i / out.cols, col = i % out.cols;
  float sum = 0;
  // the last are the smallest
  for (int side = stacked - 1; side >= 0; --side) {
    const float* first = parts + (row * stacked + side) * out.cols + col;
#pragma unroll 8
    for (int part = 0; part < count; ++part) sum += first[part * distance];
  }
  const int64_t place = row * out.row_stride + col * out.col_stride;
  store(out.data, out.dtype, place, value(c) * sum);
}

}  // namespace

Chunks::Chunks(int64_t M, int step, int64_t others, int programs) {
  const int64_t wanted = std::max<int64_t>(1, programs / std::max<int64_t>(1, others));
  rows = step * std::max<int64_t>(1, blocks_of(blocks_of(M, step), wanted));
  count = int(blocks_of(M, rows));
}

cudaError_t sum_parts(const float* parts, int count, int64_t distance, Factor c, const Matrix& out,
                      cudaStream_t stream, int stacked) {
  const dim3 grid(unsigned(blocks_of(out.rows * out.cols, kThreads)));
  return launch(sum_parts_kernel, grid, kThreads, 0, stream, parts, count, distance, stacked, c,
                out);
}

}  // namespace fastlora::cuda
