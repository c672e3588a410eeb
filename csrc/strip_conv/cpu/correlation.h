// Correlation along one direction, which both directions are made of: one FMA for each sum and tap,
// two a cycle at best. What the loops below owe to that:
//
//  * A few taps stay in registers beside as many sums as half the registers hold, and every loaded
//    vector serves all of them: 16 sums and 11 taps make 176 FMAs of 53 loads.
//  * A function holds one number of taps: with several in one loop the compiler spills sums between
//    them. More taps go through memory in between, 21 as 11 + 10.
//  * Steps between sums are known to the compiler; otherwise every one needs an address of its own.
//
// Beside two 512-bit FMAs a cycle a 512-bit store costs half a cycle and a load a sixth (measured
// on Sapphire Rapids in the L1 cache): 16 sums of 7 taps take 72 cycles, 56 of them for FMAs.
//
// For kernel files only: see common/simd.h for why everything lives in famseg::FAMSEG_ISA.
#pragma once

#include "common/scratch.h"
#include "common/simd.h"

namespace famseg::FAMSEG_ISA {

constexpr int kSums = kVectorRegisters / 2;
constexpr int kMostTaps = kVectorRegisters >= 32 ? 11 : 6;

// What is to be brought to the L2 cache: `count` addresses for each line, in bytes.
struct Fetch {
  const char* from;
  int64_t step, line, count;
};

// out[q] = start[q] + sum over taps t of weight[t] in[q + t], for all `lines`. A square kernel sums
// over kernel_lines lines of `in`, each with taps of its own. All steps in elements; those of `in`
// and `out` along q are the same.
template <typename T>
struct Correlation {
  const T* in;
  int64_t in_line;
  const T* weight;  // (kernel_lines, taps)
  int64_t taps;
  int64_t kernel_lines;
  const T* start;
  int64_t start_step, start_line;
  T* out;
  int64_t out_line;
  int64_t lines;
  Fetch fetch[2];  // meanwhile, by the first piece of the kernel
};

// sum[q] += taps . in[q ...], STEP vectors apart. Each is loaded once.
template <int STEP, int TAPS, int N, typename T>
[[gnu::always_inline]] inline void add_taps(Vector<T> (&sum)[N], const T* in, const T* weight) {
  Vector<T> tap[TAPS];
#pragma GCC unroll 16
  for (int t = 0; t < TAPS; ++t) tap[t] = load(weight + t * kLanes<T>);
#pragma GCC unroll 32
  for (int i = 0; i < N + TAPS - 1; ++i) {
    const Vector<T> value = load(in + i * STEP * kLanes<T>);
#pragma GCC unroll 16
    for (int t = 0; t < TAPS; ++t) {
      if (i - t >= 0 && i - t < N) sum[i - t] += tap[t] * value;
    }
  }
}

// N sums of every line, from sum `first` on, of TAPS taps; `weight_line` from one line of the
// kernel to the next.
template <int STEP, bool SQUARE, int TAPS, int N, typename T>
[[gnu::noinline]] void correlate_lines(const Correlation<T>& c, int64_t weight_line,
                                       int64_t first) {
  constexpr int64_t step = STEP * kLanes<T>;
  // Not a copy of c: loads of several members at once would wait for their stores.
  const T *in_line = c.in + first * step, *const weights = c.weight;
  const T* start = c.start + first * c.start_step;
  T* out = c.out + first * step;
  const int64_t kernel_lines = c.kernel_lines, from_in = c.in_line, from_out = c.out_line;
  const int64_t start_step = c.start_step, from_start = c.start_line;
  Fetch fetches[2] = {c.fetch[0], c.fetch[1]};
  for (int64_t lines = c.lines; lines > 0; --lines) {
    for (Fetch& fetch : fetches) {
      const char* address = fetch.from;
      for (int64_t k = 0; k < fetch.count; ++k, address += fetch.step) {
        __builtin_prefetch(address, 0, 2);
      }
      fetch.from += fetch.line;
    }
    Vector<T> sum[N];
#pragma GCC unroll 16
    for (int q = 0; q < N; ++q) sum[q] = load(start + q * start_step);
    if constexpr (SQUARE) {
      const T *in = in_line, *weight = weights;
      for (int64_t k = 0; k < kernel_lines; ++k, in += from_in, weight += weight_line) {
        add_taps<STEP, TAPS>(sum, in, weight);
      }
    } else {
      add_taps<STEP, TAPS>(sum, in_line, weights);
    }
#pragma GCC unroll 16
    for (int q = 0; q < N; ++q) store(out + q * step, sum[q]);
    in_line += from_in;
    start += from_start;
    out += from_out;
  }
}

template <int STEP, bool SQUARE, int TAPS, int N = kSums, typename T>
[[gnu::always_inline]] inline void correlate_runs(const Correlation<T>& c, int64_t weight_line,
                                                  int64_t first, int64_t length) {
  for (; first + N <= length; first += N) {
    correlate_lines<STEP, SQUARE, TAPS, N>(c, weight_line, first);
  }
  if constexpr (N > 1) correlate_runs<STEP, SQUARE, TAPS, N / 2>(c, weight_line, first, length);
}

template <int STEP, bool SQUARE, int TAPS = kMostTaps, typename T>
void correlate_piece(const Correlation<T>& c, int64_t weight_line, int64_t taps, int64_t length) {
  if constexpr (TAPS > 1) {
    if (taps < TAPS) {
      return correlate_piece<STEP, SQUARE, TAPS - 1>(c, weight_line, taps, length);
    }
  }
  correlate_runs<STEP, SQUARE, TAPS>(c, weight_line, 0, length);
}

// `length` sums of each line.
template <int STEP, bool SQUARE = false, typename T>
[[gnu::always_inline]] inline void correlate(Correlation<T> c, int64_t length) {
  const int64_t weight_line = c.taps * kLanes<T>;
  int64_t left = c.taps;
  for (int64_t pieces = (left + kMostTaps - 1) / kMostTaps; pieces > 0; --pieces) {
    const int64_t taps = (left + pieces - 1) / pieces;
    correlate_piece<STEP, SQUARE>(c, weight_line, taps, length);
    c.in += taps * STEP * kLanes<T>;
    c.weight += taps * kLanes<T>;
    c.start = c.out;
    c.start_step = STEP * kLanes<T>;
    c.start_line = c.out_line;
    c.fetch[0].count = c.fetch[1].count = 0;
    left -= taps;
  }
}

}  // namespace famseg::FAMSEG_ISA
