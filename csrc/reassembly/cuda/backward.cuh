// The gradients. Kernel text only: see tile.cuh.
#pragma once

#include "reassembly/cuda/tile.cuh"

namespace famseg::reassembly {

// Also writes the softmaxes' log sums, for the gradient of x. One block has all channels of its
// group.
template <typename T, bool SOFTMAX>
__global__ void __launch_bounds__(kThreads, 3)
    gradient_weights_tuned(const T* __restrict__ x, const T* __restrict__ weights,
                           const T* __restrict__ y_gradient, T* __restrict__ weights_gradient,
                           float* __restrict__ log_sums, Shape shape) {
  __shared__ float staged[kStaged][kHigh][kWide];
  const Tile tile(shape, 1);
  if (tile.beyond) return;
  float sum[kPhases][kTaps] = {};
  for (long long base = 0; base < tile.channels && weights_gradient != nullptr; base += kStaged) {
    const int count = tile.count(base, kStaged);
    __syncthreads();  // the previous channels are used up
    stage_x(staged, x, shape, tile, base, count);
    __syncthreads();
    if (!tile.inside) continue;
    const float* window = &staged[0][tile.i - tile.i0][tile.j - tile.j0];
    const T* from = y_gradient + tile.at(shape, base) * kPhases + tile.phases_at(shape);
    for (int c = 0; c < count; ++c) {
      float factor[kPhases];
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
        for (int phase = 0; phase < kPhases; ++phase) sum[phase][tap] += factor[phase] * value;
      }
      window += kHigh * kWide;
      from += shape.h * shape.w * kPhases;
    }
  }
  if (!tile.inside) return;
#pragma unroll
  for (int phase = 0; phase < kPhases; ++phase) {
    float weight[kTaps], dot = 0.0f;
    if (SOFTMAX) {
      load_weights<T, SOFTMAX>(weight, weights, shape, tile, phase);
      log_sums[log_sum_at(shape, tile.n, tile.g, phase, tile.i, tile.j)] = softmax(weight);
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) dot += weight[tap] * sum[phase][tap];
    }
    if (weights_gradient == nullptr) continue;
    T* to = weights_gradient + weight_at<SOFTMAX>(shape, tile.n, tile.g, 0, phase / kScale,
                                                  phase % kScale, tile.i, tile.j);
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      narrow(*to, SOFTMAX ? weight[tap] * (sum[phase][tap] - dot) : sum[phase][tap]);
      to += shape.h * shape.w * kPhases;
    }
  }
}

// A pixel (i, j) of x gathers from the phases of the pixels (i - ky + r, j - kx + r) around it,
// each with the weight of tap (ky, kx): every weight is read by one thread only.
template <typename T, bool SOFTMAX>
__global__ void __launch_bounds__(kThreads, 3)
    gradient_x_tuned(const T* __restrict__ weights, const float* __restrict__ log_sums,
                     const T* __restrict__ y_gradient, T* __restrict__ x_gradient, Shape shape,
                     int splits) {
  constexpr int kPlanes = kStaged / 2;
  __shared__ Phases staged[kPlanes][kHigh][kWide];
  const Tile tile(shape, splits);
  if (tile.beyond) return;
  const int row = tile.i - tile.i0, column = tile.j - tile.j0;
  float weight[kPhases][kTaps];
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    const int i = tile.i - tap / kKernel + kRadius, j = tile.j - tap % kKernel + kRadius;
    const bool inside = tile.inside && i >= 0 && i < shape.h && j >= 0 && j < shape.w;
#pragma unroll
    for (int phase = 0; phase < kPhases; ++phase) {
      weight[phase][tap] = 0.0f;
      if (!inside) continue;
      const float value = widen(weights[weight_at<SOFTMAX>(shape, tile.n, tile.g, tap,
                                                           phase / kScale, phase % kScale, i, j)]);
      weight[phase][tap] =
          SOFTMAX ? expf(value - log_sums[log_sum_at(shape, tile.n, tile.g, phase, i, j)]) : value;
    }
  }
  for (long long base = 0; base < tile.channels; base += kPlanes) {
    const int count = tile.count(base, kPlanes);
    __syncthreads();  // the previous channels are used up
    const T* plane = y_gradient + tile.at(shape, base) * kPhases;
    for (int e = static_cast<int>(threadIdx.x); e < count * kHigh * kWide; e += kThreads) {
      const int q = e % kWide, p = e / kWide % kHigh, c = e / (kWide * kHigh);
      const long long i = tile.i0 + p - kRadius, j = tile.j0 + q - kRadius;
      Phases four = {};
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
        const Phases four =
            staged[c][row + 2 * kRadius - tap / kKernel][column + 2 * kRadius - tap % kKernel];
#pragma unroll
        for (int phase = 0; phase < kPhases; ++phase) sum += weight[phase][tap] * four.value[phase];
      }
      narrow(x_gradient[tile.at(shape, base + c) + tile.i * shape.w + tile.j], sum);
    }
  }
}

