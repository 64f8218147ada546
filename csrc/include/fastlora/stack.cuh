// S Fᵀ + bias as one product of 16-bit operands: parts of S side by side, and those of F beside
// each other that they are to be multiplied with.
#pragma once

#include "stages.h"

namespace fastlora::cuda {

struct Stacked {
  // (M, ranks), and (N, ranks) or, by rows, (ranks, N); contiguous, with 0 up to whole vectors
  Matrix left, right;
};

// X: (M, any), whose dtype the operands get, S: (M, r), contiguous, factor: (N, r), of that dtype
// or split, bias: (1, N) or without data. By rows, N is a multiple of 8.
size_t stack_workspace(const Matrix& X, const Matrix& factor, const Matrix& bias);
cudaError_t stack(const float* S, const Matrix& X, const Matrix& factor, const Matrix& bias,
                  bool by_rows, void* workspace, Stacked* out, cudaStream_t stream);

}  // namespace fastlora::cuda
