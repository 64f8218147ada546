// The fused stages: their low-rank operands in 16 bits, then one product.
#include "fastlora/fused.h"
#include "fastlora/split.cuh"
#include "fastlora/stack.cuh"

namespace fastlora::cuda::fused {
namespace {

// what copies are described with has 32 bits, and some of it is to be multiplied by a few
constexpr int64_t kMost = 1 << 29;

bool is_some(const Matrix& m) {
  return m.rows > 0 && m.cols > 0 && m.rows < kMost && m.cols < kMost;
}

// Rows of vectors, one after another.
bool is_copied(const Matrix& m) {
  return is_some(m) && is_vectors(m) && m.row_stride >= m.cols && m.row_stride < kMost << 8;
}

Matrix transposed_of(const Matrix& m) {
  return {m.data, m.dtype, m.cols, m.rows, m.col_stride, m.row_stride};
}

}  // namespace

bool takes(const Matrix& left, const Matrix& W, const Matrix& factor, const uint8_t* mask) {
  // each side of W is that of an output
  return is_copied(left) && is_copied(W) && W.rows % 8 == 0 && left.dtype == W.dtype &&
         is_some(factor) && (factor.dtype == left.dtype || is_split(left, factor)) &&
         reinterpret_cast<uintptr_t>(mask) % 4 == 0;
}

size_t expand_workspace(const Matrix& X, const Matrix& B, const Matrix& bias) {
  return stack_workspace(X, B, bias);
}

cudaError_t expand(const Matrix& X, const Matrix& W, const float* S, const Matrix& B,
                   const Matrix& bias, const Matrix& Y, void* workspace, cudaStream_t stream) {
  Stacked low_rank;
  if (const cudaError_t error = stack(S, X, B, bias, false, workspace, &low_rank, stream))
    return error;
  return hopper::expand(X, W, low_rank.left, low_rank.right, Y, stream);
}

size_t grad_input_workspace(const Matrix& dY, const Matrix& A) {
  return stack_workspace(dY, transposed_of(A), {});
}

cudaError_t grad_input(const Matrix& dY, const Matrix& W, const float* dS, const Matrix& A,
                       const uint8_t* mask, const Matrix& dX, void* workspace,
                       cudaStream_t stream) {
  Stacked low_rank;
  if (const cudaError_t error =
          stack(dS, dY, transposed_of(A), {}, true, workspace, &low_rank, stream))
    return error;
  return hopper::grad_input(dY, W, low_rank.left, low_rank.right, mask, dX, stream);
}

}  // namespace fastlora::cuda::fused
