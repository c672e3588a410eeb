// The backward pass of the room's operations for one instruction set (see common/simd.h: this file
// is compiled once for each).
//
// Blocks, and the weights of a block, are as in forward.cpp. Lanes are always pixels of x, because
// the gradient of the weights is a sum over channels.
//
// The gradient of x is a sum over pixels to all sides of it. Products are formed and summed at the
// pixels that they come from, one sum for each column of taps, and only the sums move to the side:
// all loads are aligned, and there are 9 to 20 FMAs. Gathering products took 5 to 4, 4 of them
// across cache lines.
//
// With an encoder the gradient of the logits stays in the planes of a block, and what it gives to
// the gradients of compressed, weight and bias is added up by piece: some blocks, one below the
// other. These blocks hand on the weights that their halos share.

#include "reassembly/cpu/encoder.h"

namespace famseg::FAMSEG_ISA {
namespace {

// Taps x 4 phases of the gradient of the weights, 4 gradients and an input.
constexpr int kMostTaps = kVectorRegisters >= 32 ? 5 : 2;
// Columns of taps x kMostChannels of the gradient of x, as many gradients and a weight.
constexpr int kMostColumns = 5;

// One vector of the gradient of the weights of some neighbouring taps and phases: adds the products
// of some channels, or begins with them.
template <int TAPS, int PHASES, typename T>
void weight_gradient_tile(const Geometry& g, int64_t channels, bool first, Planes<T> x,
                          Planes<T> y_gradient, Planes<T> gradient) {
  Vector<T> sum[TAPS][PHASES];
#pragma GCC unroll 5
  for (int tap = 0; tap < TAPS; ++tap) {
#pragma GCC unroll 4
    for (int phase = 0; phase < PHASES; ++phase)
      sum[tap][phase] = first ? Vector<T>{} : load(gradient[tap * g.phases + phase]);
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

// One vector of what some channels of the result's gradient give to the gradient of x by some
// neighbouring columns of taps, each column's sum apart, at the place that it comes from.
template <int TAPS, int CHANNELS, typename T>
void x_gradient_tile(const Geometry& g, Planes<T> y_gradient, Planes<T> weights, Planes<T> out) {
  Vector<T> sum[CHANNELS][TAPS] = {};
  for (int64_t ty = -g.reach_y; ty <= g.reach_y; ++ty) {
    const T* in = y_gradient.at - ty * g.pitch;
    const T* weight = weights[(ty + g.kernel / 2) * g.kernel * g.phases] - ty * g.pitch;
    for (int64_t phase = 0; phase < g.phases; ++phase) {
      Vector<T> factor[CHANNELS];
#pragma GCC unroll 4
      for (int c = 0; c < CHANNELS; ++c) {
        factor[c] = load(in + (c * g.phases + phase) * y_gradient.stride);
      }
#pragma GCC unroll 5
      for (int tap = 0; tap < TAPS; ++tap) {
        const Vector<T> v = load(weight + (tap * g.phases + phase) * weights.stride);
#pragma GCC unroll 4
        for (int c = 0; c < CHANNELS; ++c) sum[c][tap] += factor[c] * v;
      }
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < CHANNELS; ++c) {
#pragma GCC unroll 5
    for (int tap = 0; tap < TAPS; ++tap) store(out[c * TAPS + tap], sum[c][tap]);
  }
}

template <typename T>
Geometry block_geometry(const Problem& p, const Gradients& gradients) {
  Geometry g = geometry<T>(p, kBackwardWeightBytes, gradients.x != nullptr);
  const int64_t image_bytes =
      (1 + g.phases) * g.plane<T>(g.rows + 2 * g.reach_y) * static_cast<int64_t>(sizeof(T));
  // Whole vectors of channels are turned over at a time.
  const int64_t unit = p.x_channels_last ? kLanes<T> : 4;
  g.chunk = min(max(kImageBytes / image_bytes / unit * unit, unit), g.channels);
  return g;
}

// Planes of whole rows, for sums over blocks.
template <typename T>
Geometry sum_geometry(const Geometry& g) {
  Geometry q = g;
  if (g.run_rows == 1) q.pitch = round_up(g.width, kLanes<T>) + 2 * g.side;
  return q;
}

template <typename T>
struct Space {
  Planes<T> weights;           // (tap, phase), the block's rows and the halo
  Planes<T> weights_gradient;  // (tap, phase), the block's rows; zeros around them for an encoder
  Planes<T> compressed;        // with one: its channels, rows as the weights and its reach
  Planes<T> y_gradient;        // (channel, phase) of a chunk, rows as the weights
  Planes<T> x;                 // a chunk of channels, the block's rows and the reach
  Planes<T> sums;              // (channel, column of taps) of a chunk, one run; see x_gradient_tile
  Planes<T> x_gradient;        // a chunk of channels, one run
  // With an encoder: the gradient of the weights turned over, see turn_over; and a row of a vector of
  // channels of the gradient of compressed.
  T* turned;
  Planes<T> row;
};

template <typename T>
Space<T> take_space(const Problem& p, const Geometry& g, Arena& arena) {
  Space<T> space{};
  const int64_t run_rows = min(g.run_rows, g.rows);
  space.weights = take_planes<T>(arena, g, g.taps * g.phases, g.rows + 2 * g.halo);
  const int64_t reach = g.encoder_reach_y();
  space.weights_gradient = take_planes<T>(arena, g, g.taps * g.phases, g.rows + 4 * reach);
  space.weights_gradient.at += 2 * reach * g.pitch;
  if (p.encoder != nullptr) {
    space.compressed = take_planes<T>(arena, compressed_geometry(g), p.encoder->channels,
                                      g.rows + 2 * (g.halo + reach));
  }
  space.y_gradient = take_planes<T>(arena, g, g.chunk * g.phases, g.rows + 2 * g.halo);
  space.x = take_planes<T>(arena, g, g.chunk, g.rows + 2 * g.reach_y);
  space.sums = take_planes<T>(arena, g, g.chunk * kMostColumns, run_rows);
  space.x_gradient = take_planes<T>(arena, g, g.chunk, run_rows);
  if (p.encoder != nullptr) {
    space.turned = arena.take<T>(turned_tiles<T>(g) * kTurnedLanes<T> * g.rows * g.columns);
    space.row = take_planes<T>(arena, sum_geometry<T>(g), kLanes<T>, 1);
  }
  return space;
}

// Adds a chunk of channels to the gradient of the weights, or begins with it.
template <typename T, typename During>
void add_weights_gradient(const Geometry& g, const Space<T>& space, const Region& region,
                          int64_t channels, bool first, const During& during) {
  const int64_t radius = g.kernel / 2;
  for_each_run<T>(g, region, 0, [&](const Region&, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += kLanes<T>) {
      for_each_piece<kMostPhases>(g.phases, [&](auto phase_piece, int64_t phase) {
        const Planes<T> y_gradient =
            shifted(space.y_gradient, phase * space.y_gradient.stride + g.halo * g.pitch + at);
        for (int64_t ty = -g.reach_y; ty <= g.reach_y; ++ty) {
          const Planes<T> x = shifted(space.x, (g.reach_y + ty) * g.pitch - g.reach_x + at);
          const int64_t row_tap = (ty + radius) * g.kernel + radius - g.reach_x;
          for_each_piece<kMostTaps>(2 * g.reach_x + 1, [&](auto tap_piece, int64_t tap) {
            weight_gradient_tile<decltype(tap_piece)::value, decltype(phase_piece)::value, T>(
                g, channels, first, shifted(x, tap), y_gradient,
                {space.weights_gradient[(row_tap + tap) * g.phases + phase] + at,
                 space.weights_gradient.stride});
          });
          during((2 * g.reach_x + 1) * decltype(phase_piece)::value * channels);
        }
      });
    }
  });
}

template <typename S, typename T, typename During>
void store_x_gradient(const Geometry& g, const Space<T>& space, const Region& region,
                      int64_t channels, Image<S> x_gradient, const During& during) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t first_tap = g.kernel / 2 - g.reach_x;
  for_each_run<T>(g, region, g.halo_side, [&](const Region& run, int64_t begin, int64_t end) {
    const int64_t start = begin + g.halo_side;
    for (int64_t c = 0; c < channels; ++c) prefetch(x_gradient.from_channel(c), run);
    for_each_piece<kMostColumns>(2 * g.reach_x + 1, [&](auto tap_piece, int64_t tap) {
      constexpr int taps = decltype(tap_piece)::value;
      const Planes<T> weights = shifted(
          space.weights, (first_tap + tap) * g.phases * space.weights.stride + g.halo * g.pitch);
      const Planes<T> y_gradient = shifted(space.y_gradient, g.halo * g.pitch);
      // Of vectors first, then of channels: 100 weights of a pixel stay in the L1 cache.
      for (int64_t at = begin; at < end; at += lanes) {
        for_each_piece<kMostChannels>(channels, [&](auto piece, int64_t c) {
          constexpr int count = decltype(piece)::value;
          x_gradient_tile<taps, count, T>(
              g, shifted(y_gradient, c * g.phases * y_gradient.stride + at), shifted(weights, at),
              shifted(space.sums, c * taps * space.sums.stride + at - start));
          during((2 * g.reach_y + 1) * g.phases * taps * count);
        });
      }
      const int64_t shift = tap - g.reach_x;
      for (int64_t c = 0; c < channels; ++c) {
        T* sums[taps];
        for (int k = 0; k < taps; ++k) {
          sums[k] = space.sums[c * taps + k];
          // Nothing comes from behind the last row, where a longer run may have left its sums.
          if (g.run_rows > 1) store(sums[k] + end - start, Vector<T>{});
        }
        T* to = space.x_gradient[c];
        for (int64_t at = 0; at < end - start; at += lanes) {
          Vector<T> sum = tap == 0 ? Vector<T>{} : load(to + at);
#pragma GCC unroll 5
          for (int k = 0; k < taps; ++k) sum += load(sums[k] + at - shift - k);
          store(to + at, sum);
        }
      }
    });
    store_planes(g, space.x_gradient, channels, run, x_gradient);
  });
}

// The gradients of a block; with an encoder, that of the weights is left in space.weights_gradient.
// `kept`: so many of the first rows of weights are there already.
template <typename S, typename T>
void compute_block(const Problem& p, const Gradients& gradients, const Geometry& g,
                   const Space<T>& space, const Block& block, int64_t kept) {
  const auto [index, region] = block;
  const Region with_halo = region.grown(g.halo, g.halo_side);
  const Region with_reach = region.grown(g.reach_y, g.side);
  const bool wants_x = gradients.x != nullptr, wants_weights = gradients.of_weights();

  const auto y_gradient_from = [&](int64_t chunk) {
    return features_image(p, g, static_cast<const S*>(gradients.y), g.scale, index, chunk);
  };
  const auto x_from = [&](int64_t chunk) {
    return features_image(p, g, static_cast<const S*>(p.x), 1, index, chunk);
  };
  const int64_t planes = p.softmax ? g.taps * g.phases : g.taps;

  // What is needed next comes from memory while something is computed.
  if (wants_x || p.softmax) {
    const int64_t channels = min(g.chunk, g.channels);
    const int64_t vectors = vectors_of<T>(g, with_halo);
    Ahead y_gradient(g, y_gradient_from(0), channels, with_halo, vectors);
    Ahead x(g, x_from(0), wants_weights ? channels : 0, with_reach, vectors);
    const auto during = [&](int64_t done) {
      y_gradient.ask(done);
      x.ask(done);
    };
    if (p.encoder == nullptr) {
      load_weights<S>(p, g, index, with_halo, shifted(space.weights, -g.halo_side), during);
    } else {
      const Region rows = region.grown(g.halo, 0);
      load_compressed<S>(p, g, index, rows, g.halo_side, space.compressed);
      const int64_t pitch = compressed_geometry(g).pitch;
      encode_weights(p, g, index, {rows.row + kept, rows.rows - kept, rows.column, rows.columns},
                     g.halo_side, shifted(space.compressed, (g.encoder_reach_y() + kept) * pitch),
                     shifted(space.weights, kept * g.pitch), during);
    }
  }
  // Taps that nothing is added to: those that cannot reach the image, or all without channels.
  const bool all_reach = 2 * min(g.reach_y, g.reach_x) + 1 == g.kernel;
  if (wants_weights && (!all_reach || g.channels == 0)) {
    T* from = space.weights_gradient.at - 2 * g.encoder_reach_y() * g.pitch - g.margin;
    for (int64_t i = 0; i < g.taps * g.phases * space.weights_gradient.stride; ++i) from[i] = T(0);
  }
  for (int64_t chunk = 0; chunk < g.channels; chunk += g.chunk) {
    const int64_t channels = min(g.chunk, g.channels - chunk);
    const int64_t next = min(g.chunk, g.channels - chunk - channels);
    const int64_t work =
        g.taps * g.phases * channels * vectors_of<T>(g, region) * (wants_x + wants_weights);
    Ahead y_gradient(g, y_gradient_from(chunk + channels), next, with_halo, work);
    Ahead x(g, x_from(chunk + channels), wants_weights ? next : 0, with_reach, work);
    // Where no gradient is wanted, nothing is asked for, of an image that is there.
    const void* weights = gradients.weights != nullptr ? gradients.weights : p.weights;
    Ahead result(g, weights_image(p, g, static_cast<const S*>(weights), index),
                 gradients.weights != nullptr && next == 0 ? planes : 0, region, work);
    const auto during = [&](int64_t done) {
      y_gradient.ask(done);
      x.ask(done);
      result.ask(done);
    };
    load_planes(g, y_gradient_from(chunk), channels, with_halo,
                shifted(space.y_gradient, -g.halo_side));
    if (wants_weights) {
      load_planes(g, x_from(chunk), channels, with_reach, shifted(space.x, -g.side));
      add_weights_gradient(g, space, region, channels, chunk == 0, during);
    }
    if (wants_x) {
      store_x_gradient(g, space, region, channels,
                       features_image(p, g, static_cast<S*>(gradients.x), 1, index, chunk), during);
    }
  }
  if (wants_weights) {
    if (p.softmax) {
      normalise_backward(g, region, shifted(space.weights, g.halo * g.pitch),
                         space.weights_gradient);
    }
    if (p.encoder != nullptr) return;
    // All phases of a tap of a mask are one channel and have one gradient each.
    store_planes(g, space.weights_gradient, planes, region,
                 weights_image(p, g, static_cast<S*>(gradients.weights), index));
  }
}

// ---- with an encoder ----------------------------------------------------------------------------

// How row blocks are cut into pieces: a piece is `segment` of a (n, group).
struct Pieces {
  int64_t segments, row_blocks;  // of an image, and of a segment
  int64_t rows;                  // of a segment

  Region region(const Geometry& g, int64_t segment) const {
    return {segment * rows, min(rows, g.height - segment * rows), 0, g.width};
  }
};

inline Pieces pieces_of(const Problem& p, const Geometry& g) {
  // Weights of the halo are made twice at a segment's ends: at most a third more.
  const int64_t worth = max(g.height / max(6 * g.halo, 1), min(2, g.row_blocks));
  const int64_t wanted = min(max(kBlocks / (p.n * p.groups), 1), min(worth, g.row_blocks));
  const int64_t row_blocks = (g.row_blocks + wanted - 1) / wanted;
  return {(g.row_blocks + row_blocks - 1) / row_blocks, row_blocks, row_blocks * g.rows};
}

// A piece's part of the encoder's gradients.
template <typename T>
struct Partial {
  Planes<T> compressed;  // the segment's rows and the encoder's reach; `at` is the segment's first
  T* weight;             // (channel, ty, tx, plane), see add_weight_gradient
  T* bias;
};

template <typename T>
Partial<T> take_partial(const Problem& p, const Geometry& g, Arena& arena) {
  const int64_t planes = g.taps * g.phases, reach = g.encoder_reach_y();
  const Geometry q = sum_geometry<T>(g);
  Partial<T> partial;
  partial.compressed =
      take_planes<T>(arena, q, p.encoder->channels, pieces_of(p, g).rows + 2 * reach);
  if (partial.compressed.at != nullptr) partial.compressed.at += reach * q.pitch;
  const int64_t products = p.encoder->channels * encoder_taps(p);
  partial.weight = arena.take<T>(products * turned_tiles<T>(g) * kTurnedLanes<T>);
  partial.bias = arena.take<T>(round_up(planes, kLanes<T>));
  return partial;
}

// Elements between the parts of two pieces.
template <typename T>
int64_t partial_stride(const Problem& p, const Geometry& g) {
  Arena counting;
  take_partial<T>(p, g, counting);
  return counting.used / static_cast<int64_t>(sizeof(T));
}

template <typename T>
Partial<T> partial_of(const Problem& p, const Geometry& g, const void* partial, int64_t piece) {
  T* base = static_cast<T*>(const_cast<void*>(partial)) + piece * partial_stride<T>(p, g);
  Arena arena{reinterpret_cast<char*>(base)};
  return take_partial<T>(p, g, arena);
}

// The next block's weights begin with those that it shares with this one.
template <typename T>
void keep_weights(const Geometry& g, Planes<T> weights) {
  for (int64_t plane = 0; plane < g.taps * g.phases; ++plane) {
    __builtin_memmove(weights[plane], weights[plane] + g.rows * g.pitch,
                      2 * g.halo * g.pitch * sizeof(T));
  }
}

template <typename S, typename T>
void compute_piece(const Problem& p, const Gradients& gradients, void* all_partial, int64_t number,
                   void* scratch) {
  const Geometry g = block_geometry<T>(p, gradients);
  Arena arena{static_cast<char*>(scratch)};
  const Space<T> space = take_space<T>(p, g, arena);
  const Pieces pieces = pieces_of(p, g);
  const int64_t index = number / pieces.segments, segment = number % pieces.segments;
  const int64_t stride = partial_stride<T>(p, g);
  __builtin_memset(static_cast<T*>(all_partial) + number * stride, 0, stride * sizeof(T));
  const Partial<T> partial = partial_of<T>(p, g, all_partial, number);

  const int64_t pitch = compressed_geometry(g).pitch, sum_pitch = sum_geometry<T>(g).pitch;
  const int64_t planes = g.taps * g.phases, reach = g.encoder_reach_y();
  const Region rows = pieces.region(g, segment);
  bool shares = false;
  for (int64_t block = 0; block < pieces.row_blocks * g.column_blocks; ++block) {
    const int64_t row_block = segment * pieces.row_blocks + block / g.column_blocks;
    if (row_block >= g.row_blocks) break;
    const Block at =
        block_at(g, (index * g.row_blocks + row_block) * g.column_blocks + block % g.column_blocks);
    if (shares) keep_weights(g, space.weights);
    compute_block<S, T>(p, gradients, g, space, at, shares ? 2 * g.halo : 0);
    shares = g.column_blocks == 1;
    if (!gradients.of_weights()) continue;

    const Region& region = at.region;
    clear_outside(g, planes, region, 0, space.weights_gradient);
    if (region.rows < g.rows) {  // what the block above has left below
      for (int64_t plane = 0; plane < planes; ++plane) {
        T* from = space.weights_gradient[plane] + region.rows * g.pitch;
        for (int64_t i = 0; i < (g.rows - region.rows) * g.pitch; ++i) from[i] = T(0);
      }
    }
    const Planes<T> compressed = shifted(space.compressed, (g.halo + reach) * pitch);
    if (gradients.compressed != nullptr) {
      add_compressed_gradient(
          p, g, index, region, space.weights_gradient,
          shifted(partial.compressed, (region.row - rows.row) * sum_pitch + region.column + g.side),
          sum_pitch);
    }
    if (gradients.weight != nullptr) {
      turn_over(g, region, space.weights_gradient, space.turned);
      add_weight_gradient(p, g, region, compressed, space.turned, partial.weight);
    }
    if (gradients.bias != nullptr) {
      add_encoder_bias_gradient(g, region, space.weights_gradient, partial.bias);
    }
  }
}

// The gradient of compressed at the rows of a segment, some channels at a time.
template <typename S, typename T>
void sum_compressed(const Problem& p, const Gradients& gradients, const void* all_partial,
                    const Geometry& g, int64_t n, int64_t segment, void* scratch) {
  const Geometry q = sum_geometry<T>(g);
  const Pieces pieces = pieces_of(p, g);
  const Region region = pieces.region(g, segment);
  const int64_t reach = g.encoder_reach_y();
  const int64_t images = p.groups * pieces.segments, stride = partial_stride<T>(p, g);
  const Planes<T> first_part = partial_of<T>(p, g, all_partial, n * images).compressed;
  Arena arena{static_cast<char*>(scratch)};
  const Planes<T> sums = take_space<T>(p, g, arena).row;
  for (int64_t first = 0; first < p.encoder->channels; first += kLanes<T>) {
    const int64_t channels = min(kLanes<T>, p.encoder->channels - first);
    const auto to = compressed_image(p, g, static_cast<S*>(gradients.compressed), n, first);
    for (int64_t row = region.row; row < region.row + region.rows; ++row) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t j = 0; j < g.width; j += kLanes<T>) store(sums[c] + j, Vector<T>{});
        for (int64_t i = 0; i < images; ++i) {
          const Region from = pieces.region(g, i % pieces.segments);
          if (row < from.row - reach || row >= from.row + from.rows + reach) continue;
          const T* part = first_part[first + c] + i * stride + (row - from.row) * q.pitch + g.side;
          for (int64_t j = 0; j < g.width; j += kLanes<T>) {
            store(sums[c] + j, load(sums[c] + j) + load(part + j));
          }
        }
      }
      store_planes(q, sums, channels, {row, 1, 0, g.width}, to);
    }
  }
}

