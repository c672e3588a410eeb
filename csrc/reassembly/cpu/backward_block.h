// The backward pass over a block, for one instruction set: the gradient of x and of the weights.
//
// Blocks, and the weights of a block, are as in forward.cpp. Lanes are always pixels of x, because
// the gradient of the weights is a sum over channels.
//
// The gradient of x is a sum over pixels to all sides of it. Products are formed and summed at the
// pixels that they come from, one sum for each column of taps, and only the sums move to the side:
// all loads are aligned, and there are 9 to 20 FMAs. Gathering products took 5 to 4, 4 of them
// across cache lines.
//
// For kernel files only: see common/simd.h.
#pragma once

#include "reassembly/cpu/softmax.h"

namespace famseg::FAMSEG_ISA {

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

template <typename T>
struct Space {
  Planes<T> weights;           // (tap, phase), the block's rows and the halo
  Planes<T> weights_gradient;  // (tap, phase), the block's rows; zeros around them for an encoder
  Planes<T> y_gradient;        // (channel, phase) of a chunk, rows as the weights
  Planes<T> x;                 // a chunk of channels, the block's rows and the reach
  Planes<T> sums;              // (channel, column of taps) of a chunk, one run; see x_gradient_tile
  Planes<T> x_gradient;        // a chunk of channels, one run
};

template <typename T>
Space<T> take_space(const Geometry& g, Arena& arena) {
  Space<T> space;
  const int64_t run_rows = min(g.run_rows, g.rows);
  space.weights = take_planes<T>(arena, g, g.taps * g.phases, g.rows + 2 * g.halo);
  const int64_t reach = g.encoder_reach_y();
  space.weights_gradient = take_planes<T>(arena, g, g.taps * g.phases, g.rows + 4 * reach);
  space.weights_gradient.at += 2 * reach * g.pitch;
  space.y_gradient = take_planes<T>(arena, g, g.chunk * g.phases, g.rows + 2 * g.halo);
  space.x = take_planes<T>(arena, g, g.chunk, g.rows + 2 * g.reach_y);
  space.sums = take_planes<T>(arena, g, g.chunk * kMostColumns, run_rows);
  space.x_gradient = take_planes<T>(arena, g, g.chunk, run_rows);
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

// The gradient of x at a block, and that of its weights, which is left in space.weights_gradient.
// make_weights(during) puts the weights of the block and its halo into space.weights and calls
// during(1) for each vector of pixels.
template <typename S, typename T, typename MakeWeights>
void compute_block(const Problem& p, const Gradients& gradients, const Geometry& g,
                   const Space<T>& space, const Block& block, const MakeWeights& make_weights) {
  const int64_t index = block.index;
  const Region region = block.region;
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
    make_weights([&](int64_t done) {
      y_gradient.ask(done);
      x.ask(done);
    });
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
  if (wants_weights && p.softmax) {
    normalise_backward(g, region, shifted(space.weights, g.halo * g.pitch), space.weights_gradient);
  }
}

}  // namespace famseg::FAMSEG_ISA
