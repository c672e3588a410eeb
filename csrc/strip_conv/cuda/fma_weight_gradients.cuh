// The gradients of weights and biases, in FP32 arithmetic. Kernel text only, like fma_stages.cuh.
//
// Correlations with as many FMAs as the convolutions, the roles exchanged: the taps are the sums in
// registers, a thread's outputs' gradients the factors. Each thread sums over what it owns, then
// the warp by shuffles, the warps in order: `partials` (n, tile, c, taps). A second kernel adds up
// n and tiles in order. No atomics, the same bits in every run.
#pragma once

#include "strip_conv/cuda/fma_stages.cuh"

namespace famseg::strip_conv {

// sum[q] += gradient[r] * in[r + q] over 16 neighbours r; in and gradient 16-byte aligned. With K
// the taps are those of the kernel's padded window, else the next TAPS of them.
template <int K, int TAPS>
__device__ void correlate_along_v(float (&sum)[TAPS], const float* gradient, const float* in) {
  float own[kOutputs], window[kOutputs + 4];
#pragma unroll
  for (int i = 0; i < kOutputs; i += 4) {
    const Four<float> a = load4(gradient + i), b = load4(in + i);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      own[i + t] = a.value[t];
      window[i + t] = b.value[t];
    }
  }
#pragma unroll
  for (int q = 0; q < TAPS; q += 4) {
    const Four<float> next = load4(in + kOutputs + q);
#pragma unroll
    for (int t = 0; t < 4; ++t) window[kOutputs + t] = next.value[t];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      if (K > 0 && (q + t < lead(K) || q + t >= lead(K) + K)) continue;
#pragma unroll
      for (int r = 0; r < kOutputs; ++r) sum[q + t] += own[r] * window[r + t];
    }
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) window[i] = window[i + 4];
  }
}

// sum[tap] += gradient row r * row first_row + r + tap of `in`, over 16 x 4 outputs.
template <int TAPS>
__device__ void correlate_along_u(float (&sum)[TAPS], const float (&gradient)[kOutputs][4],
                                  const float* in, int pitch, int first_row, int rows) {
#pragma unroll
  for (int j = 0; j < kOutputs + TAPS - 1; ++j) {
    Four<float> value = {};
    if (first_row + j >= 0 && first_row + j < rows) value = load4(in + (first_row + j) * pitch);
#pragma unroll
    for (int r = 0; r < kOutputs; ++r) {
      if (j < r || j >= r + TAPS) continue;
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[j - r] += gradient[r][c] * value.value[c];
    }
  }
}

__device__ inline void load_own(float (&own)[kOutputs][4], const float* from, int pitch, int rows) {
#pragma unroll
  for (int r = 0; r < kOutputs; ++r) {
    Four<float> four = {};
    if (r < rows) four = load4(from + r * pitch);
#pragma unroll
    for (int c = 0; c < 4; ++c) own[r][c] = four.value[c];
  }
}

// All K x K taps in registers.
template <int K>
__device__ void correlate_in_both(float (&sum)[K * K], const float (&gradient)[kOutputs][4],
                                  const float* in, int pitch, int first_row, int rows) {
#pragma unroll
  for (int j = 0; j < kOutputs + K - 1; ++j) {
    const bool inside = first_row + j >= 0 && first_row + j < rows;
    const float* row = in + (first_row + j) * pitch;
    float window[padded(K) + 4];
#pragma unroll
    for (int i = 0; i < padded(K) + 4; i += 4) {
      Four<float> four = {};
      if (inside) four = load4(row + i);
#pragma unroll
      for (int t = 0; t < 4; ++t) window[i + t] = four.value[t];
    }
#pragma unroll
    for (int r = 0; r < kOutputs; ++r) {
      if (j < r || j >= r + K) continue;
#pragma unroll
      for (int tap = 0; tap < K; ++tap) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          sum[(j - r) * K + tap] += gradient[r][c] * window[lead(K) + tap + c];
        }
      }
    }
  }
}

// Sums over the threads of the block, in a fixed order; to[i] for i in [from, until). All threads
// call it; `scratch` holds kWarps rows of kScratch.
template <int TAPS>
__device__ void reduce(float (&sum)[TAPS], float* scratch, float* to, int from, int until) {
  static_assert(TAPS <= kScratch);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int i = 0; i < TAPS; ++i) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], mask);
    if (lane == 0) scratch[warp * kScratch + i] = sum[i];
  }
  __syncthreads();
  const int i = from + static_cast<int>(threadIdx.x);
  if (i < until) {
    float total = 0.0f;
    for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) {
      total += scratch[w * kScratch + i];
    }
    to[i - from] = total;
  }
  __syncthreads();
}

