// The forward pass of the room's operations for one instruction set (see common/simd.h: this file
// is compiled once for each).
//
// A block is some rows of one (n, group). Its weights are normalised once for all channels and stay
// in the L2 cache as planes (geometry.h).
//
// In NCHW lanes are pixels of x: a vector of x serves all phases, and a vector of weights several
// channels. In NHWC lanes are channels: a weight is spread over a vector, every load is aligned,
// and nothing is turned over. (The same loop for NCHW, turning x and y over on their way, was at
// least 13 % slower than lanes of pixels.)

#include "reassembly/cpu/encoder.h"

namespace famseg::FAMSEG_ISA {
namespace {

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

// Some vectors of channels and some phases of the result at one pixel of x; g.chunk elements lie
// between pixels of x and between phases.
template <int VECTORS, int PHASES, typename T>
void channels_last_tile(const Geometry& g, const T* x, int64_t x_row, Planes<T> weights, T* out) {
  Vector<T> sum[VECTORS][PHASES] = {};
  for (int64_t ty = -g.reach_y; ty <= g.reach_y; ++ty) {
    const int64_t row_tap = (ty + g.kernel / 2) * g.kernel + g.kernel / 2;
    const T* in = x + ty * x_row - g.reach_x * g.chunk;
    const T* weight = weights[(row_tap - g.reach_x) * g.phases];
    for (int64_t tx = -g.reach_x; tx <= g.reach_x; ++tx) {
      Vector<T> factor[PHASES];
#pragma GCC unroll 4
      for (int phase = 0; phase < PHASES; ++phase)
        factor[phase] = broadcast(weight[phase * weights.stride]);
#pragma GCC unroll 4
      for (int c = 0; c < VECTORS; ++c) {
        const Vector<T> v = load(in + c * kLanes<T>);
#pragma GCC unroll 4
        for (int phase = 0; phase < PHASES; ++phase) sum[c][phase] += factor[phase] * v;
      }
      in += g.chunk;
      weight += g.phases * weights.stride;
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < VECTORS; ++c) {
#pragma GCC unroll 4
    for (int phase = 0; phase < PHASES; ++phase)
      store(out + phase * g.chunk + c * kLanes<T>, sum[c][phase]);
  }
}

template <typename T>
Geometry block_geometry(const Problem& p) {
  constexpr int64_t lanes = kLanes<T>;
  Geometry g = geometry<T>(p, kForwardWeightBytes, false);
  const int64_t rows = g.rows + 2 * g.reach_y;
  if (p.x_channels_last) {
    const int64_t vector_bytes = rows * (g.columns + 2 * g.reach_x) * kVectorBytes;
    const int64_t fitting = min(max(kImageBytes / vector_bytes, 1), kMostChannels);
    g.chunk = min(fitting * lanes, round_up(g.channels, lanes));
  } else {
    const int64_t plane_bytes = g.plane<T>(rows) * static_cast<int64_t>(sizeof(T));
    g.chunk = min(max(kImageBytes / plane_bytes / 4 * 4, 4), g.channels);
  }
  return g;
}

template <typename T>
struct Space {
  Planes<T> weights;     // (tap, phase), the block's rows
  Planes<T> compressed;  // with an encoder: its channels, the block's rows and its reach
  // NCHW
  Planes<T> x;    // a chunk of channels, the block's rows and the reach above and below
  Planes<T> out;  // (channel, phase), one run
  // NHWC
  T* pixels;           // (row, pixel, channel) of a chunk, with the reach on all sides
  int64_t pixels_row;  // elements of a row
  T* phases;           // (phase, channel) of a pixel
};

template <typename T>
Space<T> take_space(const Problem& p, const Geometry& g, Arena& arena) {
  Space<T> space{};
  const int64_t rows = g.rows + 2 * g.reach_y;
  space.weights = take_planes<T>(arena, g, g.taps * g.phases, g.rows);
  if (p.encoder != nullptr) {
    space.compressed = take_planes<T>(arena, compressed_geometry(g), p.encoder->channels,
                                      g.rows + 2 * g.encoder_reach_y());
  }
  if (p.x_channels_last) {
    space.pixels_row = (g.columns + 2 * g.reach_x) * g.chunk;
    space.pixels = arena.take<T>(rows * space.pixels_row);
    space.phases = arena.take<T>(g.phases * g.chunk);
  } else {
    space.x = take_planes<T>(arena, g, g.chunk, rows);
    space.out = take_planes<T>(arena, g, kMostChannels * g.phases, min(g.run_rows, g.rows));
  }
  return space;
}

// The result above a region, of a chunk of channels.
template <typename S, typename T>
void forward_planes(const Geometry& g, const Space<T>& space, int64_t channels,
                    const Region& region, Image<const S> from, Image<S> to) {
  load_planes(g, from, channels, region.grown(g.reach_y, g.side), shifted(space.x, -g.side));
  for_each_run<T>(g, region, 0, [&](const Region& run, int64_t begin, int64_t end) {
    for_each_piece<kMostChannels>(channels, [&](auto piece, int64_t c) {
      constexpr int count = decltype(piece)::value;
      if (c == 0) {
        for (int64_t k = 0; k < count; ++k) prefetch(to.from_channel(k), run);
      }
      const int64_t next = min(kMostChannels, channels - c - count);
      Ahead result(g, to.from_channel(c + count), next, run, (end - begin) / kLanes<T> * g.phases);
      for_each_piece<kMostPhases>(g.phases, [&](auto phase_piece, int64_t phase) {
        for (int64_t at = begin; at < end; at += kLanes<T>) {
          forward_tile<count, decltype(phase_piece)::value, T>(
              g, shifted(space.x, c * space.x.stride + g.reach_y * g.pitch + at),
              shifted(space.weights, phase * space.weights.stride + at),
              shifted(space.out, phase * space.out.stride + at - begin));
          result.ask(decltype(phase_piece)::value);
        }
      });
      store_planes(g, space.out, count, run, to.from_channel(c));
    });
  });
}

template <typename S, typename T>
void forward_pixels(const Geometry& g, const Space<T>& space, int64_t channels,
                    const Region& region, Image<const S> from, Image<S> to) {
  constexpr int64_t lanes = kLanes<T>;
  const Region read = region.grown(g.reach_y, g.reach_x);
  for (int64_t i = 0; i < read.rows; ++i) {
    const int64_t row = read.row + i;
    T* pixel = space.pixels + i * space.pixels_row;
    for (int64_t j = 0; j < read.columns; ++j, pixel += g.chunk) {
      const int64_t column = read.column + j;
      const bool inside = row >= 0 && row < g.height && column >= 0 && column < g.width;
      const S* in = from.pixel(row, 0, column);
      for (int64_t c = 0; c < channels; c += lanes) {
        store(pixel + c, inside ? load_some(in + c, channels - c) : Vector<T>{});
      }
    }
  }
  const int64_t vectors = (channels + lanes - 1) / lanes;
  for (int64_t row = 0; row < region.rows; ++row) {
    const T* x = space.pixels + (row + g.reach_y) * space.pixels_row + g.reach_x * g.chunk;
    for (int64_t j = 0; j < region.columns; ++j, x += g.chunk) {
      const Planes<T> weights = shifted(space.weights, row * g.pitch + j);
      for_each_piece<kMostPhases>(g.phases, [&](auto phase_piece, int64_t phase) {
        for_each_piece<kMostChannels>(vectors, [&](auto piece, int64_t v) {
          channels_last_tile<decltype(piece)::value, decltype(phase_piece)::value, T>(
              g, x + v * lanes, space.pixels_row, shifted(weights, phase * weights.stride),
              space.phases + phase * g.chunk + v * lanes);
        });
      });
      const T* at = space.phases;
      for (int64_t dy = 0; dy < g.scale; ++dy) {
        S* out = to.pixel(region.row + row, dy, (region.column + j) * g.scale);
        for (int64_t dx = 0; dx < g.scale; ++dx, at += g.chunk, out += to.column) {
          for (int64_t c = 0; c < channels; c += lanes) {
            store_some(out + c, load(at + c), channels - c);
          }
        }
      }
    }
  }
}

template <typename S, typename T>
void compute_block(const Problem& p, void* y, int64_t number, void* scratch) {
  const Geometry g = block_geometry<T>(p);
  Arena arena{static_cast<char*>(scratch)};
  const Space<T> space = take_space<T>(p, g, arena);
  const auto [index, region] = block_at(g, number);

  const int64_t vectors = vectors_of<T>(g, region);
  for (int64_t chunk = 0; chunk < g.channels; chunk += g.chunk) {
    const int64_t channels = min(g.chunk, g.channels - chunk);
    const auto from = features_image(p, g, static_cast<const S*>(p.x), 1, index, chunk);
    const auto to = features_image(p, g, static_cast<S*>(y), g.scale, index, chunk);
    if (chunk == 0) {
      Ahead x(g, from, channels, region.grown(g.reach_y, g.side), vectors);
      const auto during = [&](int64_t done) { x.ask(done); };
      if (p.encoder == nullptr) {
        load_weights<S>(p, g, index, region, space.weights, during);
      } else {
        load_compressed<S>(p, g, index, region, 0, space.compressed);
        encode_weights(
            p, g, index, region, 0,
            shifted(space.compressed, g.encoder_reach_y() * compressed_geometry(g).pitch),
            space.weights, during);
      }
    }
    if (p.x_channels_last) {
      forward_pixels<S, T>(g, space, channels, region, from, to);
    } else {
      forward_planes<S, T>(g, space, channels, region, from, to);
    }
  }
}

int64_t blocks(const Problem& p) {
  return by_dtype(p.dtype, [&](auto element) {
    return block_count(p, block_geometry<Compute<decltype(element)>>(p));
  });
}

size_t scratch(const Problem& p) {
  return by_dtype(p.dtype, [&](auto element) {
    using T = Compute<decltype(element)>;
    Arena counting;
    take_space<T>(p, block_geometry<T>(p), counting);
    return static_cast<size_t>(counting.used);
  });
}

void block(const Problem& p, void* y, int64_t block, void* scratch) {
  by_dtype(p.dtype, [&](auto element) {
    using S = decltype(element);
    compute_block<S, Compute<S>>(p, y, block, scratch);
  });
}

}  // namespace

// `extern` because a const object is otherwise local to its file.
extern const reassembly::ForwardKernels reassembly_forward_kernels;
const reassembly::ForwardKernels reassembly_forward_kernels = {blocks, scratch, block};

}  // namespace famseg::FAMSEG_ISA
