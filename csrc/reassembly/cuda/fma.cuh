// Content-aware reassembly, forward and backward. Kernel text only: whoever includes it includes
// common/cuda.h (or its twins) first.
//
//   y[n, c, s i + dy, s j + dx] = sum_tap w[tap, dy, dx, i, j] x[n, c, i + ky - r, j + kx - r]
//
// with zeros outside the image, which keep their share of w. x (N, C, H, W), y (N, C, s H, s W);
// w is the softmax over the taps of logits (N, groups k^2 s^2, H, W), channel
// (g k^2 + tap) s^2 + dy s + dx, or finished masks (N, groups k^2, s H, s W), channel g k^2 + tap.
//
// 5 x 5 taps and scale 2 are known to the compiler: a thread owns a low-resolution pixel, keeps all
// 100 of its weights (or their gradients) in registers over the channels of a group, and makes four
// outputs from each number of x it reads. With E elements of x and M of logits, C = 64:
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
// y and dy are written and read two elements at once and must be aligned for that, the others only
// for their own element.
//
// All other sizes take the plain kernels at the end. No sums over threads anywhere: the result is
// the same in every run.
#pragma once

namespace famseg::reassembly {

struct Shape {
  long long n, c, h, w;  // of x
  int kernel_size, scale, groups;
};

constexpr int kThreads = 128, kPlainThreads = 256;
// A block's pixels in the tuned kernels.
constexpr int kTileWidth = 32, kTileHeight = 4;
constexpr int kKernel = 5, kReach = 2, kTaps = 25, kScale = 2, kSub = 4;
constexpr int kWide = kTileWidth + 2 * kReach, kHigh = kTileHeight + 2 * kReach;
// Channels that are staged at once: 32 * 36 * 8 * 4 bytes or, four numbers a pixel, four of them.
constexpr int kStaged = 8;
// Channels of one thread of the plain kernels: they share the weights.
constexpr int kChannels = 8;

template <typename T>
struct alignas(2 * sizeof(T)) Two {
  T value[2];
};

struct alignas(16) Subpixels {
  float value[kSub];
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

// One softmax's log of the sum of exponentials is kept for each pixel and subpixel (n, g, dy, dx,
// i, j): what the gradient of x needs of its neighbours' softmaxes.
__device__ inline long long sum_at(const Shape& shape, long long n, long long g, long long sub,
                                   long long i, long long j) {
  const long long s2 = static_cast<long long>(shape.scale) * shape.scale;
  return (((n * shape.groups + g) * s2 + sub) * shape.h + i) * shape.w + j;
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
    channels = all - split * share < share ? all - split * share : share;
    i = i0 + static_cast<int>(threadIdx.x) / kTileWidth;
    j = j0 + static_cast<int>(threadIdx.x) % kTileWidth;
    inside = i < shape.h && j < shape.w;
  }

