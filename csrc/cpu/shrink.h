// S = c (m∘X) Aᵀ: the mask is drawn, and X read, once.
#pragma once

#include "product.h"
#include "tile.h"

namespace fastlora::cpu::FASTLORA_ISA {

template <class T>
void shrink(const Matrix& X, Packed At, double c, uint32_t t, uint64_t seed, Mask mask, Packed S,
            int64_t R, int64_t begin, int64_t end) {
  using C = Wide<T>;
  alignas(64) C tile[kTileRows * kTileStride<C>], sum[kTileRows * kSlab];
  for (int64_t i = begin; i < end; i += kTileRows) {
    const int64_t rows = std::min(kTileRows, end - i);
    // once at least: where no block is adapted there is a mask still
    for (int64_t slab = 0; slab == 0 || slab < R; slab += kSlab) {
      const int64_t columns = std::min(kSlab, R - slab);
      for (int64_t k = 0; k < X.cols; k += kTileColumns) {
        const int64_t width = std::min(kTileColumns, X.cols - k);
        if (t && slab == 0) {
          const int64_t first = k / 8, bytes = std::min(kTileColumns / 8, mask.row_bytes - first);
          for (int64_t row = i; row < i + rows; ++row)
            draw(seed, t, row * mask.row_bytes, first, bytes, X.cols, mask.row(row) + first);
        }
        const auto kept =
            load_tile<T>(Reads::columns, X, i, rows, k, width, mask, {tile, kTileStride<C>});
        product<C>(rows, columns, width, {kept.data, kept.stride, 1},
                   static_cast<const C*>(At.data) + k * At.stride + slab, At.stride, sum, kSlab,
                   {k > 0, nullptr});
      }
      C* out = static_cast<C*>(S.data) + i * S.stride + slab;
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t j = 0; j < columns; ++j)
          out[row * S.stride + j] = X.cols ? C(c) * sum[row * kSlab + j] : C(0);
    }
  }
}

}  // namespace fastlora::cpu::FASTLORA_ISA
