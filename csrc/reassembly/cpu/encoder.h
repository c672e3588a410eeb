// The content encoder of feature_aware_upsample: logits made in the planes where they are used, and
// from the gradient of these planes those of compressed, weight and bias.
//
// All three are products of matrices with pixels as lanes, tiles of which stay in registers. A
// tap of the convolution is a shift of the vectors that are loaded.
//
// For kernel files only: see common/simd.h.
#pragma once

#include "reassembly/cpu/softmax.h"

namespace famseg::FAMSEG_ISA {

using reassembly::Encoder;

// Tiles: 5 planes x kTileVectors of logits; 4 channels x kTileVectors of the gradient of compressed.
constexpr int kTileVectors = kVectorRegisters >= 32 ? 4 : 2;
constexpr int kTilePlanes = 5;
constexpr int kTileChannels = 4;
// 4 planes x 3 taps of the gradient of the weight, 3 inputs and a factor are 16 registers.
constexpr int kGradientPlanes = kVectorRegisters >= 32 ? 5 : 4;
constexpr int kGradientTaps = 3;

// ---- weights ------------------------------------------------------------------------------------

// The weights of a group for logits: for kTilePlanes planes at a time (and for 2 and 1 of the rest)
// their biases, then those of each (channel, ty, tx) side by side. For the gradient of compressed:
// for kTileChannels channels at a time those of each (ty, plane, tx) side by side.
template <typename T>
struct Packed {
  T* logits;
  T* compressed;
};

inline int64_t encoder_taps(const Problem& p) {
  return p.encoder->kernel_size * p.encoder->kernel_size;
}

inline int64_t plane_count(const Problem& p) {
  return p.kernel_size * p.kernel_size * p.scale * p.scale;
}

template <typename T>
Packed<T> take_packed(const Problem& p, Arena& arena) {
  const int64_t channels = p.encoder->channels, taps = encoder_taps(p);
  const int64_t planes = p.groups * plane_count(p);
  T* logits = arena.take<T>(planes * (channels * taps + 1));
  return {logits, arena.take<T>(planes * channels * taps)};
}

template <typename T>
Packed<T> packed_weights(const Problem& p, int64_t group) {
  Arena arena{static_cast<char*>(p.encoder->packed)};
  const Packed<T> all = take_packed<T>(p, arena);
  const int64_t products = p.encoder->channels * encoder_taps(p), planes = plane_count(p);
  return {all.logits + group * planes * (products + 1), all.compressed + group * planes * products};
}

inline int64_t pack_pieces(const Problem& p) {
  return p.groups * ((plane_count(p) + kTilePlanes - 1) / kTilePlanes);
}

template <typename S>
void pack_piece(const Problem& p, int64_t piece) {
  using T = Compute<S>;
  const int64_t channels = p.encoder->channels, size = p.encoder->kernel_size;
  const int64_t taps = size * size, planes = plane_count(p);
  const int64_t group = piece / (pack_pieces(p) / p.groups);
  const int64_t first = piece % (pack_pieces(p) / p.groups) * kTilePlanes;
  const Packed<T> packed = packed_weights<T>(p, group);
  const S* weight = static_cast<const S*>(p.encoder->weight) + group * planes * channels * taps;
  const S* bias = static_cast<const S*>(p.encoder->bias);
  for_each_piece<kTilePlanes>(min(kTilePlanes, planes - first), [&](auto tile, int64_t offset) {
    constexpr int count = decltype(tile)::value;
    T* to = packed.logits + (first + offset) * (channels * taps + 1);
    for (int k = 0; k < count; ++k) {
      const int64_t plane = first + offset + k;
      to[k] = bias == nullptr ? T(0) : widen(bias[group * planes + plane]);
      const S* from = weight + plane * channels * taps;
      for (int64_t i = 0; i < channels * taps; ++i) to[(i + 1) * count + k] = widen(from[i]);
      for_each_piece<kTileChannels>(channels, [&](auto channel_tile, int64_t c) {
        constexpr int width = decltype(channel_tile)::value;
        T* panel = packed.compressed + c * planes * taps;
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t ty = tap / size, tx = tap % size;
          for (int i = 0; i < width; ++i) {
            panel[((ty * planes + plane) * size + tx) * width + i] =
                widen(from[(c + i) * taps + tap]);
          }
        }
      });
    }
  });
}

