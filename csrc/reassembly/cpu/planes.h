// How images lie in scratch memory, how they get there and back, and the softmax: what the kernels
// of all element types share.
//
// Weights lie as planes of pixels of x, one for each (tap, phase), a phase being one of the s x s
// output pixels above a pixel of x. Logits in NCHW already are such planes. Lanes are pixels, so
// one vector of a row serves 16 softmaxes side by side:
//
//   margin | row: w pixels, gap >= reach_x | row ... | margin
//
// The gap right of a row is also the margin left of the next one; images are zero there. Rows
// shorter than a vector lie as close as that allows, and one run of vectors goes over all of them:
// a 4 x 4 image is 2 vectors of 16, not 4. Longer rows begin at whole vectors, a run each.
//
// Rows too long for the cache are cut into blocks of columns. What lies beside a block is then
// loaded with it, whole vectors of it, into a gap wide enough for two.
//
// For kernel files only: see common/simd.h.
#pragma once

#include "common/half.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "common/transpose.h"
#include "reassembly/cpu/kernels.h"

namespace famseg::FAMSEG_ISA {

using reassembly::Gradients;
using reassembly::Problem;

// Shares of a core's L2 cache, of which there is 1 MB or more.
constexpr int64_t kForwardWeightBytes = 256 << 10;
constexpr int64_t kBackwardWeightBytes = 384 << 10;
constexpr int64_t kImageBytes = 256 << 10;
// Blocks to aim at: enough to even out a few threads that are not equally fast. What a block
// computes does not depend on its size.
constexpr int64_t kBlocks = 8;

struct Geometry {
  int64_t height, width, channels;  // of x, and of one group
  int64_t kernel, taps, scale, phases;
  // How far taps reach within the image: what is farther off meets only zeros.
  int64_t reach_y, reach_x;
  int64_t margin, pitch;  // see the top of this file
  int64_t rows, row_blocks, columns, column_blocks;
  int64_t halo;       // rows of weights above and below the block's own
  int64_t side;       // columns of x loaded on both sides of the block's own; 0: rows are not cut
  int64_t halo_side;  // and columns of weights
  int64_t run_rows;   // rows that one run of vectors goes over
  int64_t chunk;      // channels whose images are in scratch at a time

  // Elements of a plane of so many rows: not a multiple of 4 KB, at which the same pixel of all
  // planes would compete for one set of the L1 cache.
  template <typename T>
  int64_t plane(int64_t plane_rows) const {
    constexpr int64_t line = kAlignment / static_cast<int64_t>(sizeof(T));
    const int64_t lines = round_up(2 * margin + plane_rows * pitch, line) / line;
    return (lines + 1 - lines % 2) * line;
  }
};

// All but the chunk.
template <typename T>
Geometry geometry(const Problem& p, int64_t weight_bytes, bool with_halo) {
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
  const int64_t beside = round_up(g.reach_x, lanes);
  g.margin = beside + lanes;
  g.halo = with_halo ? g.reach_y : 0;

  // Rows are cut where the fewest of them that are worth a block would take twice the memory.
  const int64_t column_bytes = g.taps * g.phases * static_cast<int64_t>(sizeof(T));
  const int64_t fewest = larger(2 * g.reach_y, 1) + 2 * g.halo;
  const int64_t longest = larger(2 * weight_bytes / (column_bytes * fewest), 8 * lanes);
  g.column_blocks = (p.w + longest - 1) / longest;
  const bool cut = g.column_blocks > 1;
  g.columns = cut ? round_up((p.w + g.column_blocks - 1) / g.column_blocks, lanes) : p.w;
  g.column_blocks = (p.w + g.columns - 1) / g.columns;
  g.side = cut ? beside : 0;
  g.halo_side = with_halo ? g.side : 0;
  g.pitch = cut           ? g.columns + 2 * beside
            : p.w < lanes ? p.w + g.reach_x
                          : round_up(p.w + g.reach_x, lanes);

  // At least as many rows as the reach on both sides: x is loaded twice at most, and at most half
  // of the weights are computed for other blocks.
  const int64_t fitting = larger(weight_bytes / (column_bytes * g.pitch) - 2 * g.halo, 2 * g.halo);
  const int64_t fair = larger(p.h * p.n * p.groups * g.column_blocks / kBlocks, 2 * g.reach_y);
  const int64_t most = smaller(larger(smaller(fitting, fair), 1), p.h);
  g.row_blocks = (p.h + most - 1) / most;
  g.rows = (p.h + g.row_blocks - 1) / g.row_blocks;
  g.run_rows = p.w < lanes ? g.rows + 2 * g.halo : 1;
  return g;
}

// Rows and columns of x.
struct Region {
  int64_t row, rows, column, columns;

