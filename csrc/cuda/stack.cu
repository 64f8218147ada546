// S Fᵀ + bias = [S_1, S_2, 1] [F, F, bias]ᵀ, or [S_1, S_2, S_1, 1] [F_1, F_1, F_2, bias]ᵀ for F of
// more than 16 bits; S_2 and F_2 are what rounding S and F leaves.
#include "fastlora/split.cuh"
#include "fastlora/stack.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256, kVector = 8;

struct Columns {
  int r, parts, ranks, padded;

  Columns(const Matrix& X, const Matrix& factor, const Matrix& bias)
      : r(int(factor.cols)),
        parts(is_split(X, factor) ? 3 : 2),
        ranks(parts * r + (bias.data ? 1 : 0)),
        padded(int(round_up(ranks, kVector))) {}
};

template <class T>
__device__ T left_of(const float* S, const Columns& columns, int64_t m, int j) {
  if (j >= columns.parts * columns.r) return T(j < columns.ranks ? 1.f : 0.f);
  const Split<T, kRoundedParts> split(S[m * columns.r + j % columns.r]);
  return j / columns.r == 1 ? split.parts[1] : split.parts[0];
}

template <class T>
__device__ T right_of(const Matrix& F, const Matrix& bias, const Columns& columns, int64_t n,
                      int j) {
  if (j >= columns.parts * columns.r)
    return T(j < columns.ranks ? load(bias.data, bias.dtype, n * bias.col_stride) : 0.f);
  const float x = load(F.data, F.dtype, n * F.row_stride + j % columns.r * F.col_stride);
  const Split<T, kRoundedParts> split(x);
  return j / columns.r == 2 ? split.parts[1] : split.parts[0];
}

// A thread makes a vector, of the left operand or of the right one.
template <class T>
__global__ void stack_kernel(const float* S, int64_t M, Matrix factor, Matrix bias, Columns columns,
                             bool by_rows, T* left, T* right) {
  const int64_t N = factor.rows, lefts = M * columns.padded / kVector;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool is_left = i < lefts;
  const int64_t first = (is_left ? i : i - lefts) * kVector;
  if (!is_left && first >= N * columns.padded) return;
  const int64_t width = !is_left && by_rows ? N : columns.padded;
  const int64_t row = first / width, col = first % width;
  T vector[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k)
    vector[k] = is_left   ? left_of<T>(S, columns, row, int(col + k))
                : by_rows ? right_of<T>(factor, bias, columns, col + k, int(row))
                          : right_of<T>(factor, bias, columns, row, int(col + k));
  *reinterpret_cast<uint4*>((is_left ? left : right) + first) = {
      pack(vector[0], vector[1]), pack(vector[2], vector[3]), pack(vector[4], vector[5]),
      pack(vector[6], vector[7])};
}

size_t bytes_of(int64_t rows, const Columns& columns) {
  return round_up(rows * columns.padded * sizeof(uint16_t), 256);
}

}  // namespace

size_t stack_workspace(const Matrix& X, const Matrix& factor, const Matrix& bias) {
  const Columns columns(X, factor, bias);
  return bytes_of(X.rows, columns) + bytes_of(factor.rows, columns);
}

cudaError_t stack(const float* S, const Matrix& X, const Matrix& factor, const Matrix& bias,
                  bool by_rows, void* workspace, Stacked* out, cudaStream_t stream) {
  const Columns columns(X, factor, bias);
  const int64_t M = X.rows, N = factor.rows, padded = columns.padded;
  void* right = static_cast<char*>(workspace) + bytes_of(M, columns);
  out->left = {workspace, X.dtype, M, padded, padded, 1};
  out->right = by_rows ? Matrix{right, X.dtype, padded, N, N, 1}
                       : Matrix{right, X.dtype, N, padded, padded, 1};
  const dim3 grid(unsigned(blocks_of((M + N) * padded / kVector, kThreads)));
  return with_type(X.dtype, [&](auto type) {
    using T = decltype(type);
    return launch(stack_kernel<T>, grid, kThreads, 0, stream, S, M, factor, bias, columns, by_rows,
                  static_cast<T*>(workspace), static_cast<T*>(right));
  });
}

}  // namespace fastlora::cuda