// ---- pixels -------------------------------------------------------------------------------------

// Planes of compressed have a wider gap where columns are cut: logits beside the block are made
// from what lies beside these.
inline Geometry compressed_geometry(const Geometry& g) {
  Geometry e = g;
  e.pitch += 2 * g.side;
  e.margin += g.side;
  return e;
}

template <typename S>
Image<S> compressed_image(const Problem& p, const Geometry& g, S* tensor, int64_t n,
                          int64_t channel) {
  return image(g, tensor, p.encoder->channels_last, 1, n, p.encoder->channels, channel);
}

// What the encoder reads for the logits of a region and `side` columns more on both sides: planes
// that begin at the first row within its reach.
template <typename S, typename T>
void load_compressed(const Problem& p, const Geometry& g, int64_t index, const Region& region,
                     int64_t side, Planes<T> to) {
  const auto from =
      compressed_image(p, g, static_cast<const S*>(p.encoder->compressed), index / p.groups, 0);
  load_planes(compressed_geometry(g), from, p.encoder->channels,
              region.grown(g.encoder_reach_y(), g.side + side), shifted(to, -g.side - side));
}

// Where vectors lie in the planes that a tile reads and in those that it writes.
struct Places {
  static constexpr int kMost = 64;
  int64_t in[kMost], out[kMost];
  int count = 0;
};

// Calls f(places) for the vectors of a region, of as many rows as there are places for at a time.
template <typename T, typename F>
[[gnu::always_inline]] inline void for_each_place(const Geometry& g, const Region& region,
                                                  int64_t side, int64_t in_pitch, int64_t out_pitch,
                                                  const F& f) {
  Places places;
  for (int64_t row = 0; row < region.rows; row += g.run_rows) {
    const int64_t rows = min(g.run_rows, region.rows - row);
    const int64_t end = (rows - 1) * g.pitch + region.columns + side;
    for (int64_t j = -side; j < end; j += kLanes<T>) {
      if (places.count == Places::kMost) {
        f(places);
        places.count = 0;
      }
      places.in[places.count] = row * in_pitch + j;
      places.out[places.count++] = row * out_pitch + j;
    }
  }
  if (places.count > 0) f(places);
}

// Puts zeros into what is no pixel of the image: rows above and below, and the gaps of all rows.
template <typename T>
void clear_outside(const Geometry& g, int64_t planes, const Region& region, int64_t side,
                   Planes<T> to) {
  for (int64_t plane = 0; plane < planes; ++plane) {
    for (int64_t i = 0; i < region.rows; ++i) {
      T* row = to[plane] + i * g.pitch;
      const bool inside = 0 <= region.row + i && region.row + i < g.height;
      const int64_t left = max(-side, -region.column);
      const int64_t right = min(region.columns + side, g.width - region.column);
      // The last run may hang over by a vector.
      const int64_t end = g.pitch - side + (i + 1 == region.rows ? kLanes<T> : 0);
      for (int64_t j = -side; j < (inside ? left : end); ++j) row[j] = T(0);
      for (int64_t j = inside ? right : end; j < end; ++j) row[j] = T(0);
    }
  }
}

// ---- logits -------------------------------------------------------------------------------------

