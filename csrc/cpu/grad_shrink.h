// dA = dSᵀ (m∘X).
#pragma once

#include "product.h"
#include "tile.h"

namespace fastlora::cpu::FASTLORA_ISA {

template <class T>
void grad_shrink(Packed dS, int64_t R, const Matrix& X, Mask mask, Packed dA, int64_t begin,
                 int64_t end) {
  using C = Wide<T>;
  alignas(64) C tile[kTileRows * kTileStride<C>];
  // once at least: a sum over no rows is zero
  for (int64_t i = begin; i == begin || i < end; i += kTileRows) {
    const int64_t rows = std::min(kTileRows, end - i);
    for (int64_t k = 0; k < X.cols; k += kTileColumns) {
      const int64_t width = std::min(kTileColumns, X.cols - k);
      const auto kept =
          load_tile<T>(Reads::rows, X, i, rows, k, width, mask, {tile, kTileStride<C>});
      product<C>(R, width, rows, {static_cast<const C*>(dS.data) + i * dS.stride, 1, dS.stride},
                 kept.data, kept.stride, static_cast<C*>(dA.data) + k, dA.stride,
                 {i > begin, nullptr});
    }
  }
}

}  // namespace fastlora::cpu::FASTLORA_ISA
