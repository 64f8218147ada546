// dX = m∘(dS A), which the base product is then added to.
#include "fastlora/low_rank.cuh"

namespace fastlora::cuda {

size_t grad_input_workspace(const Matrix& A, const Matrix& dX) { return low_rank_workspace(A, dX); }

cudaError_t grad_input(const float* dS, const Matrix& A, const uint8_t* mask, const Matrix& dX,
                       bool adds, void* workspace, cudaStream_t stream) {
  const int64_t M = dX.rows, R = A.rows;
  return low_rank({const_cast<float*>(dS), Dtype::f32, M, R, R, 1},
                  {A.data, A.dtype, A.cols, R, A.col_stride, A.row_stride}, {}, {}, mask, dX, adds,
                  workspace, stream);
}

}  // namespace fastlora::cuda
