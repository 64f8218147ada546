// The product that is right for any dtypes and strides, on plain multiply-adds of float32.
#pragma once

#include "stages.h"

namespace fastlora::cuda {

// Rows and columns of a matrix from these on.
Matrix part(const Matrix& m, int64_t row, int64_t col, int64_t rows, int64_t cols);

// A matrix whose columns may be those of one block: `width` of every `period`, if that is not 0.
struct View {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t row_stride = 0, col_stride = 0;
  int width = 0, period = 0;
  // where there is one, elements without a bit count as zero, and are written as zero
  const uint8_t* mask = nullptr;
  int64_t row_bytes = 0;
  // of a result: to what it was
  bool adds = false;
};

View view(const Matrix& m);
View transposed(const Matrix& m);
View contiguous(const float* data, int64_t cols);
View transposed(const float* data, int64_t cols);
View masked(View m, const uint8_t* mask, int64_t K);
View added(View m, bool adds);
// the columns of a block
View columns(const Matrix& m, const Block& block, const Layout& layout);

// out (M, N) = c left (M, L) right (L, N) + bias (1, N)
cudaError_t product(int64_t M, int64_t N, int64_t L, View left, View right, View bias, Factor c,
                    View out, cudaStream_t stream);

// The same for a long L and no bias, in parts that are added up in order. `workspace` holds
// product_parts(...) times M * N floats.
int product_parts(int64_t M, int64_t N, int64_t L);
cudaError_t product_in_parts(int64_t M, int64_t N, int64_t L, View left, View right, Factor c,
                             View out, void* workspace, cudaStream_t stream);

// Draws the packed mask alone.
cudaError_t draw_mask(int64_t M, int64_t K, uint32_t t, const int64_t* seed, uint8_t* mask,
                      cudaStream_t stream);

}  // namespace fastlora::cuda
