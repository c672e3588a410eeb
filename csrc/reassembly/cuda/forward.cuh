// The result. Kernel text only: see tile.cuh.
#pragma once

#include "reassembly/cuda/tile.cuh"

namespace famseg::reassembly {

template <typename T, bool SOFTMAX>
__global__ void __launch_bounds__(kThreads, 3)
    forward_tuned(const T* __restrict__ x, const T* __restrict__ weights, T* __restrict__ y,
                  Shape shape, int splits) {
  __shared__ float staged[kStaged][kHigh][kWide];
  const Tile tile(shape, splits);
  if (tile.beyond) return;
  float weight[kPhases][kTaps];
#pragma unroll
  for (int phase = 0; phase < kPhases; ++phase) {
    load_weights<T, SOFTMAX>(weight[phase], weights, shape, tile, phase);
    if (SOFTMAX) softmax(weight[phase]);
  }
  for (long long base = 0; base < tile.channels; base += kStaged) {
    const int count = tile.count(base, kStaged);
    __syncthreads();  // the previous channels are used up
    stage_x(staged, x, shape, tile, base, count);
    __syncthreads();
    if (!tile.inside) continue;
    // Pointers that step from channel to channel: addresses cost registers.
    const float* window = &staged[0][tile.i - tile.i0][tile.j - tile.j0];
    T* to = y + tile.at(shape, base) * kPhases + tile.phases_at(shape);
    for (int c = 0; c < count; ++c) {
      float sum[kPhases] = {};
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const float value = window[tap / kKernel * kWide + tap % kKernel];
#pragma unroll
        for (int phase = 0; phase < kPhases; ++phase) sum[phase] += weight[phase][tap] * value;
      }
#pragma unroll
      for (int dy = 0; dy < kScale; ++dy) {
        Two<T> pair;
        narrow(pair.value[0], sum[dy * kScale]);
        narrow(pair.value[1], sum[dy * kScale + 1]);
        *reinterpret_cast<Two<T>*>(to + dy * shape.w * kScale) = pair;
      }
      window += kHigh * kWide;
      to += shape.h * shape.w * kPhases;
    }
  }
}

// ---- any size -----------------------------------------------------------------------------------

// One thread makes one output pixel of up to kChannels channels of a group. It reads its taps'
// logits twice: for the maximum, and then for exp, normalising at the end.
template <typename T, bool SOFTMAX>
__global__ void __launch_bounds__(kPlainThreads, 2)
    forward_any(const T* __restrict__ x, const T* __restrict__ weights, T* __restrict__ y,
                Shape shape) {
  const long long k = shape.kernel_size, s = shape.scale, radius = k / 2;
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
    const long long channels = min(kChannels, group_channels - chunk * kChannels);
    const T* source = x + (image * shape.c + first) * plane;
    float sum[kChannels] = {};
    float total_weight = 0.0f;
    for (long long tap = 0; tap < k * k; ++tap) {
      const float value = widen(weight[tap * tap_stride]);
      const float factor = SOFTMAX ? expf(value - largest) : value;
      total_weight += factor;
      const long long row = i + tap / k - radius, column = j + tap % k - radius;
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

}  // namespace famseg::reassembly