// The gradients of the weight, and of the bias, of one vector of a group's planes.
template <typename S, typename T>
void sum_weight(const Problem& p, const Gradients& gradients, const void* all_partial,
                const Geometry& g, int64_t number) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t planes = g.taps * g.phases, vectors = (planes + lanes - 1) / lanes;
  const int64_t group = number / vectors, plane = number % vectors * lanes;
  const int64_t products = p.encoder->channels * encoder_taps(p);
  const int64_t width = turned_tiles<T>(g) * kTurnedLanes<T>;
  const int64_t segments = pieces_of(p, g).segments, stride = partial_stride<T>(p, g);
  const Partial<T> first = partial_of<T>(p, g, all_partial, group * segments);
  // In the order of images, then of segments.
  const auto sum_of = [&](const T* part) {
    Vector<T> sum{};
    for (int64_t n = 0; n < p.n; ++n) {
      const T* image = part + n * p.groups * segments * stride;
      for (int64_t s = 0; s < segments; ++s) sum += load(image + s * stride);
    }
    return sum;
  };
  const int64_t count = min(lanes, planes - plane), logit = group * planes + plane;
  if (gradients.weight != nullptr) {
    S* to = static_cast<S*>(gradients.weight) + logit * products;
    for (int64_t i = 0; i < products; ++i) {
      const Vector<T> sum = sum_of(first.weight + i * width + plane);
      for (int64_t k = 0; k < count; ++k) narrow(to[k * products + i], sum[k]);
    }
  }
  if (gradients.bias != nullptr) {
    store_some(static_cast<S*>(gradients.bias) + logit, sum_of(first.bias + plane), count);
  }
}