  // Where the plane of x of the channel `base` after the first is; y's planes are kSub times as
  // large, this thread's outputs are `subpixel` into them.
  __device__ long long at(const Shape& shape, long long base) const {
    return (n * shape.c + first + base) * shape.h * shape.w;
  }
  __device__ long long subpixel(const Shape& shape) const {
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
    const long long i = tile.i0 + row - kReach, j = tile.j0 + column - kReach;
    const bool inside = i >= 0 && i < shape.h && j >= 0 && j < shape.w;
    to[c][row][column] = inside ? widen(plane[(c * shape.h + i) * shape.w + j]) : 0.0f;
  }
}

// A pixel's taps of one subpixel.
template <typename T, bool SOFTMAX>
__device__ void load_weights(float (&weight)[kTaps], const T* weights, const Shape& shape,
                             const Tile& tile, int sub) {
  // Step by step, not by 25 addresses that would take 50 registers.
  const T* from = weights + weight_at<SOFTMAX>(shape, tile.n, tile.g, 0, sub / kScale, sub % kScale,
                                               tile.i, tile.j);
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    weight[tap] = tile.inside ? widen(*from) : 0.0f;
    from += shape.h * shape.w * kSub;
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

template <typename T, bool SOFTMAX>
__global__ void __launch_bounds__(kThreads, 3)
    forward_tuned(const T* __restrict__ x, const T* __restrict__ weights, T* __restrict__ y,
                  Shape shape, int splits) {
  __shared__ float staged[kStaged][kHigh][kWide];
  const Tile tile(shape, splits);
  if (tile.beyond) return;
  float weight[kSub][kTaps];
#pragma unroll
  for (int sub = 0; sub < kSub; ++sub) {
    load_weights<T, SOFTMAX>(weight[sub], weights, shape, tile, sub);
    if (SOFTMAX) softmax(weight[sub]);
  }
  for (long long base = 0; base < tile.channels; base += kStaged) {
    const int count =
        tile.channels - base < kStaged ? static_cast<int>(tile.channels - base) : kStaged;
    __syncthreads();  // the previous channels are used up
    stage_x(staged, x, shape, tile, base, count);
    __syncthreads();
    if (!tile.inside) continue;
    // Pointers that step from channel to channel: addresses cost registers.
    const float* window = &staged[0][tile.i - tile.i0][tile.j - tile.j0];
    T* to = y + tile.at(shape, base) * kSub + tile.subpixel(shape);
    for (int c = 0; c < count; ++c) {
      float sum[kSub] = {};
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const float value = window[tap / kKernel * kWide + tap % kKernel];
#pragma unroll
        for (int sub = 0; sub < kSub; ++sub) sum[sub] += weight[sub][tap] * value;
      }
#pragma unroll
      for (int dy = 0; dy < kScale; ++dy) {
        Two<T> pair;
        narrow(pair.value[0], sum[dy * kScale]);
        narrow(pair.value[1], sum[dy * kScale + 1]);
        *reinterpret_cast<Two<T>*>(to + dy * shape.w * kScale) = pair;
      }
      window += kHigh * kWide;
      to += shape.h * shape.w * kSub;
    }
  }
}

// Also writes the softmaxes' sums, for gradient_x. One block has all channels of its group.
template <typename T, bool SOFTMAX>
__global__ void __launch_bounds__(kThreads, 3)
    gradient_weights_tuned(const T* __restrict__ x, const T* __restrict__ weights,
                           const T* __restrict__ gradient, T* __restrict__ result,
                           float* __restrict__ sums, Shape shape) {
  __shared__ float staged[kStaged][kHigh][kWide];
  const Tile tile(shape, 1);
  if (tile.beyond) return;
  float sum[kSub][kTaps] = {};
  for (long long base = 0; base < tile.channels && result != nullptr; base += kStaged) {
    const int count =
        tile.channels - base < kStaged ? static_cast<int>(tile.channels - base) : kStaged;
    __syncthreads();  // the previous channels are used up
    stage_x(staged, x, shape, tile, base, count);
    __syncthreads();
    if (!tile.inside) continue;
    const float* window = &staged[0][tile.i - tile.i0][tile.j - tile.j0];
    const T* from = gradient + tile.at(shape, base) * kSub + tile.subpixel(shape);
    for (int c = 0; c < count; ++c) {
      float factor[kSub];
#pragma unroll
      for (int dy = 0; dy < kScale; ++dy) {
        const Two<T> pair = *reinterpret_cast<const Two<T>*>(from + dy * shape.w * kScale);
        factor[dy * kScale] = widen(pair.value[0]);
        factor[dy * kScale + 1] = widen(pair.value[1]);
      }
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const float value = window[tap / kKernel * kWide + tap % kKernel];
#pragma unroll
        for (int sub = 0; sub < kSub; ++sub) sum[sub][tap] += factor[sub] * value;
      }
      window += kHigh * kWide;
      from += shape.h * shape.w * kSub;
    }
  }
  if (!tile.inside) return;
#pragma unroll
  for (int sub = 0; sub < kSub; ++sub) {
    float weight[kTaps], dot = 0.0f;
    if (SOFTMAX) {
      load_weights<T, SOFTMAX>(weight, weights, shape, tile, sub);
      sums[sum_at(shape, tile.n, tile.g, sub, tile.i, tile.j)] = softmax(weight);
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) dot += weight[tap] * sum[sub][tap];
    }
    if (result == nullptr) continue;
    T* to = result + weight_at<SOFTMAX>(shape, tile.n, tile.g, 0, sub / kScale, sub % kScale,
                                        tile.i, tile.j);
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      narrow(*to, SOFTMAX ? weight[tap] * (sum[sub][tap] - dot) : sum[sub][tap]);
      to += shape.h * shape.w * kSub;
    }
  }
}