  Region grown(int64_t by_rows, int64_t by_columns) const {
    return {row - by_rows, rows + 2 * by_rows, column - by_columns, columns + 2 * by_columns};
  }
};

// What is computed at a time: a region of group `index`, counted through the batch.
struct Block {
  int64_t index;
  Region region;
};

inline int64_t block_count(const Problem& p, const Geometry& g) {
  return p.n * p.groups * g.row_blocks * g.column_blocks;
}

inline Block block_at(const Geometry& g, int64_t number) {
  const int64_t column = number % g.column_blocks * g.columns;
  const int64_t row = number / g.column_blocks % g.row_blocks * g.rows;
  return {number / (g.column_blocks * g.row_blocks),
          {row, smaller(g.rows, g.height - row), column, smaller(g.columns, g.width - column)}};
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

// Calls f(part, begin, end) for the runs that cover a region and `side` columns more on both sides:
// the run's own part of the region, and where its vectors begin and end, counted from the region's
// first pixel.
template <typename T, typename F>
[[gnu::always_inline]] inline void for_each_run(const Geometry& g, const Region& region,
                                                int64_t side, const F& f) {
  for (int64_t row = 0; row < region.rows; row += g.run_rows) {
    const int64_t rows = smaller(g.run_rows, region.rows - row);
    const int64_t pixels = (rows - 1) * g.pitch + region.columns + side;
    f(Region{region.row + row, rows, region.column, region.columns}, row * g.pitch - side,
      row * g.pitch + round_up(pixels, kLanes<T>));
  }
}

template <typename T>
int64_t vectors_of(const Geometry& g, const Region& region) {
  int64_t vectors = 0;
  for_each_run<T>(g, region, 0, [&](const Region&, int64_t begin, int64_t end) {
    vectors += (end - begin) / kLanes<T>;
  });
  return vectors;
}

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

constexpr int kMostPhases = 4;

// ---- vectors in and out -------------------------------------------------------------------------

// The first `count` elements, zeros behind them: there memory may end.
template <typename S>
[[gnu::always_inline]] inline Vector<Compute<S>> load_some(const S* p, int64_t count) {
  constexpr int64_t lanes = kLanes<Compute<S>>;
  if (count >= lanes) return load_wide(p);
  S some[lanes] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = p[i];
  return load_wide(some);
}

template <typename S>
[[gnu::always_inline]] inline void store_some(S* p, Vector<Compute<S>> v, int64_t count) {
  constexpr int64_t lanes = kLanes<Compute<S>>;
  if (count >= lanes) return store_narrow(p, v);
  S some[lanes];
  store_narrow(some, v);
  for (int64_t i = 0; i < count; ++i) p[i] = some[i];
}

// ---- tensors in memory --------------------------------------------------------------------------

// Some channels of one image at s times the resolution of x, in NCHW or NHWC.
template <typename S>
struct Image {
  S* at;
  int64_t scale;
  int64_t channel, line, column;  // strides

  bool channels_last() const { return column != 1; }
  // Line dy and column dx of the s x s pixels above pixel (row, 0) of x.
  S* pixel(int64_t row, int64_t dy, int64_t dx) const {
    return at + (row * scale + dy) * line + dx * column;
  }
  Image from_channel(int64_t c) const { return {at + c * channel, scale, channel, line, column}; }
};

template <typename S>
Image<S> image(const Geometry& g, S* tensor, bool channels_last, int64_t scale, int64_t index,
               int64_t channels, int64_t first_channel) {
  const int64_t width = g.width * scale, pixels = g.height * scale * width;
  S* at = tensor + index * channels * pixels;
  if (channels_last) return {at + first_channel, scale, 1, width * channels, channels};
  return {at + first_channel * pixels, scale, pixels, width, 1};
}

// Group `index`, counted through the batch, of x or y (or a gradient), from one of its channels on.
template <typename S>
Image<S> features_image(const Problem& p, const Geometry& g, S* tensor, int64_t scale,
                        int64_t index, int64_t channel) {
  return image(g, tensor, p.x_channels_last, scale, index / p.groups, p.c,
               index % p.groups * g.channels + channel);
}

// The weights (or their gradient) of group `index`, counted through the batch: logits are phases
// next to each other in the channels, masks in the image.
template <typename S>
Image<S> weights_image(const Problem& p, const Geometry& g, S* tensor, int64_t index) {
  const int64_t channels = p.softmax ? g.taps * g.phases : g.taps;
  return image(g, tensor, p.weights_channels_last, p.softmax ? 1 : g.scale, index / p.groups,
               p.groups * channels, index % p.groups * channels);
}

// Asks for memory that is needed soon. Rows of a block are short runs far apart, which the hardware
// does not foresee (about 5 % of the fp32 forward where measured).
template <typename S>
[[gnu::always_inline]] inline void prefetch(const S* line, int64_t count) {
  constexpr int64_t step = kAlignment / static_cast<int64_t>(sizeof(S));
  for (int64_t i = 0; i < count; i += step) __builtin_prefetch(line + i);
}

// A region of the first channel.
template <typename S>
[[gnu::always_inline]] inline void prefetch(Image<S> image, const Region& region) {
  for (int64_t line = 0; line < region.rows * image.scale; ++line) {
    prefetch(image.pixel(region.row, line, region.column * image.scale),
             region.columns * image.scale);
  }
}

// Asks for the memory of a region of some channels bit by bit while `work` is done on others: about
// as fast as it arrives, and no faster than the core can keep in mind.
template <typename S>
class Ahead {
 public:
  Ahead(const Geometry& g, Image<S> image, int64_t channels, const Region& region, int64_t work)
      : work_(work) {
    const int64_t row = larger(region.row, 0), column = larger(region.column, 0);
    const int64_t lines = (smaller(region.row + region.rows, g.height) - row) * image.scale;
    const int64_t pixels =
        (smaller(region.column + region.columns, g.width) - column) * image.scale;
    line_ = image.pixel(row, 0, column * image.scale);
    if (image.channels_last()) {
      outer_ = {lines, image.line};
      inner_ = {pixels, image.column};
      length_ = channels;
    } else {
      outer_ = {channels, image.channel};
      inner_ = {lines, image.line};
      length_ = pixels;
    }
    total_ = outer_.count * inner_.count * ((length_ + kStep - 1) / kStep);
    left_ = inner_.count;
  }

  // When so much more of the work is done.
  void ask(int64_t done) {
    due_ += done * total_;
    for (; due_ >= work_ && outer_.count > 0; due_ -= work_) {
      __builtin_prefetch(line_ + at_, 0, 2);
      at_ += kStep;
      if (at_ < length_) continue;
      at_ = 0;
      line_ += inner_.stride;
      if (--left_ > 0) continue;
      left_ = inner_.count;
      line_ += outer_.stride - inner_.count * inner_.stride;
      --outer_.count;
    }
  }

 private:
  static constexpr int64_t kStep = kAlignment / static_cast<int64_t>(sizeof(S));
  struct Loop {
    int64_t count, stride;
  };
  S* line_;
  Loop outer_, inner_;
  int64_t length_, total_, work_, left_;
  int64_t at_ = 0, due_ = 0;
};

// ---- planes in and out --------------------------------------------------------------------------

template <typename T, int... I>
[[gnu::always_inline]] inline void deinterleave(Vector<T>& a, Vector<T>& b, Indices<I...>) {
  const Vector<T> even = __builtin_shufflevector(a, b, (2 * I)...);
  b = __builtin_shufflevector(a, b, (2 * I + 1)...);
  a = even;
}

template <typename T, int... I>
[[gnu::always_inline]] inline void interleave(Vector<T>& a, Vector<T>& b, Indices<I...>) {
  constexpr int lanes = kLanes<T>;
  const Vector<T> low = __builtin_shufflevector(a, b, (I / 2 + I % 2 * lanes)...);
  b = __builtin_shufflevector(a, b, ((lanes + I) / 2 + I % 2 * lanes)...);
  a = low;
}

template <typename T>
using Lanes = typename CountTo<kLanes<T>>::type;

// Two vectors of elements of memory, the even ones and the odd ones.
template <typename S>
[[gnu::always_inline]] inline void load_split(const S* p, Vector<Compute<S>>& even,
                                              Vector<Compute<S>>& odd) {
  using T = Compute<S>;
  even = load_wide(p);
  odd = load_wide(p + kLanes<T>);
  deinterleave<T>(even, odd, Lanes<T>());
}

template <typename S>
[[gnu::always_inline]] inline void store_joined(S* p, Vector<Compute<S>> even,
                                                Vector<Compute<S>> odd) {
  using T = Compute<S>;
  interleave<T>(even, odd, Lanes<T>());
  store_narrow(p, even);
  store_narrow(p + kLanes<T>, odd);
}

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
// A pair of bfloat16 is the upper halves of two floats: no shuffles, no conversion of widths.
typedef uint32_t PairBits __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));

