// dX = dY W + m∘(dS A) in one accumulator: the tiles of the low-rank term, the mask, then those of
// the base product.
#include "fastlora/fused.h"
#include "product.cuh"

namespace fastlora::cuda::hopper {

cudaError_t grad_input(const Matrix& dY, const Matrix& W, const Matrix& dS, const Matrix& A,
                       const uint8_t* mask, const Matrix& dX, cudaStream_t stream) {
  return product<true>(dY, W, dS, A, mask, dX, stream);
}

}  // namespace fastlora::cuda::hopper
