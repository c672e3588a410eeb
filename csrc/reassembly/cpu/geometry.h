// How images lie in scratch memory, and how they are cut into blocks, runs and pieces.
//
// Weights lie as planes of pixels of x, one for each (tap, phase), a phase being one of the s x s
// output pixels above a pixel of x. Logits in NCHW already are such planes. Lanes are pixels, so
// one vector of a row serves 16 softmaxes side by side:
//
//   margin | row: w pixels, gap >= the reach | row ... | margin
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

#include "common/scratch.h"
#include "common/simd.h"
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
  // The encoder's taps to each side of its middle one that reach within the image; 0 without one.
  int64_t encoder_y, encoder_x, dilation;
  int64_t margin, pitch;  // see the top of this file
  int64_t rows, row_blocks, columns, column_blocks;
  int64_t halo;       // rows of weights above and below the block's own
  int64_t side;       // columns of x loaded on both sides of the block's own; 0: rows are not cut
  int64_t halo_side;  // and columns of weights
  int64_t run_rows;   // rows that one run of vectors goes over
  int64_t chunk;      // channels whose images are in scratch at a time

  // How far, in pixels, the encoder's taps reach.
  int64_t encoder_reach_y() const { return encoder_y * dilation; }
  int64_t encoder_reach_x() const { return encoder_x * dilation; }

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
  g.reach_y = min(p.kernel_size / 2, p.h - 1);
  g.reach_x = min(p.kernel_size / 2, p.w - 1);
  if (p.encoder != nullptr) {
    g.dilation = p.encoder->dilation;
    g.encoder_y = min(p.encoder->kernel_size / 2, (p.h - 1) / g.dilation);
    g.encoder_x = min(p.encoder->kernel_size / 2, (p.w - 1) / g.dilation);
  }
  // The last vector of a run may hang over by a vector, and loads are shifted by the reach.
  const int64_t reach = max(g.reach_x, g.encoder_reach_x());
  const int64_t beside = round_up(reach, lanes);
  g.margin = beside + lanes;
  g.halo = with_halo ? g.reach_y : 0;

  // Rows are cut where the fewest of them that are worth a block would take twice the memory.
  const int64_t column_bytes = g.taps * g.phases * static_cast<int64_t>(sizeof(T));
  const int64_t fewest = max(2 * g.reach_y, 1) + 2 * g.halo;
  const int64_t longest = max(2 * weight_bytes / (column_bytes * fewest), 8 * lanes);
  g.column_blocks = (p.w + longest - 1) / longest;
  const bool cut = g.column_blocks > 1;
  g.columns = cut ? round_up((p.w + g.column_blocks - 1) / g.column_blocks, lanes) : p.w;
  g.column_blocks = (p.w + g.columns - 1) / g.columns;
  g.side = cut ? beside : 0;
  g.halo_side = with_halo ? g.side : 0;
  g.pitch = cut ? g.columns + 2 * beside : p.w < lanes ? p.w + reach : round_up(p.w + reach, lanes);

  // At least as many rows as the reach on both sides: x is loaded twice at most, and at most half
  // of the weights are computed for other blocks.
  const int64_t fitting = max(weight_bytes / (column_bytes * g.pitch) - 2 * g.halo, 2 * g.halo);
  const int64_t fair = max(p.h * p.n * p.groups * g.column_blocks / kBlocks, 2 * g.reach_y);
  const int64_t most = min(max(min(fitting, fair), 1), p.h);
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
          {row, min(g.rows, g.height - row), column, min(g.columns, g.width - column)}};
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
    const int64_t rows = min(g.run_rows, region.rows - row);
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

// Tiles hold in registers at most so many phases, and channels (or vectors of them): 4 x 4 sums, 4
// weights and an input fit into 32 registers; 2 x 4 into 16.
constexpr int kMostPhases = 4;
constexpr int kMostChannels = kVectorRegisters >= 32 ? 4 : 2;

}  // namespace famseg::FAMSEG_ISA
