// dS = c dY_g B_g and dB_g = dY_gᵀ S_g, from one read of dY.
#pragma once

#include "product.h"
#include "tile.h"

namespace fastlora::cpu::FASTLORA_ISA {

template <class T>
void grad_expand(const Matrix& dY, Packed S, int64_t r, Packed B, double c, Spans spans, Packed dS,
                 Packed dBt, int64_t begin, int64_t end) {
  using C = Wide<T>;
  alignas(64) C tile[kTileRows * kTileStride<C>], sum[kTileRows * kSlab];
  const int64_t G = spans.groups;
  for (int64_t i = begin; i < end; i += kTileRows) {
    const int64_t rows = std::min(kTileRows, end - i);
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t slab = 0; slab < (dS.data ? r : 1); slab += kSlab) {
        const int64_t columns = std::min(kSlab, r - slab);
        bool accumulate = false;
        for (const Span& span : spans) {
          if (span.g != g) continue;
          for (int64_t j = 0; j < span.width; j += kTileColumns) {
            const int64_t width = std::min(kTileColumns, span.width - j);
            const auto dY_g = load_tile<T>(Reads::columns, dY, i, rows, span.column + j, width,
                                           Mask{}, {tile, kTileStride<C>});
            if (dS.data) {
              product<C>(rows, columns, width, {dY_g.data, dY_g.stride, 1},
                         static_cast<const C*>(B.data) + (span.row + j) * B.stride + slab, B.stride,
                         sum, kSlab, {accumulate, nullptr});
              accumulate = true;
            }
            if (dBt.data && slab == 0)
              product<C>(r, width, rows,
                         {static_cast<const C*>(S.data) + i * S.stride + g * r, 1, S.stride},
                         dY_g.data, dY_g.stride, static_cast<C*>(dBt.data) + span.packed + j,
                         dBt.stride, {i > begin, nullptr});
          }
        }
        if (!dS.data) continue;
        C* out = static_cast<C*>(dS.data) + i * dS.stride + g * r + slab;
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t j = 0; j < columns; ++j)
            out[row * dS.stride + j] = C(c) * sum[row * kSlab + j];
      }
    }
  }
}

}  // namespace fastlora::cpu::FASTLORA_ISA
