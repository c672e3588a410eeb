// Sums of products along one direction, which the gradients of weights are made of: the taps are
// the sums here. As in correlation.h every loaded vector serves all sums that registers have room
// for.
//
// For kernel files only: see common/simd.h for why everything lives in famseg::FAMSEG_ISA. Local to
// the one file that includes it, so that GCC may pass the members of Products in registers: behind
// hold_loads it would read them from memory again and again.
#pragma once

#include "common/scratch.h"
#include "common/simd.h"

namespace famseg::FAMSEG_ISA {
namespace {

// Sums of a weight's gradient in registers beside what they are made from.
constexpr int kMostSums = kVectorRegisters >= 32 ? 11 : 6;

// Keeps loads behind it. Left to itself, the compiler holds what two pieces of a kernel both read
// in more registers than there are.
[[gnu::always_inline]] inline void hold_loads() {
  asm volatile("" ::: "memory");
}

// out[t] += sum over all lines and q < length of gradient[q] in[q + t]; for a square kernel with
// further lines of `in`, each into sums of its own. All steps in elements.
template <typename T>
struct Products {
  const T* gradient;
  int64_t gradient_line;
  const T* in;
  int64_t in_line;
  double* out;
  int64_t out_step, out_line;
  int64_t taps, length, lines;
};

template <typename T>
[[gnu::always_inline]] inline void add_to_double(Vector<T> sum, double* out) {
  T lanes[kLanes<T>];
  store(lanes, sum);
  for (int l = 0; l < kLanes<T>; ++l) out[l] += static_cast<double>(lanes[l]);
}

// Sums run in T over one call, some hundred products, and then move on in double.
template <int STEP, int LINES, int TAPS, typename T>
[[gnu::noinline]] void multiply_lines(const Products<T>& p) {
  constexpr int held = kVectorRegisters - 2 - LINES * TAPS >= 8 ? 8 : 4;
  constexpr int64_t step = STEP * kLanes<T>;
  Vector<T> sum[LINES][TAPS] = {};
  const T *gradient_line = p.gradient, *in_line = p.in;
  for (int64_t line = 0; line < p.lines; ++line) {
    const T *from = gradient_line, *in = in_line;
    int64_t q = 0;
    for (; q + held <= p.length; q += held) {
      Vector<T> gradient[held];
#pragma GCC unroll 8
      for (int h = 0; h < held; ++h) gradient[h] = load(from + h * step);
#pragma GCC unroll 8
      for (int k = 0; k < LINES; ++k) {
        const T* at = in + k * p.in_line;
#pragma GCC unroll 32
        for (int i = 0; i < held + TAPS - 1; ++i) {
          hold_loads();
          const Vector<T> value = load(at + i * step);
#pragma GCC unroll 8
          for (int h = 0; h < held; ++h) {
            if (i - h >= 0 && i - h < TAPS) sum[k][i - h] += gradient[h] * value;
          }
        }
      }
      from += held * step;
      in += held * step;
    }
    for (; q < p.length; ++q) {
      const Vector<T> gradient = load(from);
#pragma GCC unroll 8
      for (int k = 0; k < LINES; ++k) {
#pragma GCC unroll 16
        for (int t = 0; t < TAPS; ++t) {
          sum[k][t] += gradient * load(in + k * p.in_line + t * step);
        }
      }
      from += step;
      in += step;
    }
    gradient_line += p.gradient_line;
    in_line += p.in_line;
  }
#pragma GCC unroll 8
  for (int k = 0; k < LINES; ++k) {
#pragma GCC unroll 16
    for (int t = 0; t < TAPS; ++t) {
      add_to_double<T>(sum[k][t], p.out + k * p.out_line + t * p.out_step);
    }
  }
}

template <int STEP, int TAPS = kMostSums, typename T>
void multiply_piece(const Products<T>& p, int64_t taps) {
  if constexpr (TAPS > 1) {
    if (taps < TAPS) return multiply_piece<STEP, TAPS - 1>(p, taps);
  }
  multiply_lines<STEP, 1, TAPS>(p);
}

template <int STEP, typename T>
void multiply(Products<T> p) {
  const int64_t pieces = (p.taps + kMostSums - 1) / kMostSums;
  int64_t done = 0;
  for (int64_t left = pieces; left > 0; --left) {
    const int64_t taps = (p.taps - done + left - 1) / left;
    multiply_piece<STEP>(p, taps);
    p.in += taps * STEP * kLanes<T>;
    p.out += taps * p.out_step;
    done += taps;
  }
}

// Of a square kernel of TAPS x TAPS, as many lines at once as there are registers for: fewer sums
// than 8 wait for themselves.
template <int TAPS, typename T>
int64_t multiply_squares(Products<T>& p, int64_t kernel_lines) {
  constexpr int room = kVectorRegisters >= 32 ? 25 : 10;
  constexpr int lines = room / TAPS < TAPS ? room / TAPS : TAPS;
  for (; kernel_lines >= lines; kernel_lines -= lines) {
    multiply_lines<1, lines, TAPS>(p);
    p.in += lines * p.in_line;
    p.out += lines * p.out_line;
  }
  return kernel_lines;
}

template <typename T>
void multiply_square(Products<T> p, int64_t kernel_lines) {
  if (p.taps == 3) kernel_lines = multiply_squares<3>(p, kernel_lines);
  if (p.taps == 5) kernel_lines = multiply_squares<5>(p, kernel_lines);
  if (p.taps == 7) kernel_lines = multiply_squares<7>(p, kernel_lines);
  for (; kernel_lines > 0; --kernel_lines) {
    multiply<1>(p);
    p.in += p.in_line;
    p.out += p.out_line;
  }
}

// out += sum over all lines and q < length of in[q].
template <typename T>
void add_up(const T* in, int64_t step, int64_t line, int64_t length, int64_t lines, double* out) {
  Vector<T> sum[4] = {};
  for (int64_t i = 0; i < lines; ++i, in += line) {
    int64_t q = 0;
    for (; q + 4 <= length; q += 4) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sum[k] += load(in + (q + k) * step);
    }
    for (; q < length; ++q) sum[0] += load(in + q * step);
  }
  add_to_double<T>((sum[0] + sum[1]) + (sum[2] + sum[3]), out);
}

}  // namespace
}  // namespace famseg::FAMSEG_ISA
