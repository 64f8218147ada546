// The fused stages: their low-rank operands in 16 bits, then one product.
#include "fastlora/fused.h"
#include "fastlora/split.cuh"
#include "fastlora/stack.cuh"

namespace fastlora::cuda::fused {
namespace {

// Rows of vectors that a copy can be described for: one after another, of 32-bit sizes.
bool is_copied(const Matrix& m) {
  constexpr int64_t kMost = 1 << 30;
  return is_vectors(m) && m.rows > 0 && m.cols > 0 && m.rows < kMost && m.cols < kMost &&
         m.row_stride >= m.cols && m.row_stride < int64_t(1) << 38;
}

Matrix transposed_of(const Matrix& m) {
  return {m.data, m.dtype, m.cols, m.rows, m.col_stride, m.row_stride};
}

}  // namespace

bool takes(const Matrix& left, const Matrix& W, const Matrix& factor, const uint8_t* mask) {
  // each side of W is that of an output
  return is_copied(left) && is_copied(W) && W.rows % 8 == 0 && left.dtype == W.dtype &&
         (factor.dtype == left.dtype || is_split(left, factor)) && factor.cols > 0 &&
         factor.cols < 1 << 16 && reinterpret_cast<uintptr_t>(mask) % 4 == 0;
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
