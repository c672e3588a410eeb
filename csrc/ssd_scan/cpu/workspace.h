// The factors of a chunk's products, as forward.cpp and backward.cpp both need them. For kernel files
// only, like simd.h.
#pragma once

#include "ssd_scan/cpu/chunk.h"
#include "ssd_scan/cpu/matrix.h"
#include "ssd_scan/cpu/steps.h"

namespace famseg::FAMSEG_ISA {

// Tokens of a chunk. Longer ones make the products of M dearer, shorter ones those of the states:
// of 16, 32 and 64, 32 was the fastest or close to it from headdim and d_state 16 to 64.
template <typename T>
int64_t chunk_tokens(const Problem& p) {
  int64_t chunk = min(32, p.tokens() > 0 ? p.tokens() : 1);
  if (p.chunk_size > 0) chunk = min(chunk, p.chunk_size);
  return round_up(chunk, kLanes<T>);
}

// Of the chunk at hand. Where both sides share B and C they share these.
template <typename T>
struct Side {
  T* b;             // (chunk, d_state)
  T* c;             // (chunk, d_state)
  T* b_transposed;  // (d_state, chunk)
  T* gram;          // (chunk, chunk)
};

// The buffers of a chunk that forward and backward both need.
template <typename T>
struct Workspace : Sizes<T> {
  int64_t* pixels;  // (chunk)
  Side<T> side[2];
  T* x;       // (chunk, headdim)
  T* mixing;  // (chunk, chunk)
};

template <typename T>
Workspace<T> lay_out(const Problem& p, Arena& arena) {
  Workspace<T> w{};
  static_cast<Sizes<T>&>(w) = sizes_of<T>(p, chunk_tokens<T>(p));
  w.pixels = arena.take<int64_t>(w.chunk);
  for (int64_t s = 0; s < w.sides; ++s) {
    Side<T>& side = w.side[s];
    if (s == 1 && w.shared) {
      side = w.side[0];
      continue;
    }
    side.b = arena.take<T>(w.chunk * w.n);
    side.c = arena.take<T>(w.chunk * w.n);
    side.b_transposed = arena.take<T>(w.n * w.chunk);
    side.gram = arena.take<T>(w.chunk * w.chunk);
  }
  w.x = arena.take<T>(w.chunk * w.p);
  w.mixing = arena.take<T>(w.chunk * w.chunk);
  return w;
}

template <typename S, typename T>
void pack_head(const Problem& p, const Workspace<T>& w, const void* x, int64_t batch, int64_t head,
               int64_t count, T* to) {
  pack(head_of(p, static_cast<const S*>(x), batch, head), p.heads * p.headdim, p.headdim, w.pixels,
       count, w.chunk, to, w.p);
}

template <typename S, typename T>
void pack_matrix(const Problem& p, const Workspace<T>& w, const void* matrix, const Block& block,
                 int64_t direction, int64_t count, T* to) {
  const S* from = static_cast<const S*>(matrix) + matrix_offset(p, block, direction);
  pack(from, p.matrices * p.groups * p.d_state, p.d_state, w.pixels, count, w.chunk, to, w.n);
}

// B, C and G of a chunk, for all sides.
template <typename S, typename T>
void load_matrices(const Problem& p, Workspace<T>& w, const Block& block, int64_t axis,
                   int64_t count) {
  for (int64_t s = 0; s < (w.shared ? 1 : w.sides); ++s) {
    Side<T>& side = w.side[s];
    pack_matrix<S>(p, w, p.B, block, 2 * axis + s, count, side.b);
    pack_matrix<S>(p, w, p.C, block, 2 * axis + s, count, side.c);
    transpose(side.b, w.n, w.chunk, w.n, side.b_transposed, w.chunk);
    multiply(Product<T>{{side.c, w.n, 1},
                        {side.b_transposed, w.chunk},
                        {side.gram, w.chunk},
                        count,
                        w.chunk,
                        p.d_state});
  }
}

// M of a chunk and head. `decays`: L of either side, or null.
template <typename T>
void mix_sides(const Workspace<T>& w, const Steps<T>* steps, int64_t at, int64_t count,
               T* const* decays) {
  mix<false>(w, w.side[0].gram, steps[0], at, count, decays == nullptr ? nullptr : decays[0],
             w.mixing);
  if (w.sides == 2) {
    mix<true>(w, w.side[1].gram, steps[1], at, count, decays == nullptr ? nullptr : decays[1],
              w.mixing);
  }
}

// Rows of `from`, each times its factor.
template <typename T>
void scale_rows(const T* from, const T* factors, int64_t rows, int64_t columns, T* to) {
  for (int64_t i = 0; i < rows; ++i) {
    const Vector<T> factor = broadcast(factors[i]);
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      store(to + i * columns + j, load(from + i * columns + j) * factor);
    }
  }
}

// Calls f with a value of the element type and one of the arithmetic's.
template <typename F>
auto by_types(const Problem& p, const F& f) {
  return by_dtype(p.dtype, [&](auto element) {
    using S = decltype(element);
    return f(element, Compute<S>());
  });
}

}  // namespace famseg::FAMSEG_ISA
