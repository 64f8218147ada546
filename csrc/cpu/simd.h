// Vectors as wide as the instruction set this file is compiled for: FASTLORA_VECTOR_BYTES.
//
// GCC's and Clang's vector types carry the arithmetic; intrinsics only what these cannot say.
#pragma once

namespace fastlora::cpu::FASTLORA_ISA {

template <class T, int Lanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * Lanes)));
};
template <class T, int Lanes>
using Vector = typename VectorOf<T, Lanes>::type;

template <class T>
constexpr int lanes = FASTLORA_VECTOR_BYTES / int(sizeof(T));

template <class V, class T>
inline V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
inline void store(T* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class V, class T>
inline V broadcast(T x) {
  // minus zero leaves every x as it is, so that a load can broadcast; plus zero would not
  return x - V{};
}

template <int... I>
using Indices = std::integer_sequence<int, I...>;

// the elements of a, then b, at these places
template <class V, int... I>
inline V shuffle(V a, V b, Indices<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  using Lane = std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>;
  return __builtin_shuffle(a, b, Vector<Lane, sizeof...(I)>{I...});
#endif
}

// Of rows a and b of a square, `Step` apart, that which takes a's place (or b's) when the blocks of
// `Step` columns beside its diagonal change places.
template <int Step, bool Second, class V, int... I>
inline V exchanged(V a, V b, Indices<I...>) {
  constexpr int n = sizeof...(I);
  return shuffle(
      a, b, Indices<(Second ? (I & Step ? n + I : I + Step) : (I & Step ? n + I - Step : I))...>{});
}

// a * b + c, rounded once where the instruction set can; explicit, because the build forbids the
// compiler to contract (merging depends on that)
template <class V>
inline V fma(V a, V b, V c) {
  return a * b + c;
}

#if defined(__aarch64__)
inline Vector<float, 4> fma(Vector<float, 4> a, Vector<float, 4> b, Vector<float, 4> c) {
  return vfmaq_f32(c, a, b);
}
inline Vector<double, 2> fma(Vector<double, 2> a, Vector<double, 2> b, Vector<double, 2> c) {
  return vfmaq_f64(c, a, b);
}
#endif
#if defined(FASTLORA_X86_FMA)
inline Vector<float, 4> fma(Vector<float, 4> a, Vector<float, 4> b, Vector<float, 4> c) {
  return _mm_fmadd_ps(a, b, c);
}
inline Vector<double, 2> fma(Vector<double, 2> a, Vector<double, 2> b, Vector<double, 2> c) {
  return _mm_fmadd_pd(a, b, c);
}
inline Vector<float, 8> fma(Vector<float, 8> a, Vector<float, 8> b, Vector<float, 8> c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline Vector<double, 4> fma(Vector<double, 4> a, Vector<double, 4> b, Vector<double, 4> c) {
  return _mm256_fmadd_pd(a, b, c);
}
#endif
#if defined(FASTLORA_X86_AVX512)
inline Vector<float, 16> fma(Vector<float, 16> a, Vector<float, 16> b, Vector<float, 16> c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline Vector<double, 8> fma(Vector<double, 8> a, Vector<double, 8> b, Vector<double, 8> c) {
  return _mm512_fmadd_pd(a, b, c);
}
#endif

// the 64-bit products of the low halves of 64-bit lanes
template <class V>
inline V multiply_low_halves(V a, V b) {
  constexpr uint64_t low = 0xFFFFFFFF;
  return (a & low) * (b & low);
}
#if defined(__aarch64__)
inline Vector<uint64_t, 2> multiply_low_halves(Vector<uint64_t, 2> a, Vector<uint64_t, 2> b) {
  return vmull_u32(vmovn_u64(a), vmovn_u64(b));
}
#elif defined(__x86_64__)
inline Vector<uint64_t, 2> multiply_low_halves(Vector<uint64_t, 2> a, Vector<uint64_t, 2> b) {
  return Vector<uint64_t, 2>(_mm_mul_epu32(__m128i(a), __m128i(b)));
}
#endif
#if defined(FASTLORA_X86_FMA)
inline Vector<uint64_t, 4> multiply_low_halves(Vector<uint64_t, 4> a, Vector<uint64_t, 4> b) {
  return Vector<uint64_t, 4>(_mm256_mul_epu32(__m256i(a), __m256i(b)));
}
#endif
#if defined(FASTLORA_X86_AVX512)
inline Vector<uint64_t, 8> multiply_low_halves(Vector<uint64_t, 8> a, Vector<uint64_t, 8> b) {
  return Vector<uint64_t, 8>(_mm512_mul_epu32(__m512i(a), __m512i(b)));
}
#endif

}  // namespace fastlora::cpu::FASTLORA_ISA