template <int VECTORS, int PLANES, typename T>
void logits_tile(const Problem& p, const Geometry& g, int64_t pitch, Planes<T> compressed,
                 const int64_t* in, const T* panel, Planes<T> logits, const int64_t* out) {
  const int64_t size = p.encoder->kernel_size;
  const T* from[VECTORS];
  Vector<T> sum[PLANES][VECTORS];
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) {
    from[v] = compressed.at + in[v];
#pragma GCC unroll 5
    for (int plane = 0; plane < PLANES; ++plane) sum[plane][v] = broadcast(panel[plane]);
  }
  const T* middle = panel + (size * size / 2 + 1) * PLANES;
  for (int64_t c = 0; c < p.encoder->channels; ++c) {
    for (int64_t ty = -g.encoder_y; ty <= g.encoder_y; ++ty) {
      int64_t at = c * compressed.stride + ty * g.dilation * pitch - g.encoder_reach_x();
      const T* weight = middle + ((c * size + ty) * size - g.encoder_x) * PLANES;
      for (int64_t tx = -g.encoder_x; tx <= g.encoder_x; ++tx) {
        Vector<T> pixels[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) pixels[v] = load(from[v] + at);
#pragma GCC unroll 5
        for (int plane = 0; plane < PLANES; ++plane) {
          const Vector<T> factor = broadcast(weight[plane]);
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; ++v) sum[plane][v] += factor * pixels[v];
        }
        at += g.dilation;
        weight += PLANES;
      }
    }
  }
#pragma GCC unroll 5
  for (int plane = 0; plane < PLANES; ++plane) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store(logits[plane] + out[v], sum[plane][v]);
  }
}

// As load_weights, of a region with `side` columns more on both sides, from planes of compressed;
// `compressed` and `to` are at the region's first pixel.
template <typename T, typename During>
void encode_weights(const Problem& p, const Geometry& g, int64_t index, const Region& region,
                    int64_t side, Planes<T> compressed, Planes<T> to, const During& during) {
  const Packed<T> packed = packed_weights<T>(p, index % p.groups);
  const int64_t pitch = compressed_geometry(g).pitch;
  const int64_t planes = g.taps * g.phases;
  const int64_t panel = p.encoder->channels * encoder_taps(p) + 1;
  // A few vectors a tile, and few enough rows that the softmax finds them in the L1 cache.
  const int64_t most =
      g.run_rows > 1 ? region.rows : max(1, 2 * kTileVectors * kLanes<T> / g.columns);
  for (int64_t row = 0; row < region.rows; row += most) {
    const Region part = {region.row + row, min(most, region.rows - row), region.column,
                         region.columns};
    const Planes<T> in = shifted(compressed, row * pitch), rows = shifted(to, row * g.pitch);
    for_each_place<T>(g, part, side, pitch, g.pitch, [&](const Places& places) {
      for_each_piece<kTilePlanes>(planes, [&](auto plane_tile, int64_t plane) {
        for_each_piece<kTileVectors>(places.count, [&](auto tile, int64_t v) {
          logits_tile<decltype(tile)::value, decltype(plane_tile)::value, T>(
              p, g, pitch, in, places.in + v, packed.logits + plane * panel,
              shifted(rows, plane * rows.stride), places.out + v);
        });
      });
    });
    clear_outside(g, planes, part, side, rows);
    for_each_run<T>(g, part, side, [&](const Region&, int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; at += kLanes<T>) {
        for_each_piece<kMostPhases>(g.phases, [&](auto piece, int64_t phase) {
          normalise_tile<decltype(piece)::value, T>(g, shifted(rows, phase * rows.stride + at));
        });
        during(1);
      }
    });
  }
}

// ---- gradients ----------------------------------------------------------------------------------