// ---- any size -----------------------------------------------------------------------------------

// One thread: all taps of one phase of a pixel. The softmax's gradient needs their weighted sum
// before any of them: a first round makes it, a second makes them again.
template <typename T, bool SOFTMAX>
__global__ void __launch_bounds__(kPlainThreads, 2)
    gradient_weights_any(const T* __restrict__ x, const T* __restrict__ weights,
                         const T* __restrict__ y_gradient, T* __restrict__ weights_gradient,
                         float* __restrict__ log_sums, Shape shape) {
  const long long k = shape.kernel_size, s = shape.scale, radius = k / 2, taps = k * k;
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
    const long long phase = rest % (s * s);
    rest /= s * s;
    const long long g = rest % shape.groups, n = rest / shape.groups;
    const long long dy = phase / s, dx = phase % s;
    const long long at = weight_at<SOFTMAX>(shape, n, g, 0, dy, dx, i, j);
    const T* source = x + (n * shape.c + g * channels) * plane;
    const T* factor =
        y_gradient + ((n * shape.c + g * channels) * h * s + i * s + dy) * w * s + j * s + dx;
    const auto gradient_of = [&](long long tap) {
      const long long row = i + tap / k - radius, column = j + tap % k - radius;
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
      log_sums[log_sum_at(shape, n, g, phase, i, j)] = log_sum;
      for (long long tap = 0; tap < taps && weights_gradient != nullptr; ++tap) {
        dot += expf(widen(weights[at + tap * tap_stride]) - log_sum) * gradient_of(tap);
      }
    }
    for (long long tap = 0; tap < taps && weights_gradient != nullptr; ++tap) {
      const float sum = gradient_of(tap);
      const float weight = SOFTMAX ? expf(widen(weights[at + tap * tap_stride]) - log_sum) : 1.0f;
      narrow(weights_gradient[at + tap * tap_stride], weight * (sum - dot));
    }
  }
}

// One thread: one pixel of up to kChannels channels of a group, gathering as gradient_x_tuned does.
template <typename T, bool SOFTMAX>
__global__ void __launch_bounds__(kPlainThreads, 2)
    gradient_x_any(const T* __restrict__ weights, const float* __restrict__ log_sums,
                   const T* __restrict__ y_gradient, T* __restrict__ x_gradient, Shape shape) {
  const long long k = shape.kernel_size, s = shape.scale, radius = k / 2;
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
    const long long channels = min(kChannels, group_channels - chunk * kChannels);
    float sum[kChannels] = {};
    for (long long tap = 0; tap < k * k; ++tap) {
      const long long i = row - tap / k + radius, j = column - tap % k + radius;
      if (i < 0 || i >= h || j < 0 || j >= w) continue;
      for (long long phase = 0; phase < s * s; ++phase) {
        const long long dy = phase / s, dx = phase % s;
        const float value = widen(weights[weight_at<SOFTMAX>(shape, n, g, tap, dy, dx, i, j)]);
        const float weight =
            SOFTMAX ? expf(value - log_sums[log_sum_at(shape, n, g, phase, i, j)]) : value;
        const T* from =
            y_gradient + ((n * shape.c + first) * h * s + i * s + dy) * w * s + j * s + dx;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          if (c < channels) sum[c] += weight * widen(from[c * plane * s * s]);
        }
      }
    }
    T* to = x_gradient + ((n * shape.c + first) * h + row) * w + column;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (c < channels) narrow(to[c * plane], sum[c]);
    }
  }
}

}  // namespace famseg::reassembly
