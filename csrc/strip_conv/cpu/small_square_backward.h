// The backward direction where there is only a small square kernel, of channels-last images. As in
// small_square.h images are read and written as they lie.
//
// dx and the gradient of the weights meet the same pixels of dy: dy at the distance of a tap from a
// pixel times the tap goes into dx there, times x there into the tap's gradient. So x and dy are
// read once, by what has both sums in registers.
//
// For kernel files only: see common/simd.h for why everything lives in famseg::FAMSEG_ISA.
#pragma once

#include "strip_conv/cpu/kernels.h"
#include "strip_conv/cpu/small_square.h"

namespace famseg::FAMSEG_ISA {

using strip_conv::Gradients;

inline bool is_small_square(const Problem& p, const Gradients& gradients) {
  return is_small_square(p) && gradients.dy_channels_last && p.n * p.h * p.w > 0;
}

// Rows of a piece of work: as in the forward direction, or more, as every piece leaves sums behind.
inline int64_t rows_of_small_square_gradient(const Problem& p) {
  constexpr int64_t pieces = 256;
  return min(max(rows_of_small_square(p), round_up(p.n * p.h, pieces) / pieces), p.h);
}

// For each vector of channels a vector for every tap, reversed, and one for the bias.
template <typename T>
struct SmallSquareSpace {
  T* weights;
  T* row;       // sums of one row of dy
  double* sum;  // of all rows so far
};

template <typename T>
SmallSquareSpace<T> small_square_space(const Problem& p, Arena& arena) {
  const int64_t count = p.c * (p.square.size * p.square.size + 1);
  T* const weights = arena.take<T>(count);
  T* const row = arena.take<T>(count);
  return {weights, row, arena.take<double>(count)};
}

inline int64_t small_square_pieces(const Problem& p) {
  const int64_t rows = rows_of_small_square_gradient(p);
  return p.n * (round_up(p.h, rows) / rows);
}

// What PIXELS neighbouring pixels of x get and give: `dy` is where the first of the reversed taps
// [first, last) of the first of `lines` lines meets the first pixel; weights and sums are of this
// line. `centre` is dy at the first pixel itself.
template <int PIXELS, int TAPS, typename S, typename T>
void gradient_pixels(const S* x, const S* dy, const S* centre, int64_t line, int64_t channels,
                     const T* weight, int64_t lines, int64_t first, int64_t last, T* sum,
                     T* bias_sum, S* dx) {
  constexpr int64_t lanes = kLanes<T>, set = (TAPS * TAPS + 1) * lanes;
  for (int64_t c = 0; c < channels; c += lanes, weight += set, sum += set, bias_sum += set) {
    Vector<T> pixel[PIXELS], gradient[PIXELS] = {}, total = load(bias_sum);
#pragma GCC unroll 8
    for (int q = 0; q < PIXELS; ++q) {
      pixel[q] = load_wide(x + q * channels + c);
      total += load_wide(centre + q * channels + c);
    }
    store(bias_sum, total);
    const S* in = dy + c;
    const T* taps = weight;
    T* to = sum;
    for (int64_t i = 0; i < lines; ++i, in += line, taps += TAPS * lanes, to += TAPS * lanes) {
      if constexpr (PIXELS == 1) {
        for (int64_t t = first; t < last; ++t) {
          const Vector<T> value = load_wide(in + (t - first) * channels);
          gradient[0] += load(taps + t * lanes) * value;
          store(to + t * lanes, load(to + t * lanes) + pixel[0] * value);
        }
      } else {
        Vector<T> products[TAPS];
#pragma GCC unroll 8
        for (int t = 0; t < TAPS; ++t) products[t] = load(to + t * lanes);
#pragma GCC unroll 16
        for (int v = 0; v < PIXELS + TAPS - 1; ++v) {
          const Vector<T> value = load_wide(in + v * channels);
#pragma GCC unroll 8
          for (int t = 0; t < TAPS; ++t) {
            if (v - t < 0 || v - t >= PIXELS) continue;
            gradient[v - t] += load(taps + t * lanes) * value;
            products[t] += pixel[v - t] * value;
          }
        }
#pragma GCC unroll 8
        for (int t = 0; t < TAPS; ++t) store(to + t * lanes, products[t]);
      }
    }
    if (dx == nullptr) continue;
#pragma GCC unroll 8
    for (int q = 0; q < PIXELS; ++q) store_narrow(dx + q * channels + c, gradient[q]);
  }
}

template <int TAPS, typename S, typename T>
void small_square_gradient_rows(const Problem& p, const Gradients& gradients, int64_t n,
                                int64_t begin, int64_t end, const SmallSquareSpace<T>& s) {
  constexpr int64_t lanes = kLanes<T>, reach = TAPS / 2;
  constexpr int pixels = 4;
  const int64_t line = p.w * p.c, count = p.c * (TAPS * TAPS + 1);
  T* const bias_sum = s.row + TAPS * TAPS * lanes;
  for (int64_t i = begin; i < end; ++i) {
    // Lines of the kernel that lie in the image.
    const int64_t first = max(reach - i, 0), lines = min(p.h + reach - i, TAPS) - first;
    const int64_t row = (n * p.h + i) * line;
    const S* x = static_cast<const S*>(p.x) + row;
    const S* centre = static_cast<const S*>(gradients.dy) + row;
    const S* dy = centre + (first - reach) * line;
    S* dx = static_cast<S*>(gradients.dx);
    if (dx != nullptr) dx += row;
    const T* weight = s.weights + first * TAPS * lanes;
    T* const sum = s.row + first * TAPS * lanes;
    for (int64_t k = 0; k < count; k += lanes) store(s.row + k, Vector<T>{});
    for (int64_t j = 0; j < p.w;) {
      const int64_t at = j * p.c;
      S* const out = dx == nullptr ? nullptr : dx + at;
      if (j >= reach && j + pixels + reach <= p.w) {
        gradient_pixels<pixels, TAPS>(x + at, dy + at - reach * p.c, centre + at, line, p.c, weight,
                                      lines, 0, TAPS, sum, bias_sum, out);
        j += pixels;
      } else {
        const int64_t from = max(reach - j, 0), to = min(p.w + reach - j, TAPS);
        gradient_pixels<1, TAPS>(x + at, dy + at + (from - reach) * p.c, centre + at, line, p.c,
                                 weight, lines, from, to, sum, bias_sum, out);
        ++j;
      }
    }
    for (int64_t k = 0; k < count; ++k) s.sum[k] += static_cast<double>(s.row[k]);
  }
}

template <typename S, typename T>
void small_square_gradient_piece(const Problem& p, const Gradients& gradients, int64_t piece,
                                 void* partial, void* scratch) {
  constexpr int64_t lanes = kLanes<T>;
  Arena arena{static_cast<char*>(scratch)};
  const SmallSquareSpace<T> s = small_square_space<T>(p, arena);
  const int64_t size = p.square.size, taps = size * size;
  for (int64_t c = 0; c < p.c; c += lanes) {
    T* to = s.weights + c / lanes * (taps + 1) * lanes;
    load_taps<S>(p.square.weight, {c, lanes}, size, size, Taps<T>{to, size, size});
    for (int64_t t = 0; t < taps / 2; ++t) {
      const Vector<T> early = load(to + t * lanes), late = load(to + (taps - 1 - t) * lanes);
      store(to + t * lanes, late);
      store(to + (taps - 1 - t) * lanes, early);
    }
  }
  const int64_t count = p.c * (taps + 1);
  for (int64_t k = 0; k < count; ++k) s.sum[k] = 0;
  const int64_t rows = rows_of_small_square_gradient(p), pieces = round_up(p.h, rows) / rows;
  const int64_t begin = piece % pieces * rows, end = min(begin + rows, p.h);
  const auto run = size == 1   ? small_square_gradient_rows<1, S, T>
                   : size == 3 ? small_square_gradient_rows<3, S, T>
                   : size == 5 ? small_square_gradient_rows<5, S, T>
                               : small_square_gradient_rows<7, S, T>;
  run(p, gradients, piece / pieces, begin, end, s);
  T* const to = static_cast<T*>(partial);
  for (int64_t k = 0; k < count; ++k) to[k] = static_cast<T>(s.sum[k]);
}

// Adds up the pieces' sums for a vector of channels, in order.
template <typename S, typename T>
void reduce_small_square(const Problem& p, const Gradients& gradients, int64_t group,
                         const void* partials) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t taps = p.square.size * p.square.size, pieces = small_square_pieces(p);
  for (int64_t t = 0; t <= taps; ++t) {
    S* const to = static_cast<S*>(t < taps ? gradients.square.weight : gradients.square.bias);
    if (to == nullptr) continue;
    double total[lanes] = {};
    const T* from = static_cast<const T*>(partials) + (group * (taps + 1) + t) * lanes;
    for (int64_t piece = 0; piece < pieces; ++piece, from += p.c * (taps + 1)) {
      for (int l = 0; l < lanes; ++l) total[l] += static_cast<double>(from[l]);
    }
    for (int l = 0; l < lanes; ++l) {
      const int64_t channel = group * lanes + l;
      narrow(t < taps ? to[channel * taps + taps - 1 - t] : to[channel], static_cast<T>(total[l]));
    }
  }
}

}  // namespace famseg::FAMSEG_ISA
