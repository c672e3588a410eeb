// Content-aware reassembly, forward. Kernel text only: no include of torch, of the CUDA headers or
// of the standard library, so that g++ compiles it too (tests/cuda_text, common/cuda_on_cpu.h).
// Whoever includes it first declares, for each element type T,
//   float widen(T)   and   void narrow(T& to, float from).
#pragma once

namespace famseg::reassembly {

struct Shape {
  long long n, c, h, w;  // of x
  int kernel_size, scale, groups;
};

// Channels of one thread: each needs a sum in a register, and they share the softmax.
constexpr int kChannels = 8;

// x (N, C, H, W); logits (N, groups * k^2 * s^2, H, W), channel (g * k^2 + tap) * s^2 + dy * s +
// dx; y (N, C, s * H, s * W):
//
//   y[n, c, s i + dy, s j + dx] = sum_tap softmax(logits)_tap * x[n, c, i + ky - r, j + kx - r]
//
// with zeros outside the image, which keep their share of the softmax.
//
// One thread makes one output pixel of up to kChannels channels of a group. It reads its taps'
// logits twice: for the maximum, and then for exp, normalising at the end, so that no softmax is
// ever in memory. No sums over threads: the result is the same in every run.
template <typename T>
__global__ void __launch_bounds__(256)
    reassemble_forward(const T* __restrict__ x, const T* __restrict__ logits, T* __restrict__ y,
                       Shape shape) {
  const long long k = shape.kernel_size, s = shape.scale, reach = k / 2, taps = k * k;
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
    const long long group = rest % shape.groups;
    const long long image = rest / shape.groups;

    const long long i = out_y / s, dy = out_y % s, j = out_x / s, dx = out_x % s;
    const long long tap_stride = s * s * plane;
    const T* logit = logits + (image * shape.groups + group) * taps * tap_stride +
                     (dy * s + dx) * plane + i * w + j;

    float largest = widen(logit[0]);
    for (long long tap = 1; tap < taps; ++tap) {
      // A NaN compares false and is passed over here; it enters the sum below.
      const float value = widen(logit[tap * tap_stride]);
      largest = value > largest ? value : largest;
    }

    const long long first = group * group_channels + chunk * kChannels;
    const long long channels = group_channels - chunk * kChannels < kChannels
                                   ? group_channels - chunk * kChannels
                                   : kChannels;
    const T* source = x + (image * shape.c + first) * plane;
    float sum[kChannels] = {};
    float total_weight = 0.0f;
    for (long long ky = 0; ky < k; ++ky) {
      for (long long kx = 0; kx < k; ++kx) {
        const float weight = expf(widen(logit[(ky * k + kx) * tap_stride]) - largest);
        total_weight += weight;
        const long long row = i + ky - reach, column = j + kx - reach;
        if (row < 0 || row >= h || column < 0 || column >= w) continue;
        const T* pixel = source + row * w + column;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          if (c < channels) sum[c] += weight * widen(pixel[c * plane]);
        }
      }
    }

    T* out = y + ((image * shape.c + first) * h * s + out_y) * w * s + out_x;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (c < channels) narrow(out[c * plane * s * s], sum[c] / total_weight);
    }
  }
}

}  // namespace famseg::reassembly