// One block: one tile of one plane. Shared memory:
//
//   weights | scratch | a, as in `strips` | dy (before: da) on the tile's columns | x, later r
//
// r is first r_i, then dr_i. FMAs an element: 25 and 39 to recompute a and r_i, 39 for dr_i, 103 for
// the correlations. 128 x 128 in tiles of 128 x 64: 144 KB, 128 threads, one block a processor.
template <typename T, bool TUNED>
__global__ void __launch_bounds__(kThreads, 1)
    weight_gradients(Arguments args, Plan plan, float* __restrict__ partials) {
  const ThreadPlace me(plan, args.planes);
  if (me.beyond) return;
  float* const shared = static_cast<float*>(shared_memory());
  float* const scratch = shared + plan.scratch_at;
  float* const a = shared + plan.a_at;
  float* const dy = shared + plan.dy_at;
  float* const x = shared + plan.x_at;
  float* const r = shared + plan.x_at;

  const int height = args.h, width = args.w;
  const int k = args.square.size, reach = k / 2, reach4 = round4(reach);
  const Region out = me.region(plan, height, width);
  const int own_rows = out.u1 - out.u0;
  const int segments = (out.v1 - out.v0 + kOutputs - 1) / kOutputs;
  const int groups = (out.v1 - out.v0 + 3) / 4, left = round4(plan.row_reach);
  const int row0 = max(0, out.u0 - plan.col_reach);
  const int rows = min(height, out.u1 + plan.col_reach) - row0;
  const Region a_region = {row0, row0 + rows, out.v0 - left,
                           out.v0 + kOutputs * segments + round4(plan.row_reach + 1)};
  const long long plane_size = static_cast<long long>(height) * width;
  const T* x_plane = static_cast<const T*>(args.x) + me.plane * plane_size;
  const T* dy_plane = static_cast<const T*>(args.dy) + me.plane * plane_size;
  const long long channel = me.plane % args.c;
  float* to =
      partials +
      ((me.plane / args.c * plan.tiles_u * plan.tiles_v + me.tile) * args.c + channel) * plan.sums;

  // The column kernels carry dy back: mirrored.
  stage_weights<T>(shared, args, plan, channel, false, true, me);

  // The gradient of what a correlation correlates, zero beyond the tile's columns: their sums must
  // not see the neighbour's.
  const auto own_columns = [&](float* buffer, const auto* plane, int u0, int u1) {
    for (Walk at(me.id, me.threads, kOutputs * segments); at.slow < u1 - u0; at.next()) {
      const int v = out.v0 + at.fast;
      buffer[at.slow * plan.r_pitch + at.fast] =
          v < out.v1 ? widen(plane[static_cast<long long>(u0 + at.slow) * width + v]) : 0.0f;
    }
  };
  const auto sum_over = [&](const float* buffer, int first_row, float* where) {
    float sum[1] = {};
    for (Walk at(me.id, me.threads, 4 * segments); at.slow < own_rows; at.next()) {
      const Four<float> four = load4(buffer + (first_row + at.slow) * plan.r_pitch + 4 * at.fast);
      sum[0] += (four.value[0] + four.value[1]) + (four.value[2] + four.value[3]);
    }
    reduce(sum, scratch, where, 0, 1);
  };
  // Calls body(u, first column) for the 16 x 4 patches of the tile.
  const auto patches = [&](const auto& body) {
    for (Walk at(me.id, me.threads, groups); kOutputs * at.slow < own_rows; at.next()) {
      body(kOutputs * at.slow, 4 * at.fast);
    }
  };

  if (k > 0) {
    const Region x_region = {max(0, row0 - reach), min(height, row0 + rows + reach),
                             a_region.v0 - reach4, a_region.v1 + round4(reach + 1)};
    const int x_rows = x_region.u1 - x_region.u0;
    stage(x, plan.x_pitch, x_plane, x_region, width, me);
    own_columns(dy, args.da + me.plane * plane_size, out.u0, out.u1);
    fill_zero(a, rows * plan.a_pitch, me);
    __syncthreads();

    const int first = out.u0 - reach - x_region.u0;
    if constexpr (TUNED) {
      float sum[kSquare * kSquare] = {};
      patches([&](int u, int v) {
        float own[kOutputs][4];
        load_own(own, dy + u * plan.r_pitch + v, plan.r_pitch, own_rows - u);
        correlate_in_both<kSquare>(sum, own, x + left + v, plan.x_pitch, first + u, x_rows);
      });
      reduce(sum, scratch, to, 0, kSquare * kSquare);
    } else {
      for (int ky = 0; ky < k; ++ky) {
        for (int base = 0; base < padded(k); base += kChunk) {
          float sum[kChunk] = {};
          for (Walk at(me.id, me.threads, own_rows); at.slow < segments; at.next()) {
            const int row = first + at.fast + ky;
            if (row < 0 || row >= x_rows) continue;
            correlate_along_v<0>(sum, dy + at.fast * plan.r_pitch + kOutputs * at.slow,
                                 x + row * plan.x_pitch + left + kOutputs * at.slow + base);
          }
          const int from = max(0, lead(k) - base), until = min(kChunk, lead(k) + k - base);
          reduce(sum, scratch, to + ky * k + base + from - lead(k), from, until);
        }
      }
    }
    sum_over(dy, 0, to + k * k);

    const Region inside = {a_region.u0, a_region.u1, max(0, a_region.v0), min(width, a_region.v1)};
    const int skipped = inside.v0 - a_region.v0;
    square_stage<TUNED>(a + skipped, plan.a_pitch, x + skipped, plan.x_pitch, x_region.u0, x_rows,
                        inside, width, shared + plan.square_at, k,
                        bias_of<T>(args.square.bias, channel), me);
  } else {
    stage(a, plan.a_pitch, x_plane, a_region, width, me);
  }
  own_columns(dy, dy_plane, row0, row0 + rows);
  __syncthreads();
  to += plan.branch_sums;
  sum_over(dy, out.u0 - row0, to++);  // the gradient of each column bias

  const auto branch = [&](auto size, int b) {
    constexpr int K = decltype(size)::value;
    const Convolution& row = args.branches[b].row;
    const Convolution& col = args.branches[b].col;
    const int own_row = out.u0 - row0;
    row_stage<K>(r, plan.r_pitch, a + left, plan.a_pitch, rows, segments, shared + plan.row_at[b],
                 row.size, bias_of<T>(row.bias, channel), me);
    __syncthreads();
    constexpr int kColTaps = K > 0 ? K : kChunk;
    for (int base = 0; base < col.size; base += kColTaps) {
      float sum[kColTaps] = {};
      patches([&](int u, int v) {
        float own[kOutputs][4];
        load_own(own, dy + (own_row + u) * plan.r_pitch + v, plan.r_pitch, own_rows - u);
        correlate_along_u(sum, own, r + v, plan.r_pitch, own_row + u - col.size / 2 + base, rows);
      });
      reduce(sum, scratch, to + base, 0, min(kColTaps, col.size - base));
    }
    to += col.size;

    patches([&](int u, int v) {
      float sum[kOutputs][4] = {};
      along_u<K>(sum, dy + v, plan.r_pitch, own_row + u - col.size / 2, rows,
                 shared + plan.col_at[b], col.size);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        if (u + o < own_rows) store4(r + (u + o) * plan.r_pitch + v, sum[o]);
      }
    });
    // The last segment may be wider than the groups that were written.
    for (Walk at(me.id, me.threads, kOutputs); at.slow < own_rows; at.next()) {
      const int v = 4 * groups + at.fast;
      if (v < kOutputs * segments) r[at.slow * plan.r_pitch + v] = 0.0f;
    }
    __syncthreads();

    constexpr int kRowTaps = K > 0 ? padded(K) : kChunk;
    const int row_size = row.size;
    for (int base = 0; base < padded(row_size); base += kRowTaps) {
      float sum[kRowTaps] = {};
      for (Walk at(me.id, me.threads, own_rows); at.slow < segments; at.next()) {
        correlate_along_v<K>(sum, r + at.fast * plan.r_pitch + kOutputs * at.slow,
                             a + (own_row + at.fast) * plan.a_pitch + left + kOutputs * at.slow -
                                 round4(row_size / 2) + base);
      }
      const int from = max(0, lead(row_size) - base);
      const int until = min(kRowTaps, lead(row_size) + row_size - base);
      reduce(sum, scratch, to + base + from - lead(row_size), from, until);
    }
    sum_over(r, 0, to + row_size);
    to += row_size + 1;
  };
  for_branches<TUNED>(args.branch_count, branch);
}

// Adds up the partials (count, channels, sums) over count, in order and in double, and
// writes them to the gradients that are wanted.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    sum_partials(const float* __restrict__ partials, long long count, int channels, int sums,
                 Outputs outputs) {
  const long long total = static_cast<long long>(channels) * sums;
  const long long step = static_cast<long long>(gridDim.x) * blockDim.x;
  for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += step) {
    const long long channel = i / sums;
    const int place = static_cast<int>(i % sums);
    double sum = 0.0;
    for (long long n = 0; n < count; ++n) sum += partials[n * total + i];
    for (int o = 0; o < outputs.count; ++o) {
      const Output& output = outputs.output[o];
      if (output.to == nullptr || place < output.first || place >= output.first + output.size) {
        continue;  // one sum may go to several: the biases of all col_i have the same gradient
      }
      narrow(static_cast<T*>(output.to)[channel * output.size + place - output.first],
             static_cast<float>(sum));
    }
  }
}

}  // namespace famseg::strip_conv
