// Sums of parts, in their order.
#include <algorithm>

#include "fastlora/numbers.cuh"
#include "fastlora/reduce.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void sum_parts_kernel(const float* parts, int64_t distance, int64_t part_stride,
                                 Parts counts, Factor c, Matrix out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= out.rows * out.cols) return;
  const int64_t row = i / out.cols, col = i % out.cols;
  int count = 0;
#pragma unroll
  for (int group = 0; group < Parts::kGroups; ++group)
    if (col / counts.group_width == group) count = counts.of_group[group];
  parts += row * part_stride + col;
  float sum = 0;
#pragma unroll 8
  for (int part = 0; part < count; ++part) sum += parts[part * distance];
  store(out.data, out.dtype, row * out.row_stride + col * out.col_stride, value(c) * sum);
}

}  // namespace

Chunks::Chunks(int64_t M, int step, int64_t others, int programs) {
  const int64_t wanted = std::max<int64_t>(1, programs / std::max<int64_t>(1, others));
  rows = step * std::max<int64_t>(1, blocks_of(blocks_of(M, step), wanted));
  count = int(blocks_of(M, rows));
}

cudaError_t sum_parts(const float* parts, int64_t distance, int64_t part_stride, Parts counts,
                      Factor c, const Matrix& out, cudaStream_t stream) {
  return launch(sum_parts_kernel, dim3(blocks_of(out.rows * out.cols, kThreads)), kThreads, 0,
                stream, parts, distance, part_stride, counts, c, out);
}

}  // namespace fastlora::cuda
