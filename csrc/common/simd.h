// Vectors of the width that this translation unit's instruction set has, on the vector extensions
// of GCC and clang: arithmetic is written with operators, and a * b + c becomes one FMA where the
// instruction set has it (-ffp-contract=fast).
//
// For kernel files only, which CMake compiles once per instruction set with FAMSEG_ISA naming it.
// The linker keeps one copy of each inline function or template instance and may take it from any
// object file; were an AVX-512 copy to win, a plain CPU would die of an illegal instruction. So
// everything here and in the kernel files lives in famseg::FAMSEG_ISA, and kernel files use no
// templates or inline functions of the standard library.
#pragma once

#include <cstdint>

#ifndef FAMSEG_ISA
#error "simd.h is for kernel files, which CMake compiles with FAMSEG_ISA=<instruction set>"
#endif

namespace famseg::FAMSEG_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  // What an unaligned address may be dereferenced as.
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};

template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
[[gnu::always_inline]] inline Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}

template <typename T>
[[gnu::always_inline]] inline void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}

template <typename T>
[[gnu::always_inline]] inline Vector<T> broadcast(T value) {
  return value - Vector<T>{};  // scalar - vector broadcasts; x - 0 is x for every x, -0 included
}

// Numbers that exponential() needs for each type.
template <typename T>
struct ExponentialOf;

template <>
struct ExponentialOf<float> {
  using Integer = int32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr Integer bias = 127;
  static constexpr float low = -86.5f, high = 89.0f;
  // ln 2 in two parts; n times the first is exact.
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  // (e^r - 1 - r) / r^2 on |r| <= ln 2 / 2, highest power first (Cephes).
  static constexpr float polynomial[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                         4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};

template <>
struct ExponentialOf<double> {
  using Integer = int64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr Integer bias = 1023;
  static constexpr double low = -708.0, high = 710.0;
  static constexpr double ln2_high = 6.93147180369123816490e-1;
  static constexpr double ln2_low = 1.90821492927058770002e-10;
  // 1 / 13!, 1 / 12! ... 1 / 2!: the next term is below 2^-58.
  static constexpr double polynomial[] = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0,
                                          1.0 / 3628800.0,    1.0 / 362880.0,    1.0 / 40320.0,
                                          1.0 / 5040.0,       1.0 / 720.0,       1.0 / 120.0,
                                          1.0 / 24.0,         1.0 / 6.0,         1.0 / 2.0};
};

// e^x is mantissa * 2^exponent, the exponent in the low bits of a larger integer.
template <typename T>
struct Exponential {
  Vector<T> mantissa;
  Vector<typename ExponentialOf<T>::Integer> exponent;
};

template <typename T>
[[gnu::always_inline]] inline Exponential<T> exponential_parts(Vector<T> x) {
  using Of = ExponentialOf<T>;
  using Integer = typename Of::Integer;
  constexpr T log2_e = T(1.44269504088896340736);
  // Adding it rounds to an integer, which then is the low bits of the sum.
  constexpr T magic = T(3) * static_cast<T>(Integer(1) << (Of::mantissa_bits - 1));
  const Vector<T> shifted = x * log2_e + magic;
  const Vector<T> n = shifted - magic;
  const Vector<T> r = x - n * Of::ln2_high - n * Of::ln2_low;
  Vector<T> sum = broadcast(Of::polynomial[0]);
#pragma GCC unroll 16
  for (int i = 1; i < static_cast<int>(sizeof Of::polynomial / sizeof(T)); ++i) {
    sum = sum * r + Of::polynomial[i];
  }
  return {sum * r * r + r + T(1), reinterpret_cast<Vector<Integer>>(shifted)};
}

// 2^exponent, with the bias of the type. The shift drops the bits above the exponent.
template <typename T>
[[gnu::always_inline]] inline Vector<T> power_of_two(
    Vector<typename ExponentialOf<T>::Integer> exponent, typename ExponentialOf<T>::Integer bias) {
  return reinterpret_cast<Vector<T>>((exponent + bias) << ExponentialOf<T>::mantissa_bits);
}

// e^x to about an ulp; 0 where that would be below 4 times the smallest normal number, infinity
// where it overflows, NaN for NaN.
template <typename T>
[[gnu::always_inline]] inline Vector<T> exponential(Vector<T> x) {
  using Of = ExponentialOf<T>;
  const Vector<T> top = broadcast(Of::high), bottom = broadcast(Of::low);
  const Vector<T> bounded = x > top ? top : (x < bottom ? bottom : x);
  const Exponential<T> parts = exponential_parts<T>(bounded);
  // 2^n as 2^(n - 1) * 2: n may be one more than the exponent of the largest number.
  const Vector<T> power = power_of_two<T>(parts.exponent, Of::bias - 1);
  return x < bottom ? Vector<T>{} : parts.mantissa * power * T(2);
}

}  // namespace famseg::FAMSEG_ISA
