// F = F_1 + F_2 + F_3, each the rest that the ones before leave, rounded to bfloat16.
#include "fastlora/split.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256;

template <int Parts>
__global__ void split_kernel(Matrix factor, Stack stack, __nv_bfloat16* out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t rows = factor.rows, cols = factor.cols;
  if (i >= rows * cols) return;
  const int64_t row = i / cols, col = i % cols;
  const float* data = static_cast<const float*>(factor.data);
  const Split<__nv_bfloat16, Parts> split(data[row * factor.row_stride + col * factor.col_stride]);
#pragma unroll
  for (int part = 0; part < Parts; ++part)
    out[stack == Stack::rows ? part * rows * cols + i : (row * Parts + part) * cols + col] =
        split.parts[part];
}

}  // namespace

size_t split_workspace(const Matrix& factor, int parts) {
  return round_up(parts * factor.rows * factor.cols * sizeof(__nv_bfloat16), 256);
}

cudaError_t split(const Matrix& factor, int parts, Stack stack, void* workspace, Matrix* out,
                  cudaStream_t stream) {
  const int64_t rows = factor.rows * (stack == Stack::rows ? parts : 1);
  const int64_t cols = factor.cols * (stack == Stack::columns ? parts : 1);
  *out = {workspace, Dtype::bf16, rows, cols, cols, 1};
  const dim3 grid(unsigned(blocks_of(factor.rows * factor.cols, kThreads)));
  return launch(parts == kExactParts ? split_kernel<kExactParts> : split_kernel<kRoundedParts>,
                grid, kThreads, 0, stream, factor, stack, static_cast<__nv_bfloat16*>(workspace));
}

}  // namespace fastlora::cuda