// Adds to some vectors of the gradient of some channels of compressed what the gradient of the
// logits at rows ty_begin .. ty_end of taps away gives.
template <int VECTORS, int CHANNELS, typename T>
void compressed_gradient_tile(const Problem& p, const Geometry& g, Planes<T> logits_gradient,
                              const int64_t* in, int64_t ty_begin, int64_t ty_end, const T* panel,
                              Planes<T> gradient, const int64_t* out) {
  const int64_t size = p.encoder->kernel_size, planes = g.taps * g.phases;
  const T* from[VECTORS];
  Vector<T> sum[CHANNELS][VECTORS];
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) {
    from[v] = logits_gradient.at + in[v];
#pragma GCC unroll 4
    for (int c = 0; c < CHANNELS; ++c) sum[c][v] = load(gradient[c] + out[v]);
  }
  for (int64_t ty = ty_begin; ty <= ty_end; ++ty) {
    const T* row = panel + ((ty + size / 2) * planes * size + size / 2 - g.encoder_x) * CHANNELS;
    for (int64_t plane = 0; plane < planes; ++plane) {
      int64_t at = plane * logits_gradient.stride - ty * g.dilation * g.pitch + g.encoder_reach_x();
      const T* weight = row + plane * size * CHANNELS;
      for (int64_t tx = -g.encoder_x; tx <= g.encoder_x; ++tx) {
        Vector<T> pixels[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) pixels[v] = load(from[v] + at);
#pragma GCC unroll 4
        for (int c = 0; c < CHANNELS; ++c) {
          const Vector<T> factor = broadcast(weight[c]);
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; ++v) sum[c][v] += factor * pixels[v];
        }
        at -= g.dilation;
        weight += CHANNELS;
      }
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < CHANNELS; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store(gradient[c] + out[v], sum[c][v]);
  }
}

// Adds to the gradient of compressed, planes of the block's rows and columns and the encoder's reach
// around them, what comes from the block's logits. The gradient of these is zero around the block.
template <typename T>
void add_compressed_gradient(const Problem& p, const Geometry& g, int64_t index,
                             const Region& region, Planes<T> logits_gradient, Planes<T> gradient,
                             int64_t gradient_pitch) {
  const Packed<T> packed = packed_weights<T>(p, index % p.groups);
  const int64_t reach = g.encoder_reach_y(), products = g.taps * g.phases * encoder_taps(p);
  // Rows of few vectors go together, with taps that add zeros; of others each has its taps.
  const bool narrow = region.columns < kTileVectors * kLanes<T>;
  const int64_t together = narrow ? region.rows + 2 * reach : 1;
  for (int64_t row = -reach; row < region.rows + reach; row += together) {
    const auto rounded_up = [&](int64_t rows) {
      return rows > 0 ? (rows + g.dilation - 1) / g.dilation : rows / g.dilation;
    };
    const int64_t begin =
        narrow ? -g.encoder_y : max(-g.encoder_y, rounded_up(row - region.rows + 1));
    const int64_t end = narrow ? g.encoder_y : min(g.encoder_y, -rounded_up(-row));
    const Region part = {region.row + row, together, region.column, region.columns};
    const Planes<T> in = shifted(logits_gradient, row * g.pitch);
    const Planes<T> to = shifted(gradient, row * gradient_pitch);
    for_each_place<T>(g, part, g.side, g.pitch, gradient_pitch, [&](const Places& places) {
      for_each_piece<kTileChannels>(p.encoder->channels, [&](auto channel_tile, int64_t c) {
        for_each_piece<kTileVectors>(places.count, [&](auto tile, int64_t v) {
          compressed_gradient_tile<decltype(tile)::value, decltype(channel_tile)::value, T>(
              p, g, in, places.in + v, begin, end, packed.compressed + c * products,
              shifted(to, c * to.stride), places.out + v);
        });
      });
    });
  }
}

// Sums of the lanes of as many vectors as there are lanes, one a lane.
template <int STEP, typename T>
[[gnu::always_inline]] inline Vector<T> sums_of_lanes(Vector<T> (&v)[kLanes<T>]) {
  if constexpr (STEP < kLanes<T>) {
#pragma GCC unroll 16
    for (int r = 0; r < kLanes<T>; r += 2 * STEP) {
      swap_blocks<STEP, T>(v[r], v[r + STEP], typename CountTo<kLanes<T>>::type());
      v[r] += v[r + STEP];
    }
    return sums_of_lanes<2 * STEP, T>(v);
  } else {
    return v[0];
  }
}