int64_t blocks(const Problem& p, const Gradients& gradients) {
  return by_dtype(p.dtype, [&](auto element) {
    return block_count(p, block_geometry<Compute<decltype(element)>>(p, gradients));
  });
}

size_t scratch(const Problem& p, const Gradients& gradients) {
  return by_dtype(p.dtype, [&](auto element) {
    using T = Compute<decltype(element)>;
    Arena counting;
    take_space<T>(p, block_geometry<T>(p, gradients), counting);
    return static_cast<size_t>(counting.used);
  });
}

void block(const Problem& p, const Gradients& gradients, int64_t block, void* scratch) {
  by_dtype(p.dtype, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    const Geometry g = block_geometry<T>(p, gradients);
    Arena arena{static_cast<char*>(scratch)};
    compute_block<S, T>(p, gradients, g, take_space<T>(p, g, arena), block_at(g, block), 0);
  });
}

size_t packed(const Problem& p) {
  return by_dtype(p.dtype, [&](auto element) {
    Arena counting;
    take_packed<Compute<decltype(element)>>(p, counting);
    return static_cast<size_t>(counting.used);
  });
}

void pack(const Problem& p, int64_t piece) {
  by_dtype(p.dtype, [&](auto element) { pack_piece<decltype(element)>(p, piece); });
}

