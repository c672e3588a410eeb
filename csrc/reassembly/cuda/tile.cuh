// What the kernels of both directions share: sizes, places in memory, and the tiles of the tuned
// kernels. Kernel text only: whoever includes it includes common/cuda.h (or its twins) first.
//
// 5 x 5 taps and scale 2 are known to the compiler: a thread owns a pixel of x, keeps all 100 of
// its weights (or their gradients) in registers over the channels of a group, and makes four pixels
// of y from each number of x it reads. With E elements of x and M of logits, C = 64:
//
//   forward               5 E + M elements of memory, 100 FMAs and 100 bytes of shared memory for
//                         each of E: 1680 bytes in fp32 against 6400 FMAs a pixel on 64 channels,
//                         0.35 ns against 0.19 on an H200: bound by memory, in bf16 by both
//   gradient of weights   5 E + 2 M, the same FMAs and reads
//   gradient of x         5 E + M, the same FMAs, but 400 bytes of shared memory for each of E, for
//                         a weight belongs to one pair of pixels: bound by that, 0.77 ns a pixel
//
// 100 sums leave room for two blocks of 128 threads a processor at least; shared memory, 32 KB at
// most, for more. Lanes walk along a row of pixels, 4 or 16 bytes each: no bank conflicts.
//
// y and y_gradient are written and read two elements at once and must be aligned for that, the
// others only for their own element.
//
// All other sizes take the plain kernels, forward_any and the like. No sums over threads anywhere:
// the result is the same in every run.
#pragma once

namespace famseg::reassembly {

struct Shape {
  long long n, c, h, w;  // of x
  int kernel_size, scale, groups;
};

constexpr int kThreads = 128, kPlainThreads = 256;
// A block's pixels in the tuned kernels.
constexpr int kTileWidth = 32, kTileHeight = 4;
constexpr int kKernel = 5, kRadius = 2, kTaps = 25, kScale = 2, kPhases = 4;
constexpr int kWide = kTileWidth + 2 * kRadius, kHigh = kTileHeight + 2 * kRadius;
// Channels that are staged at once: 32 * 36 * 8 * 4 bytes or, four numbers a pixel, four of them.
constexpr int kStaged = 8;
// Channels of one thread of the plain kernels: they share the weights.
constexpr long long kChannels = 8;

template <typename T>
struct alignas(2 * sizeof(T)) Two {
  T value[2];
};

// The phases of one pixel.
struct alignas(16) Phases {
  float value[kPhases];
};

// Where weight (group g, tap, dy, dx) of pixel (i, j) of image n is.
template <bool SOFTMAX>
__device__ inline long long weight_at(const Shape& shape, long long n, long long g, long long tap,
                                      long long dy, long long dx, long long i, long long j) {
  const long long k2 = static_cast<long long>(shape.kernel_size) * shape.kernel_size;
  const long long s = shape.scale, channel = (n * shape.groups + g) * k2 + tap;
  return SOFTMAX ? ((channel * s + dy) * s + dx) * shape.h * shape.w + i * shape.w + j
                 : (channel * shape.h * s + i * s + dy) * shape.w * s + j * s + dx;
}

// One softmax's log of the sum of exponentials is kept for each pixel and phase, (n, g, phase, i,
// j): what the gradient of x needs of its neighbours' softmaxes.
__device__ inline long long log_sum_at(const Shape& shape, long long n, long long g,
                                       long long phase, long long i, long long j) {
  const long long s2 = static_cast<long long>(shape.scale) * shape.scale;
  return (((n * shape.groups + g) * s2 + phase) * shape.h + i) * shape.w + j;
}

// What a block of the tuned kernels works on: a tile of pixels, some channels of a group.
struct Tile {
  long long n, g, first, channels;  // of x
  int i0, j0, i, j;
  bool beyond, inside;

  __device__ Tile(const Shape& shape, int splits) {
    const long long tiles_x = (shape.w + kTileWidth - 1) / kTileWidth;
    const long long tiles_y = (shape.h + kTileHeight - 1) / kTileHeight;
    long long rest = static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x;
    j0 = static_cast<int>(rest % tiles_x) * kTileWidth;
    rest /= tiles_x;
    i0 = static_cast<int>(rest % tiles_y) * kTileHeight;
    rest /= tiles_y;
    const long long split = rest % splits;
    rest /= splits;
    g = rest % shape.groups;
    n = rest / shape.groups;
    beyond = n >= shape.n;
    const long long all = shape.c / shape.groups, share = (all + splits - 1) / splits;
    first = g * all + split * share;
    channels = min(share, all - split * share);
    i = i0 + static_cast<int>(threadIdx.x) / kTileWidth;
    j = j0 + static_cast<int>(threadIdx.x) % kTileWidth;
    inside = i < shape.h && j < shape.w;
  }

  // Of the channels from the `base`-th on, at most `most`.
  __device__ int count(long long base, int most) const {
    return static_cast<int>(min(channels - base, static_cast<long long>(most)));
  }
  // Where the plane of x of the channel `base` after the first is; y's planes are kPhases times as
  // large, this thread's pixels of y are `phases_at` into them.
  __device__ long long at(const Shape& shape, long long base) const {
    return (n * shape.c + first + base) * shape.h * shape.w;
  }
  __device__ long long phases_at(const Shape& shape) const {
    return (static_cast<long long>(i) * kScale * shape.w + j) * kScale;
  }
};

// Stages the pixels around the tile of up to kStaged channels from the `base`-th on, zero outside.
template <typename T>
__device__ void stage_x(float (*to)[kHigh][kWide], const T* x, const Shape& shape, const Tile& tile,
                        long long base, int count) {
  const T* plane = x + tile.at(shape, base);
  for (int e = static_cast<int>(threadIdx.x); e < count * kHigh * kWide; e += kThreads) {
    const int column = e % kWide, row = e / kWide % kHigh, c = e / (kWide * kHigh);
    const long long i = tile.i0 + row - kRadius, j = tile.j0 + column - kRadius;
    const bool inside = i >= 0 && i < shape.h && j >= 0 && j < shape.w;
    to[c][row][column] = inside ? widen(plane[(c * shape.h + i) * shape.w + j]) : 0.0f;
  }
}

// A pixel's taps of one phase.
template <typename T, bool SOFTMAX>
__device__ void load_weights(float (&weight)[kTaps], const T* weights, const Shape& shape,
                             const Tile& tile, int phase) {
  // Step by step, not by 25 addresses that would take 50 registers.
  const T* from = weights + weight_at<SOFTMAX>(shape, tile.n, tile.g, 0, phase / kScale,
                                               phase % kScale, tile.i, tile.j);
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    weight[tap] = tile.inside ? widen(*from) : 0.0f;
    from += shape.h * shape.w * kPhases;
  }
}

// Turns logits into their softmax; gives the log of the sum of exponentials.
__device__ inline float softmax(float (&weight)[kTaps]) {
  float largest = weight[0], total = 0.0f;
#pragma unroll
  for (int tap = 1; tap < kTaps; ++tap) {
    // A NaN compares false and is passed over here; it enters the sum below.
    largest = weight[tap] > largest ? weight[tap] : largest;
  }
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    weight[tap] = expf(weight[tap] - largest);
    total += weight[tap];
  }
  const float scale = 1.0f / total;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) weight[tap] *= scale;
  return largest + logf(total);
}

}  // namespace famseg::reassembly
