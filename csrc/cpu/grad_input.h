// dX = m∘(dS A), or that added to dX; the base product dY W is added then.
#pragma once

#include "product.h"
#include "tile.h"

namespace fastlora::cpu::FASTLORA_ISA {

template <class T>
void grad_input(Packed dS, int64_t R, Packed A, Mask mask, bool add, const Matrix& dX,
                int64_t begin, int64_t end) {
  using C = Wide<T>;
  alignas(64) C tile[kTileRows * kTileStride<C>];
  for (int64_t i = begin; i < end; i += kTileRows) {
    const int64_t rows = std::min(kTileRows, end - i);
    for (int64_t k = 0; k < dX.cols; k += kTileColumns) {
      const int64_t width = std::min(kTileColumns, dX.cols - k);
      const auto out = tile_to_fill<T>(dX, i, k, width, mask, {tile, kTileStride<C>});
      const bool in_place = is_wide<T>(dX, width, mask);
      product<C>(rows, width, R, {static_cast<const C*>(dS.data) + i * dS.stride, dS.stride, 1},
                 static_cast<const C*>(A.data) + k, A.stride, out.data, out.stride,
                 {add && in_place, nullptr});
      store_tile<T>(out, dX, i, rows, k, width, mask, add);
    }
  }
}

}  // namespace fastlora::cpu::FASTLORA_ISA
