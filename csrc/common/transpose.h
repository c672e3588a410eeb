// Square blocks of one vector by one vector, turned over in registers.
//
// For kernel files only: see simd.h.
#pragma once

#include "common/simd.h"

namespace famseg::FAMSEG_ISA {

template <int... I>
struct Indices {};
template <int N, int... I>
struct CountTo : CountTo<N - 1, N - 1, I...> {};
template <int... I>
struct CountTo<0, I...> {
  using type = Indices<I...>;
};

// Swaps the odd blocks of STEP lanes of `a` with the even ones of `b`.
template <int STEP, typename T, int... I>
[[gnu::always_inline]] inline void swap_blocks(Vector<T>& a, Vector<T>& b, Indices<I...>) {
  constexpr int lanes = kLanes<T>;
  const Vector<T> first = __builtin_shufflevector(a, b, ((I & STEP) ? lanes + I - STEP : I)...);
  b = __builtin_shufflevector(a, b, ((I & STEP) ? lanes + I : I + STEP)...);
  a = first;
}

template <int STEP, typename T>
[[gnu::always_inline]] inline void transpose_from(Vector<T> (&v)[kLanes<T>]) {
  if constexpr (STEP < kLanes<T>) {
#pragma GCC unroll 16
    for (int r = 0; r < kLanes<T>; ++r) {
      if ((r & STEP) == 0) {
        swap_blocks<STEP, T>(v[r], v[r + STEP], typename CountTo<kLanes<T>>::type());
      }
    }
    transpose_from<2 * STEP, T>(v);
  }
}

}  // namespace famseg::FAMSEG_ISA
