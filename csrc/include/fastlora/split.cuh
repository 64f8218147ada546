// A float32 factor as bfloat16 ones that add up to it, for tensor cores to multiply with.
#pragma once

#include "numbers.cuh"
#include "stages.h"

namespace fastlora::cuda {

// Three have all bits of float32; two have more than a result in 16 bits can show.
constexpr int kExactParts = 3, kRoundedParts = 2;

// Whether a product of X and a factor is done with parts of that.
inline bool is_split(const Matrix& X, const Matrix& factor) {
  return X.dtype == Dtype::bf16 && factor.dtype == Dtype::f32;
}

// Bytes of the parts; what follows them is aligned.
size_t split_workspace(const Matrix& factor, int parts);

enum class Stack { rows, columns };

// The parts one after another, as more rows or as more columns; in `workspace`, contiguous.
cudaError_t split(const Matrix& factor, int parts, Stack stack, void* workspace, Matrix* out,
                  cudaStream_t stream);

}  // namespace fastlora::cuda
