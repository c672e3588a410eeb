// Where the tokens of a chunk are, and the way of their rows from tensors to small matrices and
// back. For kernel files only, like simd.h.
#pragma once

#include "common/half.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "ssd_scan/cpu/kernels.h"

namespace famseg::FAMSEG_ISA {

using ssd_scan::Block;
using ssd_scan::Problem;

// ---- places -------------------------------------------------------------------------------------

// Token t is pixel t / inner * outer_step + t % inner * inner_step.
struct Axis {
  int64_t inner, outer_step, inner_step;
};

inline Axis axis_of(const Problem& p, int64_t index) {
  return index == 0 ? Axis{p.width, p.width, 1} : Axis{p.height, 1, p.width};
}

// Calls f(token, pixel) for `count` tokens from `first` on, numbered from 0.
template <typename F>
[[gnu::always_inline]] inline void each_token(const Axis& axis, int64_t first, int64_t count,
                                              const F& f) {
  if (count == 0) return;
  int64_t outer = first / axis.inner, inner = first % axis.inner;
  for (int64_t t = 0; t < count; ++t) {
    f(t, outer * axis.outer_step + inner * axis.inner_step);
    if (++inner == axis.inner) {
      inner = 0;
      ++outer;
    }
  }
}

// Matrices have their innermost size rounded up to whole vectors.
template <typename T>
struct Sizes {
  int64_t tokens, chunk, chunks, padded_tokens;  // chunk: tokens of one
  int64_t p, n;                                  // headdim and d_state, rounded up
  int64_t axes, sides;
  bool shared;  // both sides read the same B and C

  // Tokens of chunk c.
  int64_t count(int64_t c) const { return min(chunk, tokens - c * chunk); }
};

template <typename T>
Sizes<T> sizes_of(const Problem& p, int64_t chunk) {
  Sizes<T> w{};
  w.tokens = p.tokens();
  w.chunk = chunk;
  w.chunks = (w.tokens + w.chunk - 1) / w.chunk;
  w.padded_tokens = w.chunks * w.chunk;
  w.p = round_up(p.headdim, kLanes<T>);
  w.n = round_up(p.d_state, kLanes<T>);
  w.axes = p.directions == 4 ? 2 : 1;
  w.sides = p.directions == 1 ? 1 : 2;
  w.shared = p.matrices == 1;
  return w;
}

// How many chunks share a piece of memory that takes `bytes` for each: all of them where that fits
// into half an L2 cache, else as many as there are such pieces.
inline int64_t segment_chunks(int64_t chunks, int64_t bytes) {
  constexpr int64_t most = 1 << 20;
  int64_t segment = max(chunks, 1);
  if (chunks * bytes <= most) return segment;
  while ((segment - 1) * (segment - 1) >= chunks) --segment;
  return segment;
}

// The pixels of the tokens of chunk c.
template <typename T>
void locate(const Sizes<T>& w, const Axis& axis, int64_t c, int64_t* pixels) {
  each_token(axis, c * w.chunk, w.count(c), [&](int64_t t, int64_t pixel) { pixels[t] = pixel; });
}

// The element of a tensor like x where this image and head start.
template <typename S>
auto head_of(const Problem& p, S* x, int64_t batch, int64_t head) {
  return x + (batch * p.tokens() * p.heads + head) * p.headdim;
}

// The element of B and C where this image, direction and group start.
inline int64_t matrix_offset(const Problem& p, const Block& block, int64_t direction) {
  const int64_t which = p.matrices == 1 ? 0 : direction;
  return ((block.batch * p.tokens() * p.matrices + which) * p.groups + block.group) * p.d_state;
}

// ---- moving tensors in and out ------------------------------------------------------------------

template <typename T>
void clear(T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = T(0);
}

template <typename S, typename T>
[[gnu::always_inline]] inline void copy_row(const S* from, int64_t width, T* to) {
  for (int64_t i = 0; i < width; ++i) to[i] = widen(from[i]);
}

// The rows are short, so what a compiler does before and after a loop over vectors would cost more
// than the loop.
template <typename T>
[[gnu::always_inline]] inline void copy_row(const T* from, int64_t width, T* to) {
  int64_t i = 0;
  for (; i + kLanes<T> <= width; i += kLanes<T>) store(to + i, load(from + i));
  for (; i < width; ++i) to[i] = from[i];
}

template <typename T>
[[gnu::always_inline]] inline void add_row(const T* from, int64_t width, T* to) {
  int64_t i = 0;
  for (; i + kLanes<T> <= width; i += kLanes<T>) store(to + i, load(to + i) + load(from + i));
  for (; i < width; ++i) to[i] += from[i];
}

// What the tokens of a chunk hold of a tensor, as a matrix: `width` elements of each pixel, zeros
// up to the stride and down to `rows` rows.
template <typename S, typename T>
void pack(const S* from, int64_t pixel_stride, int64_t width, const int64_t* pixels, int64_t count,
          int64_t rows, T* to, int64_t stride) {
  for (int64_t t = 0; t < count; ++t) {
    T* out = to + t * stride;
    copy_row(from + pixels[t] * pixel_stride, width, out);
    for (int64_t i = width; i < stride; ++i) out[i] = T(0);
  }
  clear(to + count * stride, (rows - count) * stride);
}

// Puts a chunk's rows into, or adds them to, a tensor. The first part of a sum of several is put,
// the next ones are added. Where a sum of several would be rounded in between, the last part rounds
// it to `out` and the ones before leave it in `sum`.
struct Turn {
  bool first, last;
};

template <typename S, typename T>
void put_rows(const T* from, int64_t stride, int64_t width, const int64_t* pixels, int64_t count,
              Turn turn, S* out, int64_t out_stride, T* sum, int64_t sum_stride) {
  for (int64_t t = 0; t < count; ++t) {
    const T* row = from + t * stride;
    S* to = out + pixels[t] * out_stride;
    if constexpr (sizeof(S) == sizeof(T)) {
      turn.first ? copy_row(row, width, to) : add_row(row, width, to);
    } else if (turn.first && turn.last) {
      for (int64_t i = 0; i < width; ++i) narrow(to[i], row[i]);
    } else if (turn.first) {
      copy_row(row, width, sum + pixels[t] * sum_stride);
    } else if (!turn.last) {
      add_row(row, width, sum + pixels[t] * sum_stride);
    } else {
      const T* before = sum + pixels[t] * sum_stride;
      for (int64_t i = 0; i < width; ++i) narrow(to[i], before[i] + row[i]);
    }
  }
}

// D's row of a head, in whole vectors; zeros without D.
template <typename T>
void load_skip(const Problem& p, int64_t head, int64_t width, T* to) {
  clear(to, width);
  if (p.D == nullptr) return;
  for (int64_t i = 0; i < p.headdim; ++i) {
    to[i] = static_cast<const T*>(p.D)[head * p.headdim + i];
  }
}

// States are (headdim, state) in memory and (state, headdim) here.
template <typename T>
void load_state(const Problem& p, const Sizes<T>& w, int64_t batch, int64_t head, T* to) {
  const T* from =
      static_cast<const T*>(p.initial_states) + (batch * p.heads + head) * p.headdim * p.d_state;
  for (int64_t n = 0; n < p.d_state; ++n) {
    for (int64_t i = 0; i < p.headdim; ++i) to[n * w.p + i] = from[i * p.d_state + n];
    for (int64_t i = p.headdim; i < w.p; ++i) to[n * w.p + i] = T(0);
  }
}

template <typename T>
void store_state(const Problem& p, const Sizes<T>& w, const T* from, int64_t batch, int64_t head,
                 void* states) {
  T* to = static_cast<T*>(states) + (batch * p.heads + head) * p.headdim * p.d_state;
  for (int64_t i = 0; i < p.headdim; ++i) {
    for (int64_t n = 0; n < p.d_state; ++n) to[i * p.d_state + n] = from[n * w.p + i];
  }
}

// ---- prefetching --------------------------------------------------------------------------------

// Asks for a chunk's rows of a tensor to be brought into the L2 cache. In column-major order they
// are far apart, and no hardware prefetcher sees them coming.
template <bool WRITE, typename S>
void fetch(const Axis& axis, int64_t first, int64_t count, const S* from, int64_t pixel_stride,
           int64_t width) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(S));
  each_token(axis, first, count, [&](int64_t, int64_t pixel) {
    const S* row = from + pixel * pixel_stride;
    for (int64_t i = 0; i < width; i += line) __builtin_prefetch(row + i, WRITE ? 1 : 0, 2);
  });
}