[[gnu::always_inline]] inline void load_split(const Bfloat16* p, Vector<float>& even,
                                              Vector<float>& odd) {
  const Vector<uint32_t> pairs = *reinterpret_cast<const PairBits*>(p);
  even = reinterpret_cast<Vector<float>>(pairs << 16);
  odd = reinterpret_cast<Vector<float>>(pairs & 0xffff0000);
}

[[gnu::always_inline]] inline void store_joined(Bfloat16* p, Vector<float> even,
                                                Vector<float> odd) {
  *reinterpret_cast<PairBits*>(p) = bfloat16_bits(even) >> 16 | (bfloat16_bits(odd) & 0xffff0000);
}
#endif

// One line of an image in NCHW into the rows of `scale` phases, which lie `stride` apart. The last
// vector puts zeros into the gap behind the row or into the row behind that, which comes later.
// Lines are short, a few vectors: inlined, because a call would be a third of their time.
template <typename S, typename T>
[[gnu::always_inline]] inline void load_line(const S* line, int64_t scale, int64_t width, T* to,
                                             int64_t stride) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t j = 0;
  if (scale == 1) {
    for (; j + lanes <= width; j += lanes) store(to + j, load_wide(line + j));
    if (j < width) store(to + j, load_some(line + j, width - j));
  } else if (scale == 2) {
    Vector<T> even, odd;
    for (; j + lanes <= width; j += lanes) {
      load_split(line + 2 * j, even, odd);
      store(to + j, even);
      store(to + stride + j, odd);
    }
    if (j < width) {
      S some[2 * lanes] = {};
      for (int64_t i = 0; i < 2 * (width - j); ++i) some[i] = line[2 * j + i];
      load_split(some, even, odd);
      store(to + j, even);
      store(to + stride + j, odd);
    }
  } else {
    for (int64_t dx = 0; dx < scale; ++dx) {
      for (j = 0; j < width; ++j) to[dx * stride + j] = widen(line[scale * j + dx]);
    }
  }
}

