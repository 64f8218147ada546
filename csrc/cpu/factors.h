// Factors and their gradients, between the caller's layout and rows that vectors can read.
#pragma once

#include "convert.h"

namespace fastlora::cpu::FASTLORA_ISA {

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
  using V = Vector<C, lanes<C>>;
  const C* in = static_cast<const C*>(parts.data);
  T* to = static_cast<T*>(out.data);
  // i counts the parts' rows, j what lies side by side in them
  const int64_t i_stride = transpose ? out.col_stride : out.row_stride;
  const int64_t j_stride = transpose ? out.row_stride : out.col_stride;
  const auto add = [&](int64_t i, int64_t j_begin, int64_t j_end) {
    for (int64_t j = j_begin; j < j_end; j += lanes<C>) {
      const C* first = in + i * parts.stride + j;
      T* p = to + i * i_stride + j * j_stride;
      const int64_t n = std::min<int64_t>(lanes<C>, j_end - j);
      V sum{};
      if (n == lanes<C>)
        for (int64_t part = 0; part < count; ++part) sum += load<V>(first + part * distance);
      else
        for (int64_t part = 0; part < count; ++part)
          for (int64_t k = 0; k < n; ++k) sum[k] += first[part * distance + k];
      if (j_stride == 1 && n == lanes<C>)
        store_narrow(p, sum);
      else
        for (int64_t k = 0; k < n; ++k) p[k * j_stride] = narrow<T>(sum[k]);
    }
  };
  if (!transpose) {
    for (int64_t i = begin; i < end; ++i) add(i, 0, out.cols);
    return;
  }
  for (int64_t strip = begin; strip < end; strip += kStrip)
    for (int64_t i = 0; i < out.cols; ++i) add(i, strip, std::min(strip + kStrip, end));
}

}  // namespace fastlora::cpu::FASTLORA_ISA
