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
// 2 vectors of planes x 5 channels of the gradient of the weight.
constexpr int kGradientVectors = 2;
constexpr int kGradientChannels = 5;
// So many channels of compressed, and planes of the gradient of the logits, are read at a time: at
// three rows of 64 pixels they stay in an L1 cache of 32 KB.
constexpr int64_t kChannelsAtATime = 8;
constexpr int64_t kPlanesAtATime = 20;

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

// The part for the gradient of compressed only with `backward`.
template <typename S>
void pack_piece(const Problem& p, bool backward, int64_t piece) {
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
      for_each_piece<kTileChannels>(backward ? channels : 0, [&](auto channel_tile, int64_t c) {
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

// Calls f(places) for the vectors of a region, of as many rows as there are places for at a time. No
// two of them overlap, so that a sum may be added to what lies there: rows shorter than a vector are
// one run, however many there are.
template <typename T, typename F>
[[gnu::always_inline]] inline void for_each_place(const Geometry& g, const Region& region,
                                                  int64_t side, int64_t in_pitch, int64_t out_pitch,
                                                  const F& f) {
  Places places;
  const int64_t together = g.width < kLanes<T> ? region.rows : 1;
  for (int64_t row = 0; row < region.rows; row += together) {
    const int64_t end = (together - 1) * g.pitch + region.columns + side;
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

// Some vectors of some planes of logits: begins with the bias, or adds the products of some channels.
// TAPS: taps of a row of the encoder, where that is 3; else 0.
template <int VECTORS, int PLANES, int TAPS, typename T>
void logits_tile(const Problem& p, const Geometry& g, int64_t pitch, int64_t first,
                 int64_t channels, Planes<T> compressed, const int64_t* in, const T* panel,
                 Planes<T> logits, const int64_t* out) {
  const int64_t size = p.encoder->kernel_size, dilation = g.dilation;
  const int64_t taps = TAPS > 0 ? TAPS : 2 * g.encoder_x + 1;
  const T* from[VECTORS];
  Vector<T> sum[PLANES][VECTORS];
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) {
    from[v] = compressed.at + in[v] - g.encoder_reach_x();
#pragma GCC unroll 5
    for (int plane = 0; plane < PLANES; ++plane) {
      sum[plane][v] = first == 0 ? broadcast(panel[plane]) : load(logits[plane] + out[v]);
    }
  }
  const T* middle = panel + (size * size / 2 + 1) * PLANES;
  for (int64_t c = first; c < first + channels; ++c) {
    for (int64_t ty = -g.encoder_y; ty <= g.encoder_y; ++ty) {
      const int64_t at = c * compressed.stride + ty * dilation * pitch;
      const T* weight = middle + ((c * size + ty) * size - g.encoder_x) * PLANES;
#pragma GCC unroll 3
      for (int64_t tap = 0; tap < taps; ++tap) {
        Vector<T> pixels[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) pixels[v] = load(from[v] + at + tap * dilation);
#pragma GCC unroll 5
        for (int plane = 0; plane < PLANES; ++plane) {
          const Vector<T> factor = broadcast(weight[tap * PLANES + plane]);
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; ++v) sum[plane][v] += factor * pixels[v];
        }
      }
    }
  }
#pragma GCC unroll 5
  for (int plane = 0; plane < PLANES; ++plane) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store(logits[plane] + out[v], sum[plane][v]);
  }
}

// Calls f(Constant<taps of a row of the encoder>), 0 where there is no code for their number.
template <typename F>
[[gnu::always_inline]] inline void with_row_taps(const Geometry& g, const F& f) {
  if (g.encoder_x == 1) {
    f(Constant<3>());
  } else {
    f(Constant<0>());
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
      with_row_taps(g, [&](auto row_taps) {
        int64_t c = 0;
        do {  // once without channels, for the bias
          const int64_t channels = min(kChannelsAtATime, p.encoder->channels - c);
          for_each_piece<kTilePlanes>(planes, [&](auto plane_tile, int64_t plane) {
            for_each_piece<kTileVectors>(places.count, [&](auto tile, int64_t v) {
              logits_tile<decltype(tile)::value, decltype(plane_tile)::value,
                          decltype(row_taps)::value, T>(
                  p, g, pitch, c, channels, in, places.in + v, packed.logits + plane * panel,
                  shifted(rows, plane * rows.stride), places.out + v);
            });
          });
          c += kChannelsAtATime;
        } while (c < p.encoder->channels);
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

// Adds to some vectors of the gradient of some channels of compressed what the gradient of some
// planes of logits at rows ty_begin .. ty_end of taps away gives. TAPS as in logits_tile.
template <int VECTORS, int CHANNELS, int TAPS, typename T>
void compressed_gradient_tile(const Problem& p, const Geometry& g, int64_t first, int64_t planes,
                              Planes<T> logits_gradient, const int64_t* in, int64_t ty_begin,
                              int64_t ty_end, const T* panel, Planes<T> gradient,
                              const int64_t* out) {
  const int64_t size = p.encoder->kernel_size, dilation = g.dilation;
  const int64_t taps = TAPS > 0 ? TAPS : 2 * g.encoder_x + 1;
  const T* from[VECTORS];
  Vector<T> sum[CHANNELS][VECTORS];
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) {
    from[v] = logits_gradient.at + in[v] - g.encoder_reach_x();
#pragma GCC unroll 4
    for (int c = 0; c < CHANNELS; ++c) sum[c][v] = load(gradient[c] + out[v]);
  }
  for (int64_t ty = ty_begin; ty <= ty_end; ++ty) {
    const T* row =
        panel + ((ty + size / 2) * g.taps * g.phases * size + size / 2 + g.encoder_x) * CHANNELS;
    for (int64_t plane = first; plane < first + planes; ++plane) {
      const int64_t at = plane * logits_gradient.stride - ty * dilation * g.pitch;
      const T* weight = row + plane * size * CHANNELS;
#pragma GCC unroll 3
      for (int64_t tap = 0; tap < taps; ++tap) {
        Vector<T> pixels[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) pixels[v] = load(from[v] + at + tap * dilation);
#pragma GCC unroll 4
        for (int c = 0; c < CHANNELS; ++c) {
          const Vector<T> factor = broadcast(weight[c - tap * CHANNELS]);
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; ++v) sum[c][v] += factor * pixels[v];
        }
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
  const int64_t planes = g.taps * g.phases, products = planes * encoder_taps(p);
  const int64_t reach = g.encoder_reach_y();
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
      with_row_taps(g, [&](auto row_taps) {
        for (int64_t plane = 0; plane < planes; plane += kPlanesAtATime) {
          for_each_piece<kTileChannels>(p.encoder->channels, [&](auto channel_tile, int64_t c) {
            for_each_piece<kTileVectors>(places.count, [&](auto tile, int64_t v) {
              compressed_gradient_tile<decltype(tile)::value, decltype(channel_tile)::value,
                                       decltype(row_taps)::value, T>(
                  p, g, plane, min(kPlanesAtATime, planes - plane), in, places.in + v, begin, end,
                  packed.compressed + c * products, shifted(to, c * to.stride), places.out + v);
            });
          });
        }
      });
    });
  }
}

// The gradient of the logits turned over for that of the weight, whose lanes are planes: for every
// kGradientVectors vectors of planes the block's pixels, without gaps, one behind the other.
template <typename T>
constexpr int64_t kTurnedLanes = kGradientVectors * kLanes<T>;

template <typename T>
int64_t turned_tiles(const Geometry& g) {
  return (g.taps * g.phases + kTurnedLanes<T> - 1) / kTurnedLanes<T>;
}

template <typename T>
void turn_over(const Geometry& g, const Region& region, Planes<T> logits_gradient, T* turned) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t planes = g.taps * g.phases, pixels = region.rows * region.columns;
  for (int64_t plane = 0; plane < turned_tiles<T>(g) * kTurnedLanes<T>; plane += lanes) {
    T* tile = turned + plane / kTurnedLanes<T> * pixels * kTurnedLanes<T> + plane % kTurnedLanes<T>;
    for (int64_t row = 0; row < region.rows; ++row) {
      for (int64_t j = 0; j < region.columns; j += lanes) {
        Vector<T> v[lanes];
        for (int64_t r = 0; r < lanes; ++r) {
          v[r] = plane + r < planes ? load(logits_gradient[plane + r] + row * g.pitch + j)
                                    : Vector<T>{};
        }
        transpose_from<1, T>(v);
        T* to = tile + (row * region.columns + j) * kTurnedLanes<T>;
        for (int64_t r = 0; r < min(lanes, region.columns - j); ++r) {
          store(to + r * kTurnedLanes<T>, v[r]);
        }
      }
    }
  }
}

// Adds to the gradient of the weight of a tile of planes, of some channels at one tap. `compressed`
// is at the first channel and the first pixel of the rows and columns that the tap sees.
template <int CHANNELS, typename T>
void weight_tile(int64_t rows, int64_t columns, int64_t pitch, Planes<T> compressed,
                 const T* turned, T* gradient, int64_t gradient_stride) {
  Vector<T> sum[CHANNELS][kGradientVectors];
#pragma GCC unroll 5
  for (int c = 0; c < CHANNELS; ++c) {
#pragma GCC unroll 2
    for (int v = 0; v < kGradientVectors; ++v) {
      sum[c][v] = load(gradient + c * gradient_stride + v * kLanes<T>);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = compressed.at + row * pitch;
    for (int64_t j = 0; j < columns; ++j, turned += kTurnedLanes<T>) {
      Vector<T> factor[kGradientVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kGradientVectors; ++v) factor[v] = load(turned + v * kLanes<T>);
#pragma GCC unroll 5
      for (int c = 0; c < CHANNELS; ++c) {
        const Vector<T> pixel = broadcast(from[c * compressed.stride + j]);
#pragma GCC unroll 2
        for (int v = 0; v < kGradientVectors; ++v) sum[c][v] += pixel * factor[v];
      }
    }
  }
#pragma GCC unroll 5
  for (int c = 0; c < CHANNELS; ++c) {
#pragma GCC unroll 2
    for (int v = 0; v < kGradientVectors; ++v) {
      store(gradient + c * gradient_stride + v * kLanes<T>, sum[c][v]);
    }
  }
}

// Adds the block's part to the gradient of a group's weight: planes, in whole tiles, of every
// (channel, ty, tx). `compressed` is at the block's first pixel.
template <typename T>
void add_weight_gradient(const Problem& p, const Geometry& g, const Region& region,
                         Planes<T> compressed, const T* turned, T* gradient) {
  const int64_t size = p.encoder->kernel_size, pitch = compressed_geometry(g).pitch;
  const int64_t width = turned_tiles<T>(g) * kTurnedLanes<T>, pixels = region.rows * region.columns;
  for (int64_t tile = 0; tile < turned_tiles<T>(g); ++tile) {
    const T* factors = turned + tile * pixels * kTurnedLanes<T>;
    for_each_piece<kGradientChannels>(p.encoder->channels, [&](auto channel_tile, int64_t c) {
      for (int64_t ty = -g.encoder_y; ty <= g.encoder_y; ++ty) {
        for (int64_t tx = -g.encoder_x; tx <= g.encoder_x; ++tx) {
          const int64_t tap = (ty + size / 2) * size + tx + size / 2;
          weight_tile<decltype(channel_tile)::value, T>(
              region.rows, region.columns, pitch,
              shifted(compressed, c * compressed.stride + (ty * pitch + tx) * g.dilation), factors,
              gradient + (c * size * size + tap) * width + tile * kTurnedLanes<T>,
              size * size * width);
        }
      }
    });
  }
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
