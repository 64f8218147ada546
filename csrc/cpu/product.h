// The one product that every stage is made of: C = P Q, where rows of Q and C are read as vectors.
#pragma once

#include "simd.h"

namespace fastlora::cpu::FASTLORA_ISA {

// A sum over more terms than these is a sum of such sums, each begun at zero: measured over 768
// terms, its rms rounding error is half that of MKL's
constexpr int kSumLength = 32;

// Read element by element, in any strides, so that it may be a transpose.
template <class C>
struct Left {
  const C* data;
  int64_t m_stride, l_stride;
};

// What the sums start from.
template <class C>
struct Start {
  bool from_out;  // what out holds already
  const C* row;   // or a row that all of them share, where there is one
};

template <class V, int Rows, int Columns, class C, int SumLength = kSumLength>
inline void product_tile(int64_t L, Left<C> P, const C* Q, int64_t q_stride, C* out,
                         int64_t out_stride, Start<C> start) {
  constexpr int n = sizeof(V) / sizeof(C);
  int64_t l = 0;
  do {
    V sum[Rows][Columns] = {};
    for (const int64_t stop = std::min<int64_t>(l + SumLength, L); l < stop; ++l) {
      V q[Columns];
#pragma GCC unroll 4
      for (int j = 0; j < Columns; ++j) q[j] = load<V>(Q + l * q_stride + j * n);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const V p = broadcast<V>(P.data[i * P.m_stride + l * P.l_stride]);
#pragma GCC unroll 4
        for (int j = 0; j < Columns; ++j) sum[i][j] = fma(p, q[j], sum[i][j]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Columns; ++j) {
        C* c = out + i * out_stride + j * n;
        if (start.from_out) sum[i][j] += load<V>(c);
        if (start.row) sum[i][j] += load<V>(start.row + j * n);
        store(c, sum[i][j]);
      }
    start = {true, nullptr};
  } while (l < L);
}

template <class V, int Columns, class C, int Rows, int... Fewer>
inline void product_columns(int64_t M, int64_t L, Left<C> P, const C* Q, int64_t q_stride, C* out,
                            int64_t out_stride, Start<C> start) {
  int64_t m = 0;
  for (; m + Rows <= M; m += Rows)
    product_tile<V, Rows, Columns>(L, Left<C>{P.data + m * P.m_stride, P.m_stride, P.l_stride}, Q,
                                   q_stride, out + m * out_stride, out_stride, start);
  if constexpr (sizeof...(Fewer) > 0)
    if (m < M)
      product_columns<V, Columns, C, Fewer...>(M - m, L,
                                               {P.data + m * P.m_stride, P.m_stride, P.l_stride}, Q,
                                               q_stride, out + m * out_stride, out_stride, start);
}

// C (M, N) = start + P (M, L) Q (L, N), all rounded up to whole vectors of columns
template <class C>
inline void product(int64_t M, int64_t N, int64_t L, Left<C> P, const C* Q, int64_t q_stride,
                    C* out, int64_t out_stride, Start<C> start) {
  using V = Vector<C, lanes<C>>;
  constexpr int n = lanes<C>;
  int64_t j = 0;
  const auto at = [&](int64_t column) {
    return Start<C>{start.from_out, start.row ? start.row + column : nullptr};
  };
  for (; j + n < N; j += 2 * n)
    product_columns<V, 2, C, FASTLORA_TILE_ROWS, 4, 1>(M, L, P, Q + j, q_stride, out + j,
                                                       out_stride, at(j));
  if (j >= N) return;
  // a rank of 8 fills half an AVX-512 vector, and half a vector is cheaper on some machines
  using Last = Vector<C, sizeof(V) == 64 ? n / 2 : n>;
  if (N - j <= int64_t(sizeof(Last) / sizeof(C)))
    product_columns<Last, 1, C, 2 * FASTLORA_TILE_ROWS, 4, 1>(M, L, P, Q + j, q_stride, out + j,
                                                              out_stride, at(j));
  else
    product_columns<V, 1, C, 2 * FASTLORA_TILE_ROWS, 4, 1>(M, L, P, Q + j, q_stride, out + j,
                                                           out_stride, at(j));
}

}  // namespace fastlora::cpu::FASTLORA_ISA