// A pixel (i, j) of x gathers from the outputs of the pixels (i - ky + r, j - kx + r) around it,
// each with the weight of tap (ky, kx): every weight is read by one thread only.
template <typename T, bool SOFTMAX>
__global__ void __launch_bounds__(kThreads, 3)
    gradient_x_tuned(const T* __restrict__ weights, const float* __restrict__ sums,
                     const T* __restrict__ gradient, T* __restrict__ result, Shape shape,
                     int splits) {
  constexpr int kPlanes = kStaged / 2;
  __shared__ Subpixels staged[kPlanes][kHigh][kWide];
  const Tile tile(shape, splits);
  if (tile.beyond) return;
  const int row = tile.i - tile.i0, column = tile.j - tile.j0;
  float weight[kSub][kTaps];
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    const int i = tile.i - tap / kKernel + kReach, j = tile.j - tap % kKernel + kReach;
    const bool inside = tile.inside && i >= 0 && i < shape.h && j >= 0 && j < shape.w;
#pragma unroll
    for (int sub = 0; sub < kSub; ++sub) {
      weight[sub][tap] = 0.0f;
      if (!inside) continue;
      const float value = widen(weights[weight_at<SOFTMAX>(shape, tile.n, tile.g, tap, sub / kScale,
                                                           sub % kScale, i, j)]);
      weight[sub][tap] =
          SOFTMAX ? expf(value - sums[sum_at(shape, tile.n, tile.g, sub, i, j)]) : value;
    }
  }
  for (long long base = 0; base < tile.channels; base += kPlanes) {
    const int count =
        tile.channels - base < kPlanes ? static_cast<int>(tile.channels - base) : kPlanes;
    __syncthreads();  // the previous channels are used up
    const T* plane = gradient + tile.at(shape, base) * kSub;
    for (int e = static_cast<int>(threadIdx.x); e < count * kHigh * kWide; e += kThreads) {
      const int q = e % kWide, p = e / kWide % kHigh, c = e / (kWide * kHigh);
      const long long i = tile.i0 + p - kReach, j = tile.j0 + q - kReach;
      Subpixels four = {};
      if (i >= 0 && i < shape.h && j >= 0 && j < shape.w) {
#pragma unroll
        for (int dy = 0; dy < kScale; ++dy) {
          const Two<T> pair = *reinterpret_cast<const Two<T>*>(
              plane + ((c * shape.h + i) * kScale + dy) * shape.w * kScale + j * kScale);
          four.value[dy * kScale] = widen(pair.value[0]);
          four.value[dy * kScale + 1] = widen(pair.value[1]);
        }
      }
      staged[c][p][q] = four;
    }
    __syncthreads();
    if (!tile.inside) continue;
    for (int c = 0; c < count; ++c) {
      float sum = 0.0f;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const Subpixels four =
            staged[c][row + 2 * kReach - tap / kKernel][column + 2 * kReach - tap % kKernel];
#pragma unroll
        for (int sub = 0; sub < kSub; ++sub) sum += weight[sub][tap] * four.value[sub];
      }
      narrow(result[tile.at(shape, base + c) + tile.i * shape.w + tile.j], sum);
    }
  }
}

// --- any size
// --------------------------------------------------------------------------------------

