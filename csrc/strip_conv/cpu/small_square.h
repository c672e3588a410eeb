// The forward direction where there is only a small square kernel, of a channels-last image.
//
// Memory binds it, so that the image is read and written as it lies: row by row, some pixels of all
// channels after the other. Nothing is copied; a line of x is found in the caches by the rows
// after. Only the weights of all channels must fit there too.
//
// For kernel files only: see common/simd.h for why everything lives in famseg::FAMSEG_ISA.
#pragma once

#include "common/scratch.h"
#include "common/simd.h"
#include "strip_conv/cpu/layout.h"

namespace famseg::FAMSEG_ISA {

constexpr int64_t kMostSmallSquare = 7;         // size of a kernel that memory binds
constexpr int64_t kSmallSquareBytes = 1 << 20;  // of all weights: half of an L2 cache of 2 MB
constexpr int64_t kLeastPixels = 512;           // that share the loading of the weights

inline bool is_small_square(const Problem& p) {
  if (!p.channels_last || p.branch_count > 0 || p.square.weight == nullptr) return false;
  const int64_t lanes =
      by_dtype(p.dtype, [](auto element) -> int64_t { return kLanes<Compute<decltype(element)>>; });
  const int64_t taps = p.square.size * p.square.size;
  return p.square.size % 2 == 1 && p.square.size <= kMostSmallSquare && p.c % lanes == 0 &&
         p.c / lanes * (taps + 1) * kVectorBytes <= kSmallSquareBytes;
}

// Rows of a piece of work.
inline int64_t rows_of_small_square(const Problem& p) {
  return min(round_up(kLeastPixels, p.w) / p.w, p.h);
}

// For each vector of channels the taps (TAPS, TAPS), then the bias.
template <typename T>
T* small_square_weights(const Problem& p, Arena& arena) {
  return arena.take<T>(p.c * (p.square.size * p.square.size + 1));
}

// Sums of PIXELS neighbouring pixels over `lines` lines of the kernel and its taps [first, last).
// `x` is where the first of these taps meets the first pixel; `weight` its line of taps.
template <int PIXELS, int TAPS, typename S, typename T>
void sum_pixels(const S* x, int64_t line, int64_t channels, const T* weight, int64_t lines,
                int64_t first, int64_t last, const T* bias, S* y) {
  constexpr int64_t lanes = kLanes<T>, set = (TAPS * TAPS + 1) * lanes;
  for (int64_t c = 0; c < channels; c += lanes, weight += set, bias += set) {
    Vector<T> sum[PIXELS];
#pragma GCC unroll 8
    for (int q = 0; q < PIXELS; ++q) sum[q] = load(bias);
    const S* in = x + c;
    const T* taps = weight;
    for (int64_t i = 0; i < lines; ++i, in += line, taps += TAPS * lanes) {
      if constexpr (PIXELS == 1) {
        for (int64_t t = first; t < last; ++t) {
          sum[0] += load(taps + t * lanes) * load_wide(in + (t - first) * channels);
        }
      } else {
        Vector<T> tap[TAPS];
#pragma GCC unroll 8
        for (int t = 0; t < TAPS; ++t) tap[t] = load(taps + t * lanes);
#pragma GCC unroll 16
        for (int v = 0; v < PIXELS + TAPS - 1; ++v) {
          const Vector<T> value = load_wide(in + v * channels);
#pragma GCC unroll 8
          for (int t = 0; t < TAPS; ++t) {
            if (v - t >= 0 && v - t < PIXELS) sum[v - t] += tap[t] * value;
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int q = 0; q < PIXELS; ++q) store_narrow(y + q * channels + c, sum[q]);
  }
}

template <int TAPS, typename S, typename T>
void small_square_rows(const Problem& p, S* y, int64_t n, int64_t begin, int64_t end,
                       const T* weights) {
  constexpr int64_t lanes = kLanes<T>, reach = TAPS / 2;
  constexpr int pixels = 4;
  const int64_t line = p.w * p.c;
  const T* bias = weights + TAPS * TAPS * lanes;
  for (int64_t i = begin; i < end; ++i) {
    // Lines of the kernel that lie in the image.
    const int64_t first = max(reach - i, 0), last = min(p.h + reach - i, TAPS);
    const S* x = static_cast<const S*>(p.x) + (n * p.h + i - reach + first) * line;
    S* out = y + (n * p.h + i) * line;
    const T* weight = weights + first * TAPS * lanes;
    int64_t j = 0;
    while (j < p.w) {
      if (j >= reach && j + pixels + reach <= p.w) {
        sum_pixels<pixels, TAPS>(x + (j - reach) * p.c, line, p.c, weight, last - first, 0, TAPS,
                                 bias, out + j * p.c);
        j += pixels;
      } else {
        const int64_t from = max(reach - j, 0), to = min(p.w + reach - j, TAPS);
        sum_pixels<1, TAPS>(x + (j - reach + from) * p.c, line, p.c, weight, last - first, from, to,
                            bias, out + j * p.c);
        ++j;
      }
    }
  }
}

template <typename S, typename T>
void small_square_block(const Problem& p, void* y, int64_t block, void* scratch) {
  constexpr int64_t lanes = kLanes<T>;
  Arena arena{static_cast<char*>(scratch)};
  T* const weights = small_square_weights<T>(p, arena);
  const int64_t size = p.square.size, set = (size * size + 1) * lanes;
  for (int64_t c = 0; c < p.c; c += lanes) {
    T* to = weights + c / lanes * set;
    load_taps<S>(p.square.weight, {c, lanes}, size, size, Taps<T>{to, size, size});
    store(to + size * size * lanes, bias_of<S, T>(p.square.bias, {c, lanes}));
  }
  const int64_t rows = rows_of_small_square(p), pieces = round_up(p.h, rows) / rows;
  const int64_t begin = block % pieces * rows, end = min(begin + rows, p.h);
  const auto run = size == 1   ? small_square_rows<1, S, T>
                   : size == 3 ? small_square_rows<3, S, T>
                   : size == 5 ? small_square_rows<5, S, T>
                               : small_square_rows<7, S, T>;
  run(p, static_cast<S*>(y), block / pieces, begin, end, weights);
}

}  // namespace famseg::FAMSEG_ISA
