// csrc/cutlass's two products for the emulated device: plain loops, rounded once.
#include <cstdio>
#include <cstdlib>

#include "fastlora/dropout.cuh"
#include "fastlora/fused.h"
#include "fastlora/numbers.cuh"

namespace fastlora::cuda::hopper {
namespace {

double at(const Matrix& m, int64_t row, int64_t col) {
  return load(m.data, m.dtype, row * m.row_stride + col * m.col_stride);
}

// What copies to shared memory ask of an operand.
void check(const Matrix& m) {
  if (is_vectors(m) && m.row_stride >= m.cols && m.rows > 0 && m.cols > 0) return;
  std::fputs("an operand that is no rows of vectors\n", stderr);
  std::abort();
}

}  // namespace

// Multiprocessors of the emulated device, for tests to set; 0: however many a product fills.
extern "C" {
int fastlora_multiprocessors = 0;
}

bool fills(int64_t M, int64_t N, int) {
  return !fastlora_multiprocessors || filled(M, N, fastlora_multiprocessors) >= kFilled;
}

cudaError_t expand(const Matrix& X, const Matrix& W, const Matrix& S, const Matrix& B,
                   const Matrix& Y, cudaStream_t) {
  for (const Matrix& m : {X, W, S, B, Y}) check(m);
  for (int64_t i = 0; i < Y.rows; ++i)
    for (int64_t j = 0; j < Y.cols; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < X.cols; ++k) sum += at(X, i, k) * at(W, j, k);
      for (int64_t k = 0; k < S.cols; ++k) sum += at(S, i, k) * at(B, j, k);
      store(Y.data, Y.dtype, i * Y.row_stride + j, float(sum));
    }
  return cudaSuccess;
}

cudaError_t grad_input(const Matrix& dY, const Matrix& W, const Matrix& dS, const Matrix& A,
                       const uint8_t* mask, const Matrix& dX, cudaStream_t) {
  for (const Matrix& m : {dY, W, dS, A, dX}) check(m);
  for (int64_t i = 0; i < dX.rows; ++i)
    for (int64_t j = 0; j < dX.cols; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < dS.cols; ++k) sum += at(dS, i, k) * at(A, k, j);
      if (mask && !(mask[i * mask_bytes(dX.cols) + j / 8] >> j % 8 & 1)) sum = 0;
      for (int64_t k = 0; k < dY.cols; ++k) sum += at(dY, i, k) * at(W, k, j);
      store(dX.data, dX.dtype, i * dX.row_stride + j, float(sum));
    }
  return cudaSuccess;
}

}  // namespace fastlora::cuda::hopper
