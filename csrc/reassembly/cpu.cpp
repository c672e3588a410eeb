// The kernels of reassemble and carafe for one instruction set (see common/simd.h: this file is
// compiled once for each).
//
// Lanes are pixels of x, and the s x s output pixels above each one ("phases") are s^2 separate
// planes until they are stored. So logits are read as they lie, a vector of x serves all phases,
// and a vector of weights several channels.
//
// A block is some rows of one (n, group). Its weights are normalised once for all channels and stay
// in the L2 cache; a run of rows at a time they stay in L1 while all channels go by. Planes lie in
// scratch with the margins that shifted loads reach:
//
//   margin | row: w pixels, gap >= reach_x | row ... | margin
//
// The gap right of a row is also the margin left of the next one; images are zero there. Rows
// shorter than a vector lie as close as that allows, and one run of vectors goes over all of them:
// a 4 x 4 image is 2 vectors of 16, not 4. Longer rows begin at whole vectors, a run each.

#include "reassembly/cpu.h"

#include "common/half.h"
#include "common/simd.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace famseg::FAMSEG_ISA {
namespace {

using reassembly::Gradients;
using reassembly::Problem;

constexpr int64_t kAlignment = 64;
// Shares of a core's L2 cache, of which there is 1 MB or more.
constexpr int64_t kForwardWeightBytes = 128 << 10;
constexpr int64_t kBackwardWeightBytes = 384 << 10;
constexpr int64_t kImageBytes = 160 << 10;

constexpr int64_t round_up(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit * unit;
}
constexpr int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr int64_t larger(int64_t a, int64_t b) {
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
    // All pieces are one allocation: a guarded gap shows a step from one into the next.
    if (base != nullptr) {
      __asan_poison_memory_region(piece + bytes, base + used + kAlignment - (piece + bytes));
    }
    used += kAlignment;
#endif
    return reinterpret_cast<T*>(piece);
  }
};

struct Geometry {
  int64_t height, width, channels;  // of x, and of one group
  int64_t kernel, taps, scale, phases;
  // How far taps reach within the image: what is farther off meets only zeros.
  int64_t reach_y, reach_x;
  int64_t margin, pitch;  // see the top of this file
  int64_t rows, row_blocks;
  int64_t halo;      // rows of weights above and below the block's own
  int64_t run_rows;  // rows that one run of vectors goes over
  int64_t chunk;     // channels whose images are in scratch at a time

  // Elements of a plane of so many rows: not a multiple of 4 KB, at which the same pixel of all
  // planes would compete for one set of the L1 cache.
  template <typename T>
  int64_t plane(int64_t plane_rows) const {
    constexpr int64_t line = kAlignment / static_cast<int64_t>(sizeof(T));
    const int64_t lines = round_up(2 * margin + plane_rows * pitch, line) / line;
    return (lines + 1 - lines % 2) * line;
  }
};

template <typename T>
Geometry geometry(const Problem& p, bool backward, int64_t halo) {
  constexpr int64_t lanes = kLanes<T>;
  Geometry g{};
  g.height = p.h;
  g.width = p.w;
  g.channels = p.c / p.groups;
  g.kernel = p.kernel_size;
  g.taps = p.kernel_size * p.kernel_size;
  g.scale = p.scale;
  g.phases = p.scale * p.scale;
  g.reach_y = smaller(p.kernel_size / 2, p.h - 1);
  g.reach_x = smaller(p.kernel_size / 2, p.w - 1);
  // The last vector of a run may hang over by a vector, and loads are shifted by the reach.
  g.margin = round_up(g.reach_x, lanes) + lanes;
  g.pitch = p.w < lanes ? p.w + g.reach_x : round_up(p.w + g.reach_x, lanes);
  g.halo = halo < g.reach_y ? halo : g.reach_y;

  const int64_t row_bytes = g.taps * g.phases * g.pitch * static_cast<int64_t>(sizeof(T));
  const int64_t fitting = (backward ? kBackwardWeightBytes : kForwardWeightBytes) / row_bytes;
  // At least as many rows as the halo has: at most half of the weights are computed for others.
  const int64_t most = smaller(larger(larger(fitting - 2 * g.halo, 2 * g.halo), 1), p.h);
  g.row_blocks = (p.h + most - 1) / most;
  g.rows = (p.h + g.row_blocks - 1) / g.row_blocks;
  g.run_rows = p.w < lanes ? g.rows + 2 * g.halo : 1;

  const int64_t images = backward ? 1 + g.phases : 1;
  const int64_t image_bytes =
      images * g.plane<T>(g.rows + 2 * g.reach_y) * static_cast<int64_t>(sizeof(T));
  g.chunk = smaller(larger(kImageBytes / image_bytes / 4 * 4, 4), g.channels);
  return g;
}

