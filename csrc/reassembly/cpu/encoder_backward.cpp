// The backward pass of feature_aware_upsample for one instruction set (see common/simd.h: this file
// is compiled once for each).
//
// The gradient of the logits stays in the planes of a block. What it gives to the gradients of
// compressed, weight and bias is added up by piece: some blocks, one below the other, which hand on
// the weights that their halos share.

#include "reassembly/cpu/backward_block.h"
#include "reassembly/cpu/encoder.h"

namespace famseg::FAMSEG_ISA {
namespace {

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

// Planes of whole rows, for sums over blocks.
template <typename T>
Geometry sum_geometry(const Geometry& g) {
  Geometry q = g;
  if (g.run_rows == 1) q.pitch = round_up(g.width, kLanes<T>) + 2 * g.side;
  return q;
}

// What a piece needs besides the Space of its blocks.
template <typename T>
struct EncoderSpace {
  Planes<T> compressed;  // its channels, rows as the weights and the encoder's reach
  T* turned;             // the gradient of the weights, see turn_over
  Planes<T> row;         // a row of a vector of channels of the gradient of compressed
};

template <typename T>
EncoderSpace<T> take_encoder_space(const Problem& p, const Geometry& g, Arena& arena) {
  EncoderSpace<T> space;
  space.compressed = take_planes<T>(arena, compressed_geometry(g), p.encoder->channels,
                                    g.rows + 2 * (g.halo + g.encoder_reach_y()));
  space.turned = arena.take<T>(turned_tiles<T>(g) * kTurnedLanes<T> * g.rows * g.columns);
  space.row = take_planes<T>(arena, sum_geometry<T>(g), kLanes<T>, 1);
  return space;
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
  const Space<T> space = take_space<T>(g, arena);
  const EncoderSpace<T> of_encoder = take_encoder_space<T>(p, g, arena);
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
    const Region& region = at.region;
    const int64_t kept = shares ? 2 * g.halo : 0;
    compute_block<S, T>(p, gradients, g, space, at, [&](const auto& during) {
      const Region rows = region.grown(g.halo, 0);
      load_compressed<S>(p, g, index, rows, g.halo_side, of_encoder.compressed);
      encode_weights(p, g, index, {rows.row + kept, rows.rows - kept, rows.column, rows.columns},
                     g.halo_side, shifted(of_encoder.compressed, (reach + kept) * pitch),
                     shifted(space.weights, kept * g.pitch), during);
    });
    shares = g.column_blocks == 1;
    if (!gradients.of_weights()) continue;

    clear_outside(g, planes, region, 0, space.weights_gradient);
    if (region.rows < g.rows) {  // what the block above has left below
      for (int64_t plane = 0; plane < planes; ++plane) {
        T* from = space.weights_gradient[plane] + region.rows * g.pitch;
        for (int64_t i = 0; i < (g.rows - region.rows) * g.pitch; ++i) from[i] = T(0);
      }
    }
    const Planes<T> compressed = shifted(of_encoder.compressed, (g.halo + reach) * pitch);
    if (gradients.compressed != nullptr) {
      add_compressed_gradient(
          p, g, index, region, space.weights_gradient,
          shifted(partial.compressed, (region.row - rows.row) * sum_pitch + region.column + g.side),
          sum_pitch);
    }
    if (gradients.weight != nullptr) {
      turn_over(g, region, space.weights_gradient, of_encoder.turned);
      add_weight_gradient(p, g, region, compressed, of_encoder.turned, partial.weight);
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
  const Planes<T> sums = take_encoder_space<T>(p, g, arena).row;
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

size_t packed(const Problem& p) {
  return by_dtype(p.dtype, [&](auto element) {
    Arena counting;
    take_packed<Compute<decltype(element)>>(p, counting);
    return static_cast<size_t>(counting.used);
  });
}

void pack(const Problem& p, bool backward, int64_t piece) {
  by_dtype(p.dtype, [&](auto element) { pack_piece<decltype(element)>(p, backward, piece); });
}

int64_t pieces(const Problem& p, const Gradients& gradients) {
  return by_dtype(p.dtype, [&](auto element) {
    const Geometry g = block_geometry<Compute<decltype(element)>>(p, gradients);
    return p.n * p.groups * pieces_of(p, g).segments;
  });
}

size_t scratch(const Problem& p, const Gradients& gradients) {
  return by_dtype(p.dtype, [&](auto element) {
    using T = Compute<decltype(element)>;
    const Geometry g = block_geometry<T>(p, gradients);
    Arena counting;
    take_space<T>(g, counting);
    take_encoder_space<T>(p, g, counting);
    return static_cast<size_t>(counting.used);
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
extern const reassembly::EncoderKernels reassembly_encoder_kernels;
const reassembly::EncoderKernels reassembly_encoder_kernels = {
    packed, pack_pieces, pack, pieces, scratch, partial, piece, sums, sum};

}  // namespace famseg::FAMSEG_ISA
