// dW = c B_g A_g on the rows of adapted block g, 0 on the others.
#include "fastlora/low_rank.cuh"
#include "fastlora/product.cuh"

namespace fastlora::cuda {

size_t delta_workspace(const Matrix& A, const Matrix& dW) { return low_rank_workspace(A, dW); }

cudaError_t delta(const Matrix& A, const Matrix& B, Factor c, const Layout& layout,
                  const Matrix& dW, void* workspace, cudaStream_t stream) {
  const int64_t K = dW.cols, r = B.cols;
  for (int i = 0; i < layout.count; ++i) {
    const Block& block = layout.blocks[i];
    const int64_t n = int64_t(block.width) * layout.repeats;
    // a block that is not adapted has no ranks
    const bool adapted = block.group >= 0;
    const int64_t ranks = adapted ? r : 0;
    const Matrix A_g = part(A, adapted ? block.group * r : 0, 0, ranks, K);
    const Matrix B_g = part(B, adapted ? block.row : 0, 0, n, ranks);
    const Matrix right = {A_g.data, A_g.dtype, K, ranks, A_g.col_stride, A_g.row_stride};
    // by columns of the transpose, as blocks may alternate
    const Matrix transpose = {dW.data, dW.dtype, K, dW.rows, dW.col_stride, dW.row_stride};
    const cudaError_t error =
        layout.repeats == 1 ? low_rank(B_g, right, {}, c, nullptr, part(dW, block.offset, 0, n, K),
                                       false, workspace, stream)
                            : product(K, n, ranks, view(right), transposed(B_g), {}, c,
                                      columns(transpose, block, layout), stream);
    if (error) return error;
  }
  return cudaSuccess;
}

}  // namespace fastlora::cuda