// One thread makes one output pixel of up to kChannels channels of a group. It reads its taps'
// logits twice: for the maximum, and then for exp, normalising at the end.
template <typename T, bool SOFTMAX>
__global__ void __launch_bounds__(kPlainThreads, 2)
    forward_any(const T* __restrict__ x, const T* __restrict__ weights, T* __restrict__ y,
                Shape shape) {
  const long long k = shape.kernel_size, s = shape.scale, reach = k / 2;
  const long long h = shape.h, w = shape.w, plane = h * w;
  const long long group_channels = shape.c / shape.groups;
  const long long chunks = (group_channels + kChannels - 1) / kChannels;
  const long long total = shape.n * shape.groups * chunks * plane * s * s;
  const long long step = static_cast<long long>(gridDim.x) * blockDim.x;

  for (long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
       index < total; index += step) {
    // Fastest first: output column, output row, chunk of channels, group, image.
    long long rest = index;
    const long long out_x = rest % (w * s);
    rest /= w * s;
    const long long out_y = rest % (h * s);
    rest /= h * s;
    const long long chunk = rest % chunks;
    rest /= chunks;
    const long long group = rest % shape.groups, image = rest / shape.groups;
    const long long i = out_y / s, dy = out_y % s, j = out_x / s, dx = out_x % s;

    const T* weight = weights + weight_at<SOFTMAX>(shape, image, group, 0, dy, dx, i, j);
    const long long tap_stride = plane * s * s;  // of logits and of masks
    float largest = widen(weight[0]);
    for (long long tap = 1; SOFTMAX && tap < k * k; ++tap) {
      // A NaN compares false and is passed over here; it enters the sum below.
      const float value = widen(weight[tap * tap_stride]);
      largest = value > largest ? value : largest;
    }

    const long long first = group * group_channels + chunk * kChannels;
    const long long channels = group_channels - chunk * kChannels < kChannels
                                   ? group_channels - chunk * kChannels
                                   : kChannels;
    const T* source = x + (image * shape.c + first) * plane;
    float sum[kChannels] = {};
    float total_weight = 0.0f;
    for (long long tap = 0; tap < k * k; ++tap) {
      const float value = widen(weight[tap * tap_stride]);
      const float factor = SOFTMAX ? expf(value - largest) : value;
      total_weight += factor;
      const long long row = i + tap / k - reach, column = j + tap % k - reach;
      // A tap outside the image is not left out: its weight may not be finite, and takes 0 for x.
      const bool inside = row >= 0 && row < h && column >= 0 && column < w;
      const T* pixel = inside ? source + row * w + column : nullptr;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (c < channels) sum[c] += factor * (inside ? widen(pixel[c * plane]) : 0.0f);
      }
    }

    T* out = y + ((image * shape.c + first) * h * s + out_y) * w * s + out_x;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (c < channels) {
        narrow(out[c * plane * s * s], SOFTMAX ? sum[c] / total_weight : sum[c]);
      }
    }
  }
}

