// The stages that hold a base product, with their low-rank term in its accumulator: for compute
// capability 9.0, and only where the extension is built with CUTLASS. No torch header here.
#pragma once

#include "stages.h"

namespace fastlora::cuda::fused {

// Whether the stages below take `left` (X or dY), W and the factor (B or A); if not, those of
// stages.h do. Rows of 16-bit vectors, a factor of the same dtype, or float32 under
// bfloat16, and a mask, where there is one, of aligned words.
bool takes(const Matrix& left, const Matrix& W, const Matrix& factor, const uint8_t* mask);

// Y = X Wᵀ + S Bᵀ + bias, rounded once.
// X: (M, K), W: (N, K), S: (M, r), contiguous, B: (N, r), bias: (1, N) or without data, Y: (M, N).
size_t expand_workspace(const Matrix& X, const Matrix& B, const Matrix& bias);
cudaError_t expand(const Matrix& X, const Matrix& W, const float* S, const Matrix& B,
                   const Matrix& bias, const Matrix& Y, void* workspace, cudaStream_t stream);

// dX = dY W + m∘(dS A), rounded once.
// dY: (M, N), W: (N, K), dS: (M, R), contiguous, A: (R, K), mask: as shrink wrote it or null,
// dX: (M, K).
size_t grad_input_workspace(const Matrix& dY, const Matrix& A);
cudaError_t grad_input(const Matrix& dY, const Matrix& W, const float* dS, const Matrix& A,
                       const uint8_t* mask, const Matrix& dX, void* workspace, cudaStream_t stream);

}  // namespace fastlora::cuda::fused

// What they are made of, in csrc/cutlass: all operands are rows of 16-bit vectors of one dtype, and
// none is empty.
namespace fastlora::cuda::hopper {

// The tile of a block, and how many blocks have tiles under each other, which share what they read
// of W; a multiprocessor has one block at a time.
constexpr int kRows = 128, kCols = 256, kPair = 2;

// Of what so many multiprocessors can do in the waves that a product (M, N) takes, the part that
// it asks for.
inline double filled(int64_t M, int64_t N, int multiprocessors) {
  const int64_t rows = (M + kPair * kRows - 1) / (kPair * kRows), cols = (N + kCols - 1) / kCols,
                at_once = multiprocessors / kPair, waves = (rows * cols + at_once - 1) / at_once;
  return double(M) * double(N) / (double(waves) * multiprocessors * kRows * kCols);
}

// What `filled` has to be: the fused products save a few percent of a product's time, and cuBLAS,
// which has more shapes of tiles, mostly fills a device to 0.97.
constexpr double kFilled = 0.9;

// Whether a product (M, N) fills the device of this index as much.
bool fills(int64_t M, int64_t N, int device);

// Y = X Wᵀ + S Bᵀ
cudaError_t expand(const Matrix& X, const Matrix& W, const Matrix& S, const Matrix& B,
                   const Matrix& Y, cudaStream_t stream);

// dX = dY W + m∘(dS A)
cudaError_t grad_input(const Matrix& dY, const Matrix& W, const Matrix& dS, const Matrix& A,
                       const uint8_t* mask, const Matrix& dX, cudaStream_t stream);

}  // namespace fastlora::cuda::hopper
