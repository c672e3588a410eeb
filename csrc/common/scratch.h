// What the kernels of every operation need around their loops: sizes, pieces of scratch memory, and
// the way from an element type's name to the type.
//
// For kernel files only: see simd.h for why everything lives in famseg::FAMSEG_ISA.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/half.h"
#include "common/simd.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace famseg::FAMSEG_ISA {

constexpr int64_t kAlignment = 64;

constexpr int64_t round_up(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit * unit;
}
// Not those of the standard library: see simd.h.
constexpr int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr int64_t max(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// Hands out pieces of a thread's scratch memory; without a base it only counts the bytes and the
// pieces are null.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    char* piece = base == nullptr ? nullptr : base + used;
    used += round_up(bytes, kAlignment);
#if defined(__SANITIZE_ADDRESS__)
    // All pieces are one allocation: a guarded gap shows a step from one into the next. Gaps of the
    // block before, which may have been laid out otherwise, lie elsewhere.
    if (base != nullptr) {
      __asan_unpoison_memory_region(piece, bytes);
      __asan_poison_memory_region(piece + bytes, base + used + kAlignment - (piece + bytes));
    }
    used += kAlignment;
#endif
    return reinterpret_cast<T*>(piece);
  }
};

// Calls f with a value of the element type in memory.
template <typename F>
auto by_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float64:
      return f(double());
    case Dtype::bfloat16:
      return f(Bfloat16());
    case Dtype::float16:
      return f(Float16());
    case Dtype::float32:
      break;
  }
  return f(float());
}

// What arithmetic on elements S is done in.
template <typename S>
using Compute = decltype(widen(S()));

}  // namespace famseg::FAMSEG_ISA