template <typename S, typename T>
[[gnu::always_inline]] inline void store_line(const T* from, int64_t stride, int64_t scale,
                                              int64_t width, S* line) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t j = 0;
  if (scale == 1) {
    for (; j + lanes <= width; j += lanes) store_narrow(line + j, load(from + j));
    if (j < width) store_some(line + j, load(from + j), width - j);
  } else if (scale == 2) {
    for (; j + lanes <= width; j += lanes) {
      store_joined(line + 2 * j, load(from + j), load(from + stride + j));
    }
    if (j < width) {
      S some[2 * lanes];
      store_joined(some, load(from + j), load(from + stride + j));
      for (int64_t i = 0; i < 2 * (width - j); ++i) line[2 * j + i] = some[i];
    }
  } else {
    for (int64_t dx = 0; dx < scale; ++dx) {
      for (j = 0; j < width; ++j) narrow(line[scale * j + dx], from[dx * stride + j]);
    }
  }
}

// A region of some channels as planes (channel, phase), zeros outside the image.
template <typename S, typename T>
void load_planes(const Geometry& g, Image<const S> from, int64_t channels, const Region& region,
                 Planes<T> to) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t scale = from.scale, phases = scale * scale;
  const int64_t begin = larger(0, -region.row), end = smaller(region.rows, g.height - region.row);
  const int64_t left = larger(0, -region.column);
  const int64_t right = smaller(region.columns, g.width - region.column), width = right - left;
  const auto clear = [&](int64_t row, int64_t from_column, int64_t to_column) {
    if (from_column >= to_column) return;
    for (int64_t plane = 0; plane < channels * phases; ++plane) {
      for (int64_t j = from_column; j < to_column; ++j) to[plane][row * g.pitch + j] = T(0);
    }
  };
  for (int64_t i = 0; i < region.rows; ++i) {
    const bool inside = begin <= i && i < end;
    clear(i, 0, inside ? left : region.columns);
    clear(i, inside ? right : region.columns, region.columns);
  }
  const auto first_pixel = [&](int64_t row, int64_t dy, int64_t dx) {
    return from.pixel(region.row + row, dy, (region.column + left) * scale + dx);
  };
  if (!from.channels_last()) {
    for (int64_t c = 0; c < channels; ++c) {
      const S* line = first_pixel(begin, 0, 0) + c * from.channel;
      T* rows = to[c * phases] + begin * g.pitch + left;
      for (int64_t i = begin; i < end; ++i, rows += g.pitch) {
        T* row = rows;
        for (int64_t dy = 0; dy < scale; ++dy, line += from.line, row += scale * to.stride) {
          if (c + 1 < channels) prefetch(line + from.channel, width * scale);
          load_line(line, scale, width, row, to.stride);
        }
      }
    }
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t phase = 0; phase < phases; ++phase) {
      const S* line = first_pixel(i, phase / scale, phase % scale);
      for (int64_t j = 0; j < width; j += lanes) {
        const S* at = line + j * scale * from.column;
        const int64_t pixels = smaller(lanes, width - j);
        for (int64_t c = 0; c < channels; c += lanes) {
          // The zeros of the last vector go where load_line's do.
          T* row = to[c * phases + phase] + i * g.pitch + left + j;
          Vector<T> v[lanes];
          if (pixels == lanes && c + lanes <= channels) {
#pragma GCC unroll 16
            for (int r = 0; r < lanes; ++r) v[r] = load_wide(at + r * scale * from.column + c);
            transpose_from<1, T>(v);
#pragma GCC unroll 16
            for (int r = 0; r < lanes; ++r) store(row + r * phases * to.stride, v[r]);
          } else {
            for (int r = 0; r < lanes; ++r) {
              v[r] = r < pixels ? load_some(at + r * scale * from.column + c, channels - c)
                                : Vector<T>{};
            }
            transpose_from<1, T>(v);
            for (int r = 0; r < lanes && c + r < channels; ++r) {
              store(row + r * phases * to.stride, v[r]);
            }
          }
        }
      }
    }
  }
}

