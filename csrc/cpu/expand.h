// Y = bias + S_g B_gᵀ, which the base product is then added to.
#pragma once

#include "product.h"
#include "tile.h"

namespace fastlora::cpu::FASTLORA_ISA {

template <class T>
void expand(Packed S, int64_t r, Packed Bt, const Packed* bias, Spans spans, const Matrix& Y,
            int64_t begin, int64_t end) {
  using C = Wide<T>;
  alignas(64) C tile[kTileRows * kTileStride<C>];
  const C* b = bias ? static_cast<const C*>(bias->data) : nullptr;
  for (int64_t i = begin; i < end; i += kTileRows) {
    const int64_t rows = std::min(kTileRows, end - i);
    const C* S_i = static_cast<const C*>(S.data) + i * S.stride;
    // Y = start + S_i[:, first : first + L] Q on some columns
    const auto fill = [&](int64_t column, int64_t width, int64_t L, int64_t first, const C* Q) {
      for (int64_t j = 0; j < width; j += kTileColumns) {
        const int64_t n = std::min(kTileColumns, width - j);
        const auto out = tile_to_fill<T>(Y, i, column + j, n, Mask{}, {tile, kTileStride<C>});
        product<C>(rows, n, L, {S_i + first, S.stride, 1}, Q + j, Bt.stride, out.data, out.stride,
                   {false, b ? b + column + j : nullptr});
        store_tile<T>(out, Y, i, rows, column + j, n, Mask{});
      }
    };
    const C* Q = static_cast<const C*>(Bt.data);
    int64_t done = 0;
    for (const Span& span : spans) {
      fill(done, span.column - done, 0, 0, Q);
      fill(span.column, span.width, r, span.g * r, Q + span.packed);
      done = span.column + span.width;
    }
    fill(done, Y.cols - done, 0, 0, Q);
  }
}

}  // namespace fastlora::cpu::FASTLORA_ISA
