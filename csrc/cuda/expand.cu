// Y = S_g B_gᵀ + bias, which the base product is then added to.
#include "fastlora/low_rank.cuh"
#include "fastlora/product.cuh"

namespace fastlora::cuda {

size_t expand_workspace(const Matrix& B, const Matrix& Y) { return low_rank_workspace(B, Y); }

cudaError_t expand(const float* S, const Matrix& B, const Matrix& bias, const Layout& layout,
                   const Matrix& Y, void* workspace, cudaStream_t stream) {
  const int64_t M = Y.rows, r = B.cols;
  int64_t R = 0;
  for (int i = 0; i < layout.count; ++i) R += layout.blocks[i].group < 0 ? 0 : r;
  for (int i = 0; i < layout.count; ++i) {
    const Block& block = layout.blocks[i];
    const int64_t n = int64_t(block.width) * layout.repeats;
    // a block that is not adapted has no ranks
    const bool adapted = block.group >= 0;
    const int64_t ranks = adapted ? r : 0;
    float* S_g = const_cast<float*>(S) + (adapted ? block.group * r : 0);
    Matrix B_g = part(B, adapted ? block.row : 0, 0, n, ranks);
    if (!adapted) B_g.dtype = Y.dtype;
    const Matrix left = {S_g, Dtype::f32, M, ranks, R, 1};
    const cudaError_t error =
        layout.repeats == 1
            ? low_rank(left, B_g, part(bias, 0, block.offset, 1, n), {}, nullptr,
                       part(Y, 0, block.offset, M, n), false, workspace, stream)
            : product(M, n, ranks, view(left), transposed(B_g), columns(bias, block, layout), {},
                      columns(Y, block, layout), stream);
    if (error) return error;
  }
  return cudaSuccess;
}

}  // namespace fastlora::cuda