int64_t pieces(const Problem& p, const Gradients& gradients) {
  return by_dtype(p.dtype, [&](auto element) {
    const Geometry g = block_geometry<Compute<decltype(element)>>(p, gradients);
    return p.n * p.groups * pieces_of(p, g).segments;
  });
}

size_t partial(const Problem& p, const Gradients& gradients) {
  return by_dtype(p.dtype, [&](auto element) {
    using T = Compute<decltype(element)>;
    const int64_t stride = partial_stride<T>(p, block_geometry<T>(p, gradients));
    return static_cast<size_t>(pieces(p, gradients) * stride) * sizeof(T);
  });
}

void piece(const Problem& p, const Gradients& gradients, void* partial, int64_t piece,
           void* scratch) {
  by_dtype(p.dtype, [&](auto element) {
    using S = decltype(element);
    compute_piece<S, Compute<S>>(p, gradients, partial, piece, scratch);
  });
}

// First those of compressed, then those of the weight and the bias.
int64_t sums(const Problem& p, const Gradients& gradients) {
  const int64_t of_compressed =
      gradients.compressed == nullptr ? 0 : pieces(p, gradients) / p.groups;
  const bool of_weight = gradients.weight != nullptr || gradients.bias != nullptr;
  if (!of_weight) return of_compressed;
  const int64_t vectors = by_dtype(p.dtype, [&](auto element) {
    constexpr int64_t lanes = kLanes<Compute<decltype(element)>>;
    return (plane_count(p) + lanes - 1) / lanes;
  });
  return of_compressed + p.groups * vectors;
}

void sum(const Problem& p, const Gradients& gradients, const void* partial, int64_t sum,
         void* scratch) {
  by_dtype(p.dtype, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    const Geometry g = block_geometry<T>(p, gradients);
    const int64_t segments = pieces_of(p, g).segments;
    const int64_t of_compressed = gradients.compressed == nullptr ? 0 : p.n * segments;
    if (sum < of_compressed) {
      sum_compressed<S, T>(p, gradients, partial, g, sum / segments, sum % segments, scratch);
    } else {
      sum_weight<S, T>(p, gradients, partial, g, sum - of_compressed);
    }
  });
}

}  // namespace

// `extern` because a const object is otherwise local to its file.
extern const reassembly::BackwardKernels reassembly_backward_kernels;
const reassembly::BackwardKernels reassembly_backward_kernels = {blocks, scratch, block};
extern const reassembly::EncoderKernels reassembly_encoder_kernels;
const reassembly::EncoderKernels reassembly_encoder_kernels = {packed,  pack_pieces, pack, pieces,
                                                               partial, piece,       sums, sum};

}  // namespace famseg::FAMSEG_ISA