// Planes of equal size, one behind the other; `at` is the first pixel of the first one.
template <typename T>
struct Planes {
  T* at = nullptr;
  int64_t stride = 0;

  T* operator[](int64_t index) const { return at + index * stride; }
};

template <typename T>
Planes<T> take_planes(Arena& arena, const Geometry& g, int64_t count, int64_t rows) {
  Planes<T> planes;
  planes.stride = g.plane<T>(rows);
  T* first = arena.take<T>(count * planes.stride);
  planes.at = first == nullptr ? nullptr : first + g.margin;
  return planes;
}

// Calls f(first row, rows, vectors) for the runs that cover `rows` rows.
template <typename T, typename F>
[[gnu::always_inline]] inline void for_each_run(const Geometry& g, int64_t rows, const F& f) {
  for (int64_t row = 0; row < rows; row += g.run_rows) {
    const int64_t count = smaller(g.run_rows, rows - row);
    const int64_t pixels = (count - 1) * g.pitch + g.width;
    f(row, count, (pixels + kLanes<T> - 1) / kLanes<T>);
  }
}

// ---- moving images in and out -------------------------------------------------------------------

// Rows [first, first + rows) of an (H, W) image, zeros outside.
template <typename S, typename T>
void load_rows(const Geometry& g, const S* image, int64_t first, int64_t rows, T* to) {
  for (int64_t i = 0; i < rows; ++i) {
    T* __restrict__ row = to + i * g.pitch;
    if (first + i < 0 || first + i >= g.height) {
      for (int64_t j = 0; j < g.width; ++j) row[j] = T(0);
    } else {
      const S* from = image + (first + i) * g.width;
      for (int64_t j = 0; j < g.width; ++j) row[j] = widen(from[j]);
    }
  }
}

template <typename S, typename T>
void store_rows(const Geometry& g, const T* from, int64_t first, int64_t rows, S* image) {
  for (int64_t i = 0; i < rows; ++i) {
    S* __restrict__ row = image + (first + i) * g.width;
    for (int64_t j = 0; j < g.width; ++j) narrow(row[j], from[i * g.pitch + j]);
  }
}

// The same between an (s H, s W) image and one plane for each phase. SCALE is s where the compiler
// shall turn the strided accesses into shuffles, else 0.
template <int SCALE, typename S, typename T>
void load_phases(const Geometry& g, const S* image, int64_t first, int64_t rows, Planes<T> to) {
  const int64_t scale = SCALE == 0 ? g.scale : SCALE;
  for (int64_t i = 0; i < rows; ++i) {
    const bool outside = first + i < 0 || first + i >= g.height;
    for (int64_t dy = 0; dy < scale; ++dy) {
      const S* from = image + ((first + i) * scale + dy) * g.width * scale;
      T* row = to[dy * scale] + i * g.pitch;
      if (outside) {
        for (int64_t dx = 0; dx < scale; ++dx) {
          for (int64_t j = 0; j < g.width; ++j) row[dx * to.stride + j] = T(0);
        }
      } else if constexpr (SCALE == 2) {
        T* __restrict__ even = row;
        T* __restrict__ odd = row + to.stride;
        for (int64_t j = 0; j < g.width; ++j) {
          even[j] = widen(from[2 * j]);
          odd[j] = widen(from[2 * j + 1]);
        }
      } else {
        for (int64_t dx = 0; dx < scale; ++dx) {
          T* __restrict__ phase = row + dx * to.stride;
          for (int64_t j = 0; j < g.width; ++j) phase[j] = widen(from[scale * j + dx]);
        }
      }
    }
  }
}

template <int SCALE, typename S, typename T>
void store_phases(const Geometry& g, Planes<T> from, int64_t first, int64_t rows, S* image) {
  const int64_t scale = SCALE == 0 ? g.scale : SCALE;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t dy = 0; dy < scale; ++dy) {
      S* __restrict__ to = image + ((first + i) * scale + dy) * g.width * scale;
      const T* row = from[dy * scale] + i * g.pitch;
      if constexpr (SCALE == 2) {
        const T* odd = row + from.stride;
        for (int64_t j = 0; j < g.width; ++j) {
          narrow(to[2 * j], row[j]);
          narrow(to[2 * j + 1], odd[j]);
        }
      } else {
        for (int64_t dx = 0; dx < scale; ++dx) {
          const T* phase = row + dx * from.stride;
          for (int64_t j = 0; j < g.width; ++j) narrow(to[scale * j + dx], phase[j]);
        }
      }
    }
  }
}

template <typename S, typename T>
void load_scaled(const Geometry& g, const S* image, int64_t first, int64_t rows, Planes<T> to) {
  if (g.scale == 1) return load_rows(g, image, first, rows, to[0]);
  if (g.scale == 2) return load_phases<2>(g, image, first, rows, to);
  load_phases<0>(g, image, first, rows, to);
}

