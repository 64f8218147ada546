// Merging: the rounded sum of a weight and its low-rank delta, and the correction between what a
// prediction gives and what was there. fastlora/backends/reference_merge.py documents them.
#pragma once

#include "product.h"
#include "tile.h"

namespace fastlora::cpu::FASTLORA_ISA {

// ---- round(base + delta) ------------------------------------------------------------------------

// To the dtype that T is narrowed from, so that narrowing it is the only rounding. For a 16-bit T
// that takes a rounding to odd first: to 16 significant bits, more than T has by enough that no tie
// is made, and few enough that fp32 holds all that do not round to 0.
template <class T, class V>
inline auto before_narrowing(V x) {
  constexpr int n = sizeof(V) / sizeof(double);
  if constexpr (sizeof(T) == 2) {
    using Bits = Vector<uint64_t, n>;
    constexpr uint64_t low = (uint64_t(1) << 37) - 1;
    const Bits bits = Bits(x);
    x = V((bits | ((bits & low) + low)) & ~low);
  }
  return __builtin_convertvector(x, Vector<Wide<T>, n>);
}

template <class T>
void add_low_rank(const Matrix& base, Packed left, int64_t r, Packed right, const double* row_scale,
                  const double* column_scale, const Matrix& out, int64_t begin, int64_t end) {
  using V = Vector<double, lanes<double>>;
  using Base = Vector<Wide<T>, lanes<double>>;
  // rows of a weight are read and written once: in pieces long enough to be prefetched
  constexpr int64_t tile_rows = 8, columns = 1024, stride = columns + lanes<double>;
  alignas(64) double tile[tile_rows * stride];
  alignas(64) Wide<T> values[columns];
  for (int64_t i = begin; i < end; i += tile_rows) {
    const int64_t rows = std::min(tile_rows, end - i);
    for (int64_t k = 0; k < base.cols; k += columns) {
      const int64_t width = std::min(columns, base.cols - k);
      product<double>(rows, width, r,
                      {static_cast<const double*>(left.data) + i * left.stride, left.stride, 1},
                      static_cast<const double*>(right.data) + k, right.stride, tile, stride, {});
      for (int64_t row = 0; row < rows; ++row) {
        load_row<T>(base, i + row, k, width, nullptr, values);
        for (int64_t j = 0; j < width; j += lanes<double>) {
          V delta = load<V>(tile + row * stride + j) * row_scale[i + row];
          if (column_scale) delta *= load<V>(column_scale + k + j);
          const V before = __builtin_convertvector(load<Base>(values + j), V);
          store(values + j, before_narrowing<T>(V(delta + before)));
        }
        store_row<T>(values, width, nullptr, out, i + row, k);
      }
    }
  }
}

// ---- distances ----------------------------------------------------------------------------------

// The bits of a float, and the largest of a finite one's or infinity's without its sign.
template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 2, uint16_t,
                                  std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
template <class T>
constexpr uint64_t kInfinity = 0x7F800000;
template <>
constexpr uint64_t kInfinity<double> = 0x7FF0000000000000;
template <>
constexpr uint64_t kInfinity<bf16> = 0x7F80;
template <>
constexpr uint64_t kInfinity<f16> = 0x7C00;

// an involution between a float's bits and an integer that grows with the float
template <class U>
inline U flip_negative(U bits) {
  using S = std::make_signed_t<U>;
  return bits ^ (U(S(bits) >> (8 * sizeof(U) - 1)) & (U(-1) >> 1));
}

// the place of a predicted value: of 0 for NaN and -0, whose bits arithmetic does not define
template <class T>
inline BitsOf<T> predicted_order(BitsOf<T> bits) {
  using U = BitsOf<T>;
  const U size = bits & (U(-1) >> 1);
  return U(size - 1) < U(kInfinity<T>) ? flip_negative(bits) : U(0);
}

// elements worked on at a time, in first-level cache
constexpr int64_t kPiece = 1024;

// the largest distance that a code of so many bits holds
constexpr int largest_distance(int bits) { return bits ? (1 << (bits - 1)) - 1 : 0; }

template <class T>
inline void load_distances(const void* predicted, const void* exact, int64_t first, int64_t n,
                           BitsOf<T>* __restrict out) {
  using U = BitsOf<T>;
  const U* p = static_cast<const U*>(predicted) + first;
  const U* e = static_cast<const U*>(exact) + first;
  for (int64_t i = 0; i < n; ++i) out[i] = flip_negative(e[i]) - predicted_order<T>(p[i]);
}

template <class T>
void count_distances(const void* predicted, const void* exact, int64_t begin, int64_t end,
                     int64_t* outside) {
  using U = BitsOf<T>;
  alignas(64) U distance[kPiece];
  for (int64_t first = begin; first < end; first += kPiece) {
    const int64_t n = std::min(kPiece, end - first);
    load_distances<T>(predicted, exact, first, n, distance);
    for (int b = 0; b < 4; ++b) {
      const U largest = U(largest_distance(kCodeBits[b]));
      U count = 0;
      for (int64_t i = 0; i < n; ++i) count += U(distance[i] + largest) > U(2 * largest);
      outside[b] += count;
    }
  }
}

// ---- codes, packed from the low bits of a byte up -----------------------------------------------

// One byte for each code to `bits` bits, in whole vectors.
inline void pack_codes(const uint8_t* codes, int64_t n, int bits, uint8_t* out) {
  constexpr int m = lanes<uint32_t>;
  using V = Vector<uint32_t, m>;
  // a vector of 32-bit words: four codes of 2 bits each, or two of two codes of 4 bits
  for (int64_t i = 0; i < n; i += 4 * m) {
    const V x = load<V>(codes + i);
    if (bits == 8) {
      store(out + i, x);
    } else if (bits == 4) {
      const V pairs = x | (x >> 4);
      const V both = (pairs & 0xFF) | ((pairs >> 8) & 0xFF00);
      store(out + i / 2, __builtin_convertvector(both, Vector<uint16_t, m>));
    } else {
      const V low = (x | (x >> 6) | (x >> 12) | (x >> 18)) & 0xFF;
      store(out + i / 4, __builtin_convertvector(low, Vector<uint8_t, m>));
    }
  }
}

inline void unpack_codes(const uint8_t* packed, int64_t n, int bits, uint8_t* codes) {
  constexpr int m = lanes<uint32_t>;
  using V = Vector<uint32_t, m>;
  for (int64_t i = 0; i < n; i += 4 * m) {
    V x{};
    if (bits == 8) {
      x = load<V>(packed + i);
    } else if (bits == 4) {
      const V both = __builtin_convertvector(load<Vector<uint16_t, m>>(packed + i / 2), V);
      const V pairs = (both & 0xFF) | ((both & 0xFF00) << 8);
      x = (pairs | (pairs << 4)) & 0x0F0F0F0F;
    } else if (bits == 2) {
      const V low = __builtin_convertvector(load<Vector<uint8_t, m>>(packed + i / 4), V);
      x = (low | (low << 6) | (low << 12) | (low << 18)) & 0x03030303;
    }
    store(codes + i, x);
  }
}

template <class T>
void encode_correction(const void* predicted, const void* exact, int64_t begin, int64_t end,
                       int bits, uint8_t* packed, int32_t* escaped, void* values) {
  using U = BitsOf<T>;
  alignas(64) U distance[kPiece];
  alignas(64) uint8_t codes[kPiece], bytes[kPiece];
  U* escape = static_cast<U*>(values);
  const U largest = U(largest_distance(bits)), top = 2 * largest + 1;
  for (int64_t first = begin; first < end; first += kPiece) {
    const int64_t n = std::min(kPiece, end - first);
    load_distances<T>(predicted, exact, first, n, distance);
    for (int64_t i = 0; i < n; ++i) {
      const U code = distance[i] + largest;
      codes[i] = uint8_t(code < top ? code : top);
    }
    __builtin_memset(codes + n, 0, size_t(kPiece - n));
    const auto list = [&](int64_t i) {
      if (codes[i] != top) return;
      *escaped++ = int32_t(first + i);
      *escape++ = distance[i];
    };
    // top < 256, and rare: whole words without it are passed over
    const uint64_t tops = uint64_t(top) * 0x0101010101010101;
    for (int64_t i = 0; i < n; i += 8) {
      const uint64_t x = load<uint64_t>(codes + i) ^ tops;
      if ((x - 0x0101010101010101) & ~x & 0x8080808080808080)
        for (int64_t j = i; j < std::min(i + 8, n); ++j) list(j);
    }
    if (!bits) continue;
    pack_codes(codes, n, bits, bytes);
    __builtin_memcpy(packed + first * bits / 8, bytes, size_t((n * bits + 7) / 8));
  }
}

template <class T>
void decode_correction(const void* predicted, int64_t begin, int64_t end, int bits,
                       const uint8_t* packed, const int32_t* escaped, const void* values,
                       int64_t escapes, void* out) {
  using U = BitsOf<T>;
  alignas(64) uint8_t codes[kPiece], bytes[kPiece] = {};
  const U* p = static_cast<const U*>(predicted);
  U* to = static_cast<U*>(out);
  const U largest = U(largest_distance(bits));
  for (int64_t first = begin; first < end; first += kPiece) {
    const int64_t n = std::min(kPiece, end - first);
    if (bits) __builtin_memcpy(bytes, packed + first * bits / 8, size_t((n * bits + 7) / 8));
    unpack_codes(bytes, n, bits, codes);
    const U* from = p + first;
    U* __restrict piece = to + first;
    for (int64_t i = 0; i < n; ++i)
      piece[i] = flip_negative(U(predicted_order<T>(from[i]) + codes[i] - largest));
  }
  for (int64_t e = 0; e < escapes; ++e) {
    const int64_t i = escaped[e];
    if (i < begin || i >= end) continue;
    const U distance = static_cast<const U*>(values)[e];
    to[i] = flip_negative(U(predicted_order<T>(p[i]) + distance));
  }
}

// ---- checksum -----------------------------------------------------------------------------------

template <class T>
int64_t checksum(const void* data, int64_t begin, int64_t end) {
  using S = std::make_signed_t<BitsOf<T>>;
  const S* bits = static_cast<const S*>(data);
  uint64_t sum = 0;
  for (int64_t i = begin; i < end; ++i) sum += uint64_t(int64_t(bits[i])) * uint64_t(2 * i + 1);
  return int64_t(sum);
}

}  // namespace fastlora::cpu::FASTLORA_ISA
