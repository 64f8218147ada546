// Factors and their gradients, between the caller's layout and rows that vectors can read.
#pragma once

#include "convert.h"

namespace fastlora::FASTLORA_ISA {

// so many rows at a time, so that both sides of a transposition stay in cache
constexpr int64_t kStrip = 32;

template <class T>
void pack(const Matrix& factor, bool transpose, Packed out, int64_t begin, int64_t end) {
  using C = Wide<T>;
  const T* in = static_cast<const T*>(factor.data);
  C* to = static_cast<C*>(out.data);
  if (!transpose) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < factor.cols; ++j)
        to[i * out.stride + j] = widen(in[i * factor.row_stride + j * factor.col_stride]);
    return;
  }
  for (int64_t strip = begin; strip < end; strip += kStrip) {
    const int64_t stop = std::min(strip + kStrip, end);
    for (int64_t j = 0; j < factor.cols; ++j)
      for (int64_t i = strip; i < stop; ++i)
        to[j * out.stride + i] = widen(in[i * factor.row_stride + j * factor.col_stride]);
  }
}

template <class T>
void add_parts(Packed parts, int64_t count, int64_t distance, bool transpose, const Matrix& out,
               int64_t begin, int64_t end) {
  using C = Wide<T>;
  const C* in = static_cast<const C*>(parts.data);
  T* to = static_cast<T*>(out.data);
  const int64_t row_stride = transpose ? 1 : parts.stride,
                col_stride = transpose ? parts.stride : 1;
  for (int64_t strip = begin; strip < end; strip += kStrip) {
    const int64_t stop = std::min(strip + kStrip, end);
    const auto add = [&](int64_t i, int64_t j) {
      C sum = 0;
      for (int64_t part = 0; part < count; ++part)
        sum += in[part * distance + i * row_stride + j * col_stride];
      to[i * out.row_stride + j * out.col_stride] = narrow<T>(sum);
    };
    if (transpose) {
      for (int64_t j = 0; j < out.cols; ++j)
        for (int64_t i = strip; i < stop; ++i) add(i, j);
    } else {
      for (int64_t i = strip; i < stop; ++i)
        for (int64_t j = 0; j < out.cols; ++j) add(i, j);
    }
  }
}

}  // namespace fastlora::FASTLORA_ISA