template <typename S, typename T>
void fetch_heads(const Problem& p, const Sizes<T>& w, const void* x, const Block& block,
                 int64_t axis, int64_t c) {
  if (x == nullptr) return;
  fetch<false>(axis_of(p, axis), c * w.chunk, w.count(c),
               head_of(p, static_cast<const S*>(x), block.batch, block.head), p.heads * p.headdim,
               block.heads * p.headdim);
}

template <bool WRITE, typename S, typename T>
void fetch_matrices(const Problem& p, const Sizes<T>& w, const S* matrix, const Block& block,
                    int64_t axis, int64_t c) {
  if (matrix == nullptr) return;
  for (int64_t s = 0; s < (w.shared ? 1 : w.sides); ++s) {
    fetch<WRITE>(axis_of(p, axis), c * w.chunk, w.count(c),
                 matrix + matrix_offset(p, block, 2 * axis + s), p.matrices * p.groups * p.d_state,
                 p.d_state);
  }
}

// What a chunk reads of x, B and C, and of y's gradient unless that is null.
template <typename S, typename T>
void fetch_chunk(const Problem& p, const Sizes<T>& w, const void* y_gradient, const Block& block,
                 int64_t axis, int64_t c) {
  if (c < 0 || c >= w.chunks) return;
  fetch_heads<S>(p, w, p.x, block, axis, c);
  fetch_heads<S>(p, w, y_gradient, block, axis, c);
  fetch_matrices<false>(p, w, static_cast<const S*>(p.B), block, axis, c);
  fetch_matrices<false>(p, w, static_cast<const S*>(p.C), block, axis, c);
}

}  // namespace famseg::FAMSEG_ISA
