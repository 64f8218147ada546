// ΔW = scaling B_g A_g, the rows of one span.
#pragma once

#include "product.h"
#include "tile.h"

namespace fastlora::cpu::FASTLORA_ISA {

template <class T>
void delta(Packed B, int64_t r, Packed A, double scaling, const Matrix& dW, int64_t begin,
           int64_t end) {
  using C = Wide<T>;
  alignas(64) C tile[kTileRows * kTileStride<C>];
  for (int64_t i = begin; i < end; i += kTileRows) {
    const int64_t rows = std::min(kTileRows, end - i);
    for (int64_t k = 0; k < dW.cols; k += kTileColumns) {
      const int64_t width = std::min(kTileColumns, dW.cols - k);
      const auto out = tile_to_fill<T>(dW, i, k, width, Mask{}, {tile, kTileStride<C>});
      product<C>(rows, width, r, {static_cast<const C*>(B.data) + i * B.stride, B.stride, 1},
                 static_cast<const C*>(A.data) + k, A.stride, out.data, out.stride, {});
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t j = 0; j < width; ++j) out.data[row * out.stride + j] *= C(scaling);
      store_tile<T>(out, dW, i, rows, k, width, Mask{});
    }
  }
}

}  // namespace fastlora::cpu::FASTLORA_ISA