template <typename S, typename T>
void store_scaled(const Geometry& g, Planes<T> from, int64_t first, int64_t rows, S* image) {
  if (g.scale == 1) return store_rows(g, from[0], first, rows, image);
  if (g.scale == 2) return store_phases<2>(g, from, first, rows, image);
  store_phases<0>(g, from, first, rows, image);
}

// ---- weights ------------------------------------------------------------------------------------

// Softmax over the taps, in place. Gaps between rows are normalised along: they hold finite numbers
// and meet zeros.
template <typename T>
void normalise(const Geometry& g, int64_t rows, Planes<T> weights) {
  const int64_t tap_stride = g.phases * weights.stride;
  for_each_run<T>(g, rows, [&](int64_t row, int64_t, int64_t vectors) {
    for (int64_t v = 0; v < vectors; ++v) {
      for (int64_t phase = 0; phase < g.phases; ++phase) {
        T* at = weights[phase] + row * g.pitch + v * kLanes<T>;
        Vector<T> most = load(at);
        for (int64_t tap = 1; tap < g.taps; ++tap) {
          const Vector<T> logit = load(at + tap * tap_stride);
          most = logit > most ? logit : most;
        }
        Vector<T> sum{};
        for (int64_t tap = 0; tap < g.taps; ++tap) {
          const Vector<T> e = exponential<T>(load(at + tap * tap_stride) - most);
          sum += e;
          store(at + tap * tap_stride, e);
        }
        const Vector<T> factor = T(1) / sum;
        for (int64_t tap = 0; tap < g.taps; ++tap) {
          store(at + tap * tap_stride, load(at + tap * tap_stride) * factor);
        }
      }
    }
  });
}

// The weights of rows [first, first + rows) of image `index`, n * groups + group, as planes (tap,
// phase).
template <typename S, typename T>
void load_weights(const Problem& p, const Geometry& g, int64_t index, int64_t first, int64_t rows,
                  Planes<T> to) {
  const int64_t pixels = g.height * g.width;
  const S* from = static_cast<const S*>(p.weights) + index * g.taps * g.phases * pixels;
  if (p.softmax) {
    for (int64_t plane = 0; plane < g.taps * g.phases; ++plane) {
      load_rows(g, from + plane * pixels, first, rows, to[plane]);
    }
    normalise(g, rows, to);
  } else {
    for (int64_t tap = 0; tap < g.taps; ++tap) {
      load_scaled(g, from + tap * g.phases * pixels, first, rows,
                  Planes<T>{to[tap * g.phases], to.stride});
    }
  }
}

// From the gradient of the weights to that of the logits, in place: w (dw - sum_tap w dw).
template <typename T>
void normalise_backward(const Geometry& g, int64_t rows, Planes<T> weights, Planes<T> gradient) {
  for_each_run<T>(g, rows, [&](int64_t row, int64_t, int64_t vectors) {
    for (int64_t v = 0; v < vectors; ++v) {
      for (int64_t phase = 0; phase < g.phases; ++phase) {
        const int64_t at = row * g.pitch + v * kLanes<T>;
        Vector<T> dot{};
        for (int64_t plane = phase; plane < g.taps * g.phases; plane += g.phases) {
          dot += load(weights[plane] + at) * load(gradient[plane] + at);
        }
        for (int64_t plane = phase; plane < g.taps * g.phases; plane += g.phases) {
          T* to = gradient[plane] + at;
          store(to, load(weights[plane] + at) * (load(to) - dot));
        }
      }
    }
  });
}

template <typename S, typename T>
void store_weights(const Problem& p, const Geometry& g, int64_t index, int64_t first, int64_t rows,
                   Planes<T> from, void* gradient) {
  const int64_t pixels = g.height * g.width;
  S* to = static_cast<S*>(gradient) + index * g.taps * g.phases * pixels;
  if (p.softmax) {
    for (int64_t plane = 0; plane < g.taps * g.phases; ++plane) {
      store_rows(g, from[plane], first, rows, to + plane * pixels);
    }
  } else {
    for (int64_t tap = 0; tap < g.taps; ++tap) {
      store_scaled(g, Planes<T>{from[tap * g.phases], from.stride}, first, rows,
                   to + tap * g.phases * pixels);
    }
  }
}

// Calls f.template operator()<COUNT>(first) for pieces of 4, 2 and 1 that make up `count`.
template <int MOST, typename F>
[[gnu::always_inline]] inline void for_each_piece(int64_t count, const F& f) {
  int64_t first = 0;
  if constexpr (MOST >= 4) {
    for (; first + 4 <= count; first += 4) f(Constant<4>(), first);
  }
  for (; first + 2 <= count; first += 2) f(Constant<2>(), first);
  if (first < count) f(Constant<1>(), first);
}
