// The product of rows of a few numbers with a factor, which expand, grad_input and delta are.
#pragma once

#include "stages.h"

namespace fastlora::cuda {

// out (M, N) = m∘(c left (M, r) rightᵀ + bias (1, N)), right: (N, r); what out was is added where
// it `adds`.
size_t low_rank_workspace(const Matrix& right, const Matrix& out);
cudaError_t low_rank(const Matrix& left, const Matrix& right, const Matrix& bias, Factor c,
                     const uint8_t* mask, const Matrix& out, bool adds, void* workspace,
                     cudaStream_t stream);

}  // namespace fastlora::cuda
