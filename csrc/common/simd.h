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

}  // namespace famseg::FAMSEG_ISA
