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
#include "common/scratch.h"
#include "common/simd.h"

namespace famseg::FAMSEG_ISA {
namespace {

using reassembly::Gradients;
using reassembly::Problem;

// Shares of a core's L2 cache, of which there is 1 MB or more.
constexpr int64_t kForwardWeightBytes = 128 << 10;
constexpr int64_t kBackwardWeightBytes = 384 << 10;
constexpr int64_t kImageBytes = 160 << 10;

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
Geometry geometry(const Problem& p, bool backward, bool with_halo) {
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
  g.halo = with_halo ? g.reach_y : 0;

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
[[gnu::always_inline]] inline Planes<T> shifted(Planes<T> planes, int64_t by) {
  return {planes.at + by, planes.stride};
}

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

// ---- tiles: what is held in registers -----------------------------------------------------------

// Channels, phases: 4 x 4 sums, 4 weights and an input fit into 32 registers; 2 x 4 into 16.
constexpr int kMostChannels = kVectorRegisters >= 32 ? 4 : 2;
constexpr int kMostPhases = 4;
// Taps x 4 phases of the gradient of the weights, 4 gradients and an input.
constexpr int kMostTaps = kVectorRegisters >= 32 ? 5 : 2;

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f(Constant<size>, first) for pieces of at most MOST, 2 and 1 that make up `count`.
template <int MOST, typename F>
[[gnu::always_inline]] inline void for_each_piece(int64_t count, const F& f) {
  int64_t first = 0;
  for (; first + MOST <= count; first += MOST) f(Constant<MOST>(), first);
  if constexpr (MOST > 2) {
    for (; first + 2 <= count; first += 2) f(Constant<2>(), first);
  }
  if constexpr (MOST > 1) {
    for (; first < count; ++first) f(Constant<1>(), first);
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

// Softmax over the taps of one vector of some phases, in place: a few independent chains of maxima
// and sums hide each other's latency.
template <int PHASES, typename T>
void normalise_tile(const Geometry& g, Planes<T> weights) {
  const int64_t tap_stride = g.phases * weights.stride;
  Vector<T> most[PHASES], sum[PHASES] = {};
#pragma GCC unroll 4
  for (int phase = 0; phase < PHASES; ++phase) most[phase] = load(weights[phase]);
  for (int64_t tap = 1; tap < g.taps; ++tap) {
#pragma GCC unroll 4
    for (int phase = 0; phase < PHASES; ++phase) {
      const Vector<T> logit = load(weights[phase] + tap * tap_stride);
      most[phase] = logit > most[phase] ? logit : most[phase];
    }
  }
  for (int64_t tap = 0; tap < g.taps; ++tap) {
#pragma GCC unroll 4
    for (int phase = 0; phase < PHASES; ++phase) {
      T* at = weights[phase] + tap * tap_stride;
      const Vector<T> e = exponential<T>(load(at) - most[phase]);
      sum[phase] += e;
      store(at, e);
    }
  }
#pragma GCC unroll 4
  for (int phase = 0; phase < PHASES; ++phase) sum[phase] = T(1) / sum[phase];
  for (int64_t tap = 0; tap < g.taps; ++tap) {
#pragma GCC unroll 4
    for (int phase = 0; phase < PHASES; ++phase) {
      T* at = weights[phase] + tap * tap_stride;
      store(at, load(at) * sum[phase]);
    }
  }
}

// Gaps between rows are normalised along: they hold finite numbers and meet zeros.
template <typename T>
void normalise(const Geometry& g, int64_t rows, Planes<T> weights) {
  for_each_run<T>(g, rows, [&](int64_t row, int64_t, int64_t vectors) {
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = row * g.pitch + v * kLanes<T>;
      for_each_piece<kMostPhases>(g.phases, [&](auto piece, int64_t phase) {
        normalise_tile<decltype(piece)::value, T>(g, shifted(weights, phase * weights.stride + at));
      });
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
    // As many rows at once as the block has: few streams from memory, long ones.
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

// ---- weighted sums and their gradients ----------------------------------------------------------

// One vector of some channels and phases of the result.
template <int CHANNELS, int PHASES, typename T>
void forward_tile(const Geometry& g, Planes<T> x, Planes<T> weights, Planes<T> out) {
  Vector<T> sum[CHANNELS][PHASES] = {};
  for (int64_t ty = -g.reach_y; ty <= g.reach_y; ++ty) {
    const int64_t row_tap = (ty + g.kernel / 2) * g.kernel + g.kernel / 2;
    for (int64_t tx = -g.reach_x; tx <= g.reach_x; ++tx) {
      const T* weight = weights[(row_tap + tx) * g.phases];
      const T* in = x.at + ty * g.pitch + tx;
      Vector<T> factor[PHASES];
#pragma GCC unroll 4
      for (int phase = 0; phase < PHASES; ++phase)
        factor[phase] = load(weight + phase * weights.stride);
#pragma GCC unroll 4
      for (int c = 0; c < CHANNELS; ++c) {
        const Vector<T> v = load(in + c * x.stride);
#pragma GCC unroll 4
        for (int phase = 0; phase < PHASES; ++phase) sum[c][phase] += factor[phase] * v;
      }
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < CHANNELS; ++c) {
#pragma GCC unroll 4
    for (int phase = 0; phase < PHASES; ++phase) store(out[c * g.phases + phase], sum[c][phase]);
  }
}

// One vector of the gradient of the weights of some neighbouring taps and phases: adds the products
// of `channels` channels.
template <int TAPS, int PHASES, typename T>
void weight_gradient_tile(const Geometry& g, int64_t channels, Planes<T> x, Planes<T> y_gradient,
                          Planes<T> gradient) {
  Vector<T> sum[TAPS][PHASES];
#pragma GCC unroll 5
  for (int tap = 0; tap < TAPS; ++tap) {
#pragma GCC unroll 4
    for (int phase = 0; phase < PHASES; ++phase)
      sum[tap][phase] = load(gradient[tap * g.phases + phase]);
  }
  for (int64_t c = 0; c < channels; ++c) {
    const T* in = x[c];
    const T* out = y_gradient[c * g.phases];
    Vector<T> factor[PHASES];
#pragma GCC unroll 4
    for (int phase = 0; phase < PHASES; ++phase)
      factor[phase] = load(out + phase * y_gradient.stride);
#pragma GCC unroll 5
    for (int tap = 0; tap < TAPS; ++tap) {
      const Vector<T> v = load(in + tap);
#pragma GCC unroll 4
      for (int phase = 0; phase < PHASES; ++phase) sum[tap][phase] += factor[phase] * v;
    }
  }
#pragma GCC unroll 5
  for (int tap = 0; tap < TAPS; ++tap) {
#pragma GCC unroll 4
    for (int phase = 0; phase < PHASES; ++phase)
      store(gradient[tap * g.phases + phase], sum[tap][phase]);
  }
}

// One vector of the gradient of x of some channels: gathers from all output pixels that it went to.
template <int CHANNELS, typename T>
void x_gradient_tile(const Geometry& g, Planes<T> y_gradient, Planes<T> weights, Planes<T> out) {
  Vector<T> sum[CHANNELS] = {};
  for (int64_t ty = -g.reach_y; ty <= g.reach_y; ++ty) {
    const int64_t row_tap = (ty + g.kernel / 2) * g.kernel + g.kernel / 2;
    for (int64_t tx = -g.reach_x; tx <= g.reach_x; ++tx) {
      const int64_t offset = -ty * g.pitch - tx;
      const T* weight = weights[(row_tap + tx) * g.phases] + offset;
      const T* in = y_gradient.at + offset;
      for (int64_t phase = 0; phase < g.phases; ++phase) {
        const Vector<T> factor = load(weight + phase * weights.stride);
#pragma GCC unroll 4
        for (int c = 0; c < CHANNELS; ++c) {
          sum[c] += factor * load(in + (c * g.phases + phase) * y_gradient.stride);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < CHANNELS; ++c) store(out[c], sum[c]);
}

// ---- forward ------------------------------------------------------------------------------------

template <typename T>
struct ForwardSpace {
  Planes<T> weights;  // (tap, phase), the block's rows
  Planes<T> x;        // a chunk of channels, the block's rows and the reach above and below
  Planes<T> out;      // (channel, phase), one run
};

template <typename T>
ForwardSpace<T> forward_space(const Geometry& g, Arena& arena) {
  ForwardSpace<T> space;
  space.weights = take_planes<T>(arena, g, g.taps * g.phases, g.rows);
  space.x = take_planes<T>(arena, g, g.chunk, g.rows + 2 * g.reach_y);
  space.out = take_planes<T>(arena, g, kMostChannels * g.phases, smaller(g.run_rows, g.rows));
  return space;
}

template <typename S, typename T>
void forward_block(const Problem& p, void* y, int64_t block, void* scratch) {
  const Geometry g = geometry<T>(p, false, false);
  Arena arena{static_cast<char*>(scratch)};
  const ForwardSpace<T> space = forward_space<T>(g, arena);
  const int64_t index = block / g.row_blocks;
  const int64_t first = block % g.row_blocks * g.rows;
  const int64_t rows = smaller(g.rows, g.height - first);
  const int64_t pixels = g.height * g.width;

  load_weights<S>(p, g, index, first, rows, space.weights);
  for (int64_t chunk = 0; chunk < g.channels; chunk += g.chunk) {
    const int64_t channels = smaller(g.chunk, g.channels - chunk);
    // Groups lie one behind the other, so `index` counts them through the batch.
    const int64_t first_plane = index * g.channels + chunk;
    for (int64_t c = 0; c < channels; ++c) {
      load_rows(g, static_cast<const S*>(p.x) + (first_plane + c) * pixels, first - g.reach_y,
                rows + 2 * g.reach_y, space.x[c]);
    }
    for_each_run<T>(g, rows, [&](int64_t row, int64_t run_rows, int64_t vectors) {
      const Planes<T> weights = shifted(space.weights, row * g.pitch);
      const Planes<T> x = shifted(space.x, (row + g.reach_y) * g.pitch);
      for_each_piece<kMostChannels>(channels, [&](auto piece, int64_t c) {
        constexpr int count = decltype(piece)::value;
        for_each_piece<kMostPhases>(g.phases, [&](auto phase_piece, int64_t phase) {
          for (int64_t v = 0; v < vectors; ++v) {
            const int64_t at = v * kLanes<T>;
            forward_tile<count, decltype(phase_piece)::value, T>(
                g, shifted(x, c * x.stride + at), shifted(weights, phase * weights.stride + at),
                shifted(space.out, phase * space.out.stride + at));
          }
        });
        for (int64_t k = 0; k < count; ++k) {
          store_scaled(g, shifted(space.out, k * g.phases * space.out.stride), first + row,
                       run_rows, static_cast<S*>(y) + (first_plane + c + k) * g.phases * pixels);
        }
      });
    });
  }
}

// ---- backward -----------------------------------------------------------------------------------

template <typename T>
struct BackwardSpace {
  Planes<T> weights;           // (tap, phase), the block's rows and the halo
  Planes<T> weights_gradient;  // (tap, phase), the block's rows
  Planes<T> y_gradient;        // (channel, phase) of a chunk, rows as the weights
  Planes<T> x;                 // a chunk of channels, the block's rows and the reach
  Planes<T> x_gradient;        // some channels, one run
};

template <typename T>
BackwardSpace<T> backward_space(const Geometry& g, Arena& arena) {
  BackwardSpace<T> space;
  space.weights = take_planes<T>(arena, g, g.taps * g.phases, g.rows + 2 * g.halo);
  space.weights_gradient = take_planes<T>(arena, g, g.taps * g.phases, g.rows);
  space.y_gradient = take_planes<T>(arena, g, g.chunk * g.phases, g.rows + 2 * g.halo);
  space.x = take_planes<T>(arena, g, g.chunk, g.rows + 2 * g.reach_y);
  space.x_gradient = take_planes<T>(arena, g, kMostChannels, smaller(g.run_rows, g.rows));
  return space;
}

// Adds a chunk of channels to the gradient of the weights.
template <typename T>
void add_weights_gradient(const Geometry& g, const BackwardSpace<T>& space, int64_t rows,
                          int64_t channels) {
  const int64_t radius = g.kernel / 2;
  for_each_run<T>(g, rows, [&](int64_t row, int64_t, int64_t vectors) {
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = row * g.pitch + v * kLanes<T>;
      for_each_piece<kMostPhases>(g.phases, [&](auto phase_piece, int64_t phase) {
        const Planes<T> y_gradient =
            shifted(space.y_gradient, phase * space.y_gradient.stride + g.halo * g.pitch + at);
        for (int64_t ty = -g.reach_y; ty <= g.reach_y; ++ty) {
          const T* x = space.x.at + (g.reach_y + ty) * g.pitch - g.reach_x + at;
          const int64_t row_tap = (ty + radius) * g.kernel + radius - g.reach_x;
          for_each_piece<kMostTaps>(2 * g.reach_x + 1, [&](auto tap_piece, int64_t tap) {
            weight_gradient_tile<decltype(tap_piece)::value, decltype(phase_piece)::value, T>(
                g, channels, {const_cast<T*>(x) + tap, space.x.stride}, y_gradient,
                {space.weights_gradient[(row_tap + tap) * g.phases + phase] + at,
                 space.weights_gradient.stride});
          });
        }
      });
    }
  });
}

template <typename S, typename T>
void store_x_gradient(const Geometry& g, const BackwardSpace<T>& space, int64_t first, int64_t rows,
                      int64_t channels, S* x_gradient) {
  for_each_run<T>(g, rows, [&](int64_t row, int64_t run_rows, int64_t vectors) {
    const int64_t start = (g.halo + row) * g.pitch;
    for_each_piece<kMostChannels>(channels, [&](auto piece, int64_t c) {
      constexpr int count = decltype(piece)::value;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t at = v * kLanes<T>;
        x_gradient_tile<count, T>(
            g, shifted(space.y_gradient, c * g.phases * space.y_gradient.stride + start + at),
            shifted(space.weights, start + at), shifted(space.x_gradient, at));
      }
      for (int64_t k = 0; k < count; ++k) {
        store_rows(g, space.x_gradient[k], first + row, run_rows,
                   x_gradient + (c + k) * g.height * g.width);
      }
    });
  });
}

template <typename S, typename T>
void backward_block(const Problem& p, const Gradients& gradients, int64_t block, void* scratch) {
  const Geometry g = geometry<T>(p, true, gradients.x != nullptr);
  Arena arena{static_cast<char*>(scratch)};
  const BackwardSpace<T> space = backward_space<T>(g, arena);
  const int64_t index = block / g.row_blocks;
  const int64_t first = block % g.row_blocks * g.rows;
  const int64_t rows = smaller(g.rows, g.height - first);
  const int64_t pixels = g.height * g.width;
  const bool wants_weights = gradients.weights != nullptr;

  if (gradients.x != nullptr || p.softmax) {
    load_weights<S>(p, g, index, first - g.halo, rows + 2 * g.halo, space.weights);
  }
  if (wants_weights) {
    T* from = space.weights_gradient.at - g.margin;
    for (int64_t i = 0; i < g.taps * g.phases * space.weights_gradient.stride; ++i) from[i] = T(0);
  }
  for (int64_t chunk = 0; chunk < g.channels; chunk += g.chunk) {
    const int64_t channels = smaller(g.chunk, g.channels - chunk);
    const int64_t first_plane = index * g.channels + chunk;
    for (int64_t c = 0; c < channels; ++c) {
      load_scaled(g, static_cast<const S*>(gradients.y) + (first_plane + c) * g.phases * pixels,
                  first - g.halo, rows + 2 * g.halo,
                  shifted(space.y_gradient, c * g.phases * space.y_gradient.stride));
    }
    if (wants_weights) {
      for (int64_t c = 0; c < channels; ++c) {
        load_rows(g, static_cast<const S*>(p.x) + (first_plane + c) * pixels, first - g.reach_y,
                  rows + 2 * g.reach_y, space.x[c]);
      }
      add_weights_gradient(g, space, rows, channels);
    }
    if (gradients.x != nullptr) {
      store_x_gradient(g, space, first, rows, channels,
                       static_cast<S*>(gradients.x) + first_plane * pixels);
    }
  }
  if (wants_weights) {
    if (p.softmax) {
      normalise_backward(g, rows, shifted(space.weights, g.halo * g.pitch), space.weights_gradient);
    }
    store_weights<S>(p, g, index, first, rows, space.weights_gradient, gradients.weights);
  }
}

// ---- by element type ----------------------------------------------------------------------------

int64_t blocks(const Problem& p, bool backward, bool with_halo) {
  return by_dtype(p.dtype, [&](auto element) {
    const Geometry g = geometry<Compute<decltype(element)>>(p, backward, with_halo);
    return p.n * p.groups * g.row_blocks;
  });
}

int64_t forward_blocks(const Problem& p) {
  return blocks(p, false, false);
}

int64_t backward_blocks(const Problem& p, const Gradients& gradients) {
  return blocks(p, true, gradients.x != nullptr);
}

size_t forward_scratch(const Problem& p) {
  return by_dtype(p.dtype, [&](auto element) {
    using T = Compute<decltype(element)>;
    Arena counting;
    forward_space<T>(geometry<T>(p, false, false), counting);
    return static_cast<size_t>(counting.used);
  });
}

size_t backward_scratch(const Problem& p, const Gradients& gradients) {
  return by_dtype(p.dtype, [&](auto element) {
    using T = Compute<decltype(element)>;
    Arena counting;
    backward_space<T>(geometry<T>(p, true, gradients.x != nullptr), counting);
    return static_cast<size_t>(counting.used);
  });
}

void forward_block_any(const Problem& p, void* y, int64_t block, void* scratch) {
  by_dtype(p.dtype, [&](auto element) {
    using S = decltype(element);
    forward_block<S, Compute<S>>(p, y, block, scratch);
  });
}

void backward_block_any(const Problem& p, const Gradients& gradients, int64_t block,
                        void* scratch) {
  by_dtype(p.dtype, [&](auto element) {
    using S = decltype(element);
    backward_block<S, Compute<S>>(p, gradients, block, scratch);
  });
}

}  // namespace

// `extern` because a const object is otherwise local to its file.
extern const reassembly::Kernels reassembly_kernels;
const reassembly::Kernels reassembly_kernels = {forward_blocks,    forward_scratch,
                                                forward_block_any, backward_blocks,
                                                backward_scratch,  backward_block_any};

}  // namespace famseg::FAMSEG_ISA