template <typename S, typename T>
void store_planes(const Geometry& g, Planes<T> from, int64_t channels, const Region& region,
                  Image<S> to) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t scale = to.scale, phases = scale * scale;
  if (!to.channels_last()) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = 0; i < region.rows; ++i) {
        for (int64_t dy = 0; dy < scale; ++dy) {
          store_line(from[c * phases + dy * scale] + i * g.pitch, from.stride, scale,
                     region.columns,
                     to.pixel(region.row + i, dy, region.column * scale) + c * to.channel);
        }
      }
    }
    return;
  }
  for (int64_t i = 0; i < region.rows; ++i) {
    for (int64_t phase = 0; phase < phases; ++phase) {
      S* line = to.pixel(region.row + i, phase / scale, region.column * scale + phase % scale);
      for (int64_t j = 0; j < region.columns; j += lanes) {
        S* at = line + j * scale * to.column;
        const int64_t pixels = smaller(lanes, region.columns - j);
        for (int64_t c = 0; c < channels; c += lanes) {
          const T* row = from[c * phases + phase] + i * g.pitch + j;
          Vector<T> v[lanes];
          if (pixels == lanes && c + lanes <= channels) {
#pragma GCC unroll 16
            for (int r = 0; r < lanes; ++r) v[r] = load(row + r * phases * from.stride);
            transpose_from<1, T>(v);
#pragma GCC unroll 16
            for (int r = 0; r < lanes; ++r) store_narrow(at + r * scale * to.column + c, v[r]);
          } else {
            for (int r = 0; r < lanes; ++r) {
              v[r] = c + r < channels ? load(row + r * phases * from.stride) : Vector<T>{};
            }
            transpose_from<1, T>(v);
            for (int r = 0; r < pixels; ++r) {
              store_some(at + r * scale * to.column + c, v[r], channels - c);
            }
          }
        }
      }
    }
  }
}