// One thread: all taps of one subpixel of a pixel. The softmax's gradient needs their weighted sum
// before any of them: a first round makes it, a second makes them again.
template <typename T, bool SOFTMAX>
__global__ void __launch_bounds__(kPlainThreads, 2)
    gradient_weights_any(const T* __restrict__ x, const T* __restrict__ weights,
                         const T* __restrict__ gradient, T* __restrict__ result,
                         float* __restrict__ sums, Shape shape) {
  const long long k = shape.kernel_size, s = shape.scale, reach = k / 2, taps = k * k;
  const long long h = shape.h, w = shape.w, plane = h * w, tap_stride = plane * s * s;
  const long long channels = shape.c / shape.groups;
  const long long total = shape.n * shape.groups * s * s * plane;
  const long long step = static_cast<long long>(gridDim.x) * blockDim.x;
  for (long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
       index < total; index += step) {
    long long rest = index;
    const long long j = rest % w;
    rest /= w;
    const long long i = rest % h;
    rest /= h;
    const long long sub = rest % (s * s);
    rest /= s * s;
    const long long g = rest % shape.groups, n = rest / shape.groups;
    const long long dy = sub / s, dx = sub % s;
    const long long at = weight_at<SOFTMAX>(shape, n, g, 0, dy, dx, i, j);
    const T* source = x + (n * shape.c + g * channels) * plane;
    const T* factor =
        gradient + ((n * shape.c + g * channels) * h * s + i * s + dy) * w * s + j * s + dx;
    const auto gradient_of = [&](long long tap) {
      const long long row = i + tap / k - reach, column = j + tap % k - reach;
      const bool inside = row >= 0 && row < h && column >= 0 && column < w;
      float sum = 0.0f;
      for (long long c = 0; c < channels; ++c) {
        const float value = inside ? widen(source[c * plane + row * w + column]) : 0.0f;
        sum += widen(factor[c * tap_stride]) * value;
      }
      return sum;
    };

    float log_sum = 0.0f, dot = 0.0f;
    if (SOFTMAX) {
      float largest = widen(weights[at]), exponentials = 0.0f;
      for (long long tap = 1; tap < taps; ++tap) {
        const float value = widen(weights[at + tap * tap_stride]);
        largest = value > largest ? value : largest;
      }
      for (long long tap = 0; tap < taps; ++tap) {
        exponentials += expf(widen(weights[at + tap * tap_stride]) - largest);
      }
      log_sum = largest + logf(exponentials);
      sums[sum_at(shape, n, g, sub, i, j)] = log_sum;
      for (long long tap = 0; tap < taps && result != nullptr; ++tap) {
        dot += expf(widen(weights[at + tap * tap_stride]) - log_sum) * gradient_of(tap);
      }
    }
    for (long long tap = 0; tap < taps && result != nullptr; ++tap) {
      const float sum = gradient_of(tap);
      const float weight = SOFTMAX ? expf(widen(weights[at + tap * tap_stride]) - log_sum) : 1.0f;
      narrow(result[at + tap * tap_stride], weight * (sum - dot));
    }
  }
}

// One thread: one pixel of up to kChannels channels of a group, gathering as gradient_x_tuned does.
template <typename T, bool SOFTMAX>
__global__ void __launch_bounds__(kPlainThreads, 2)
    gradient_x_any(const T* __restrict__ weights, const float* __restrict__ sums,
                   const T* __restrict__ gradient, T* __restrict__ result, Shape shape) {
  const long long k = shape.kernel_size, s = shape.scale, reach = k / 2;
  const long long h = shape.h, w = shape.w, plane = h * w;
  const long long group_channels = shape.c / shape.groups;
  const long long chunks = (group_channels + kChannels - 1) / kChannels;
  const long long total = shape.n * shape.groups * chunks * plane;
  const long long step = static_cast<long long>(gridDim.x) * blockDim.x;
  for (long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
       index < total; index += step) {
    long long rest = index;
    const long long column = rest % w;
    rest /= w;
    const long long row = rest % h;
    rest /= h;
    const long long chunk = rest % chunks;
    rest /= chunks;
    const long long g = rest % shape.groups, n = rest / shape.groups;
    const long long first = g * group_channels + chunk * kChannels;
    const long long channels = group_channels - chunk * kChannels < kChannels
                                   ? group_channels - chunk * kChannels
                                   : kChannels;
    float sum[kChannels] = {};
    for (long long tap = 0; tap < k * k; ++tap) {
      const long long i = row - tap / k + reach, j = column - tap % k + reach;
      if (i < 0 || i >= h || j < 0 || j >= w) continue;
      for (long long sub = 0; sub < s * s; ++sub) {
        const long long dy = sub / s, dx = sub % s;
        const float value = widen(weights[weight_at<SOFTMAX>(shape, n, g, tap, dy, dx, i, j)]);
        const float weight = SOFTMAX ? expf(value - sums[sum_at(shape, n, g, sub, i, j)]) : value;
        const T* from =
            gradient + ((n * shape.c + first) * h * s + i * s + dy) * w * s + j * s + dx;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          if (c < channels) sum[c] += weight * widen(from[c * plane * s * s]);
        }
      }
    }
    T* to = result + ((n * shape.c + first) * h + row) * w + column;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (c < channels) narrow(to[c * plane], sum[c]);
    }
  }
}

}  // namespace famseg::reassembly
