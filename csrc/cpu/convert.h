// Rows of any dtype and stride to and from rows of the dtype sums are kept in.
#pragma once

#include "dropout.h"
#include "simd.h"

namespace fastlora::cpu::FASTLORA_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline float widen(bf16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
inline float widen(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7FFF;
  if (rest >= 0x7C00) return __builtin_bit_cast(float, sign | 0x7F800000 | (rest << 13));
  if (rest >= 0x0400) return __builtin_bit_cast(float, sign | ((rest << 13) + (112u << 23)));
  const float tiny = float(rest) * 0x1p-24f;
  return sign ? -tiny : tiny;
}
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

// to nearest, ties to even; NaN stays NaN
template <class T>
inline T narrow(Wide<T> x) {
  if constexpr (std::is_same_v<T, bf16>) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    if (x != x) return {uint16_t((bits >> 16) | 0x40)};
    return {uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
  } else if constexpr (std::is_same_v<T, f16>) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x), rest = bits & 0x7FFFFFFF;
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
    if (rest > 0x7F800000) return {uint16_t(sign | 0x7E00 | ((rest >> 13) & 0x3FF))};
    if (rest >= 0x477FF000) return {uint16_t(sign | 0x7C00)};
    if (rest < 0x38800000) {
      // a multiple of 2^-24: adding 0.5 puts its last bit where float's own rounding cuts
      const float shifted = __builtin_bit_cast(float, rest) + 0.5f;
      return {uint16_t(sign | (__builtin_bit_cast(uint32_t, shifted) - 0x3F000000))};
    }
    return {uint16_t(sign | ((rest - (112u << 23) + 0xFFF + ((rest >> 13) & 1)) >> 13))};
  } else {
    return x;
  }
}

template <class V>
inline V load_wide(const float* p) {
  return load<V>(p);
}
template <class V>
inline V load_wide(const double* p) {
  return load<V>(p);
}
template <class V>
inline V load_wide(const bf16* p) {
  constexpr int n = sizeof(V) / sizeof(float);
  const auto bits = load<Vector<uint16_t, n>>(p);
  return V(__builtin_convertvector(bits, Vector<uint32_t, n>) << 16);
}
template <class V>
inline V load_wide(const f16* p) {
#if defined(FASTLORA_X86_AVX512)
  if constexpr (sizeof(V) == 64) return V(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
#endif
#if defined(FASTLORA_X86_FMA)
  if constexpr (sizeof(V) == 32) return V(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
#endif
  V v;
  for (unsigned i = 0; i < sizeof(V) / sizeof(float); ++i) v[i] = widen(p[i]);
  return v;
}

template <class V>
inline void store_narrow(float* p, V v) {
  store(p, v);
}
template <class V>
inline void store_narrow(double* p, V v) {
  store(p, v);
}
template <class V>
inline void store_narrow(bf16* p, V v) {
  constexpr int n = sizeof(V) / sizeof(float);
  using Bits = Vector<uint32_t, n>;
  const Bits bits = Bits(v);
  const Bits rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  const Bits is_nan = Bits(v != v);
  const Bits out = ((rounded & ~is_nan) | ((bits | 0x400000) & is_nan)) >> 16;
  store(p, __builtin_convertvector(out, Vector<uint16_t, n>));
}
template <class V>
inline void store_narrow(f16* p, V v) {
#if defined(FASTLORA_X86_AVX512)
  if constexpr (sizeof(V) == 64)
    return _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(FASTLORA_X86_FMA)
  if constexpr (sizeof(V) == 32)
    return _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (unsigned i = 0; i < sizeof(V) / sizeof(float); ++i) p[i] = narrow<f16>(v[i]);
}

// Elements [column, column + width) of a row, from column on: masked, widened, and padded with
// zeros to a whole number of vectors.
template <class T>
inline void load_row(const Matrix& X, int64_t row, int64_t column, int64_t width,
                     const uint8_t* mask, Wide<T>* out) {
  using V = Vector<Wide<T>, lanes<Wide<T>>>;
  constexpr int n = lanes<Wide<T>>;
  const T* p = static_cast<const T*>(X.data) + row * X.row_stride + column * X.col_stride;
  int64_t k = 0;
  if (X.col_stride == 1) {
    for (; k + n <= width; k += n) {
      const V x = load_wide<V>(p + k);
      store(out + k, mask ? keep(x, mask, column + k) : x);
    }
  }
  for (; k < width; k += n) {
    V x{};
    for (int64_t i = 0; i < n && k + i < width; ++i) x[i] = widen(p[(k + i) * X.col_stride]);
    store(out + k, mask ? keep(x, mask, column + k) : x);
  }
}

// The opposite: masked, added to what is there where `add` is set, and rounded to nearest, ties to
// even.
template <class T>
inline void store_row(const Wide<T>* values, int64_t width, const uint8_t* mask, const Matrix& Y,
                      int64_t row, int64_t column, bool add = false) {
  using V = Vector<Wide<T>, lanes<Wide<T>>>;
  constexpr int n = lanes<Wide<T>>;
  T* p = static_cast<T*>(Y.data) + row * Y.row_stride + column * Y.col_stride;
  for (int64_t k = 0; k < width; k += n) {
    const V x = load<V>(values + k), kept = mask ? keep(x, mask, column + k) : x;
    if (Y.col_stride == 1 && k + n <= width)
      store_narrow(p + k, add ? load_wide<V>(p + k) + kept : kept);
    else
      for (int64_t i = 0; i < n && k + i < width; ++i) {
        T& y = p[(k + i) * Y.col_stride];
        y = narrow<T>(add ? widen(y) + kept[i] : kept[i]);
      }
  }
}

}  // namespace fastlora::cpu::FASTLORA_ISA
