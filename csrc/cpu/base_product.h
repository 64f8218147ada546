// out += P Q, the product with the frozen weight: Y += X Wᵀ and dX += dY W.
//
// Q is packed into slivers of two vectors; a few rows of P and out stay in the first-level cache
// while the slivers pass by.
#pragma once

#include "product.h"
#include "tile.h"

namespace fastlora::cpu::FASTLORA_ISA {

// rows of out whose sums fit the registers, beside two vectors of Q and an element of P
constexpr int kBaseRows = (FASTLORA_REGISTERS - 4) / 2;
// as kSumLength: measured over 768 to 4096 terms, the rms error is 0.95 to 0.98 times MKL's
constexpr int kBaseSumLength = 128;

// a square of elements in registers; `Step` rows and columns change places at a time
template <int Step = 1, class V, int n>
inline void transpose(V (&rows)[n]) {
  if constexpr (Step < n) {
    constexpr auto all = std::make_integer_sequence<int, n>{};
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (i & Step) continue;
      const V a = rows[i], b = rows[i + Step];
      rows[i] = exchanged<Step, false>(a, b, all);
      rows[i + Step] = exchanged<Step, true>(a, b, all);
    }
    transpose<2 * Step>(rows);
  }
}

template <class C>
inline Matrix rows_from(const Matrix& Q, int64_t first, int64_t count) {
  C* data = static_cast<C*>(Q.data) + first * Q.row_stride;
  return {data, Q.dtype, count, Q.cols, Q.row_stride, Q.col_stride};
}

// Q as slivers, one after the other: each (Q.rows, 2n), with zeros past the last column.
template <class C>
void pack_slivers(const Matrix& Q, C* out) {
  using V = Vector<C, lanes<C>>;
  constexpr int n = lanes<C>;
  const C* in = static_cast<const C*>(Q.data);
  // by columns as far as there are whole squares of them, then along the rows, as they lie in
  // memory
  const int64_t squares = Q.row_stride == 1 ? Q.rows / n * n : 0, whole = Q.cols / (2 * n) * 2 * n;
  for (int64_t j = 0; j < whole; j += n)
    for (int64_t l = 0; l < squares; l += n) {
      V rows[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) rows[i] = load<V>(in + (j + i) * Q.col_stride + l);
      transpose(rows);
      C* to = out + j / (2 * n) * (2 * n) * Q.rows + l * 2 * n + j % (2 * n);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) store(to + i * 2 * n, rows[i]);
    }
  for (int64_t l = 0; l < Q.rows; ++l)
    for (int64_t j = l < squares ? whole : 0; j < Q.cols; j += 2 * n) {
      const int64_t width = std::min<int64_t>(2 * n, Q.cols - j);
      C* to = out + j * Q.rows + l * 2 * n;
      if (width <= n) store(to + n, V{});
      load_row<C>(Q, l, j, width, nullptr, to);
    }
}

template <int Rows = kBaseRows, class C>
inline void base_tile(int64_t rows, int64_t L, Left<C> P, const C* sliver, C* out, int64_t stride,
                      bool add) {
  using V = Vector<C, lanes<C>>;
  if (rows == Rows)
    product_tile<V, Rows, 2, C, kBaseSumLength>(L, P, sliver, 2 * lanes<C>, out, stride,
                                                {add, nullptr});
  else if constexpr (Rows > 1)
    base_tile<Rows - 1>(rows, L, P, sliver, out, stride, add);
}

template <class C>
void add_base_product(const Matrix& P, const Matrix& Q, const Matrix& out, void* buffer) {
  constexpr int64_t n = 2 * lanes<C>, stride = kBaseTerms + lanes<C>;
  alignas(64) C rows_of_P[kBaseRows * stride], tile[kBaseRows * n];
  C* slivers = static_cast<C*>(buffer);
  // groups of nearly the same size: few rows would leave the multipliers idle
  const int64_t groups = (out.rows + kBaseRows - 1) / kBaseRows;
  for (int64_t l = 0; l < Q.rows; l += kBaseTerms) {
    const int64_t L = std::min(kBaseTerms, Q.rows - l);
    pack_slivers(rows_from<C>(Q, l, L), slivers);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t i = out.rows * group / groups, rows = out.rows * (group + 1) / groups - i;
      for (int64_t row = 0; row < rows; ++row)
        load_row<C>(P, i + row, l, L, nullptr, rows_of_P + row * stride);
      for (int64_t j = 0; j < out.cols; j += n) {
        const int64_t width = std::min(n, out.cols - j);
        const Left<C> left{rows_of_P, stride, 1};
        if (width == n && out.col_stride == 1) {
          const auto own = own_tile<C>(out, i, j);
          for (int64_t row = 0; row < rows; ++row) {
            __builtin_prefetch(own.data + row * own.stride, 1);
            __builtin_prefetch(own.data + row * own.stride + lanes<C>, 1);
          }
          base_tile(rows, L, left, slivers + j * L, own.data, own.stride, true);
          continue;
        }
        base_tile(rows, L, left, slivers + j * L, tile, n, false);
        for (int64_t row = 0; row < rows; ++row)
          store_row<C>(tile + row * n, width, nullptr, out, i + row, j, true);
      }
    }
  }
}

}  // namespace fastlora::cpu::FASTLORA_ISA