// ---- weights ------------------------------------------------------------------------------------

// e^x for x <= 0 to about an ulp: without exponential()'s care for large results, and with e^-86.5
// for all below that, which beside a softmax's largest term 1 is nothing.
template <typename T>
[[gnu::always_inline]] inline Vector<T> exponential_of_negative(Vector<T> x) {
  using Of = ExponentialOf<T>;
  using Integer = typename Of::Integer;
  constexpr T log2_e = T(1.44269504088896340736);
  constexpr T magic = T(3) * static_cast<T>(Integer(1) << (Of::mantissa_bits - 1));
  const Vector<T> bottom = broadcast(Of::low);
  x = x < bottom ? bottom : x;
  const Vector<T> shifted = x * log2_e + magic;
  const Vector<T> n = shifted - magic;
  const Vector<T> r = x - n * Of::ln2_high - n * Of::ln2_low;
  Vector<T> sum = broadcast(Of::polynomial[0]);
#pragma GCC unroll 16
  for (int i = 1; i < static_cast<int>(sizeof Of::polynomial / sizeof(T)); ++i) {
    sum = sum * r + Of::polynomial[i];
  }
  sum = sum * r * r + r + T(1);
  const Vector<Integer> exponent = reinterpret_cast<Vector<Integer>>(shifted) + Of::bias;
  return sum * reinterpret_cast<Vector<T>>(exponent << Of::mantissa_bits);
}

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
      const Vector<T> e = exponential_of_negative<T>(load(at) - most[phase]);
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

// The weights of a region of group `index` as planes (tap, phase). Gaps between rows are normalised
// along: they hold finite numbers and meet zeros. Calls during(1) for each vector of pixels that it
// normalises.
template <typename S, typename T, typename During>
void load_weights(const Problem& p, const Geometry& g, int64_t index, const Region& region,
                  Planes<T> to, const During& during) {
  const auto image = weights_image(p, g, static_cast<const S*>(p.weights), index);
  if (!p.softmax) {
    load_planes(g, image, g.taps, region, to);
    return;
  }
  const int64_t planes = g.taps * g.phases;
  // Two rows at a time, whole runs: the next ones come from memory while these are normalised.
  const int64_t most = g.run_rows > 1 ? region.rows : 2;
  for (int64_t row = 0; row < region.rows; row += most) {
    const auto part = [&](int64_t first) {
      return Region{region.row + first, smaller(most, region.rows - first), region.column,
                    region.columns};
    };
    const Planes<T> rows = shifted(to, row * g.pitch);
    load_planes(g, image, planes, part(row), rows);
    Ahead next(g, image, row + most < region.rows ? planes : 0, part(row + most),
               vectors_of<T>(g, part(row)));
    for_each_run<T>(g, part(row), 0, [&](const Region&, int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; at += kLanes<T>) {
        for_each_piece<kMostPhases>(g.phases, [&](auto piece, int64_t phase) {
          normalise_tile<decltype(piece)::value, T>(g, shifted(rows, phase * rows.stride + at));
        });
        next.ask(1);
        during(1);
      }
    });
  }
}

}  // namespace famseg::FAMSEG_ISA
