// Y = X Wᵀ + S Bᵀ in one accumulator: the base product's tiles, then those of the low-rank term.
#include "fastlora/fused.h"
#include "product.cuh"

namespace fastlora::cuda::hopper {

cudaError_t expand(const Matrix& X, const Matrix& W, const Matrix& S, const Matrix& B,
                   const Matrix& Y, cudaStream_t stream) {
  return product<false>(X, W, S, B, nullptr, Y, stream);
}

}  // namespace fastlora::cuda::hopper