// Adds to the gradient of the weight of some planes and neighbouring tx of one channel and ty.
template <int PLANES, int TAPS, typename T>
void encoder_weight_tile(const Geometry& g, const Region& region, int64_t pitch,
                         Planes<T> logits_gradient, const T* compressed, T* gradient,
                         int64_t gradient_stride) {
  constexpr int lanes = kLanes<T>;
  Vector<T> sum[PLANES][TAPS] = {};
  const int64_t stride = logits_gradient.stride;
  for (int64_t row = 0; row < region.rows; row += g.run_rows) {
    const int64_t rows = min(g.run_rows, region.rows - row);
    const int64_t end = (rows - 1) * g.pitch + region.columns;
    const T* pixels = compressed + row * pitch;
    const T* factors = logits_gradient.at + row * g.pitch;
    for (int64_t j = 0; j < end; j += lanes) {
      Vector<T> v[TAPS];
#pragma GCC unroll 3
      for (int tap = 0; tap < TAPS; ++tap) v[tap] = load(pixels + j + tap * g.dilation);
#pragma GCC unroll 5
      for (int plane = 0; plane < PLANES; ++plane) {
        const Vector<T> factor = load(factors + j + plane * stride);
#pragma GCC unroll 3
        for (int tap = 0; tap < TAPS; ++tap) sum[plane][tap] += factor * v[tap];
      }
    }
  }
  constexpr int padded = (PLANES * TAPS + lanes - 1) / lanes * lanes;
  T sums[padded];
#pragma GCC unroll 16
  for (int first = 0; first < PLANES * TAPS; first += lanes) {
    Vector<T> v[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      v[i] = first + i < PLANES * TAPS ? sum[(first + i) / TAPS % PLANES][(first + i) % TAPS]
                                       : Vector<T>{};
    }
    store(sums + first, sums_of_lanes<1, T>(v));
  }
  for (int plane = 0; plane < PLANES; ++plane) {
    for (int tap = 0; tap < TAPS; ++tap) {
      gradient[plane * gradient_stride + tap] += sums[plane * TAPS + tap];
    }
  }
}

// Adds the block's part to the gradient of a group's weight, laid out as it. `compressed` is at the
// block's first pixel.
template <typename T>
void add_encoder_weight_gradient(const Problem& p, const Geometry& g, const Region& region,
                                 Planes<T> compressed, Planes<T> logits_gradient, T* gradient) {
  const int64_t size = p.encoder->kernel_size, products = p.encoder->channels * size * size;
  const int64_t pitch = compressed_geometry(g).pitch;
  for_each_piece<kGradientPlanes>(g.taps * g.phases, [&](auto plane_tile, int64_t plane) {
    const Planes<T> factors = shifted(logits_gradient, plane * logits_gradient.stride);
    for (int64_t c = 0; c < p.encoder->channels; ++c) {
      for (int64_t ty = -g.encoder_y; ty <= g.encoder_y; ++ty) {
        const T* row = compressed[c] + ty * g.dilation * pitch;
        T* to = gradient + plane * products + (c * size + ty + size / 2) * size + size / 2;
        for_each_piece<kGradientTaps>(2 * g.encoder_x + 1, [&](auto tap_tile, int64_t tap) {
          const int64_t tx = tap - g.encoder_x;
          encoder_weight_tile<decltype(plane_tile)::value, decltype(tap_tile)::value, T>(
              g, region, pitch, factors, row + tx * g.dilation, to + tx, products);
        });
      }
    }
  });
}

template <typename T>
void add_encoder_bias_gradient(const Geometry& g, const Region& region, Planes<T> logits_gradient,
                               T* gradient) {
  for (int64_t plane = 0; plane < g.taps * g.phases; ++plane) {
    Vector<T> sum{};
    for_each_run<T>(g, region, 0, [&](const Region&, int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; at += kLanes<T>) sum += load(logits_gradient[plane] + at);
    });
    for (int lane = 0; lane < kLanes<T>; ++lane) gradient[plane] += sum[lane];
  }
}

}  // namespace famseg::FAMSEG_ISA
