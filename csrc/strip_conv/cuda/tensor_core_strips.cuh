// y, and the gradient of x, of 16-bit numbers on tensor cores. Kernel text only; fma_strips.cuh says
// what a, r, row and col are in the gradient's kernel.
#pragma once

#include "strip_conv/cuda/tensor_core_stages.cuh"

namespace famseg::strip_conv {

// One block: one tile of one channel, of plan.planes images one after another. Shared memory in
// 16-bit numbers:
//
//   the matrices | a | x, later the three r_i, later (gradient) da
//
// a is stored as the image is: rows u, columns v forward, rows v, columns u for the gradient.
// 64 x 64: 13 + 41 KB, 4 warps, 4 blocks a processor of an H200; 128 x 128 in tiles of 128 x 64:
// 26 + 69 KB, 8 warps, 2 blocks.
template <typename T, bool BACKWARD>
__global__ void __launch_bounds__(kThreads, 2) strips_toeplitz(Arguments args, Plan plan) {
  const int tiles = plan.tiles_u * plan.tiles_v;
  const long long block = static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x;
  const int tile = static_cast<int>(block % tiles);
  const int channel = static_cast<int>(block / tiles % args.c);
  const int images = static_cast<int>(args.planes / args.c);
  const long long turn = block / tiles / args.c;
  if (turn * plan.planes >= images) return;
  const int first_image = static_cast<int>(turn) * plan.planes;
  const int last_image = min(images, first_image + plan.planes);

  unsigned* const matrices = static_cast<unsigned*>(shared_memory());
  T* const a = reinterpret_cast<T*>(matrices + kMatrices * 64);
  T* const x = a + plan.x_at;
  T* const r = a + plan.x_at;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;

  build_matrices<T>(matrices, args, channel, BACKWARD);
  const int height = BACKWARD ? args.w : args.h;
  const int width = BACKWARD ? args.h : args.w;
  const int u = tile / plan.tiles_v * plan.tile_u, v = tile % plan.tiles_v * plan.tile_v;
  const Region out = {u, min(height, u + plan.tile_u), v, min(width, v + plan.tile_v)};
  // Where the sum over the branches is needed: four more than the tile, two of them for 8 bytes.
  constexpr int around = BACKWARD ? 4 : 0;
  const Region core = {max(0, out.u0 - around), min(height, out.u1 + around),
                       max(0, out.v0 - around), min(width, out.v1 + around)};
  const int a_u0 = max(0, core.u0 - kBandLead), a_u1 = min(height, core.u1 + kBandLead);
  const int steps_u = (core.u1 - core.u0 + 15) / 16, steps_v = (core.v1 - core.v0 + 15) / 16;
  const int r_size = plan.r_pitch * plan.r_rows;
  const long long plane_size = static_cast<long long>(args.h) * args.w;

  for (int image = first_image; image < last_image; ++image) {
    const long long plane = static_cast<long long>(image) * args.c + channel;
    const T* in = static_cast<const T*>(BACKWARD ? args.dy : args.x) + plane * plane_size;
    T* result = static_cast<T*>(BACKWARD ? args.dx : args.y) + plane * plane_size;
    const int a_tiles = (a_u1 - a_u0 + 15) / 16;

    __syncthreads();  // the previous image is written
    const auto stage = [&](bool apart) {
      if (BACKWARD) {
        return stage_image(a, plan.a_pitch, in, core.v0 - kBandLead, 16 * steps_v + 32, a_u0,
                           16 * a_tiles, apart, args);
      }
      // Columns: 16 more on the left if there is image, 4 for the square.
      return stage_image(x, plan.x_pitch, in, a_u0 - 2, 16 * a_tiles + 4, core.v0 - 20,
                         16 * steps_v + 48, apart, args);
    };
    if (!BACKWARD) zero_rows(a, plan.a_pitch, 0, 16 * a_tiles);
    bool apart = false;
    while (__syncthreads_or(stage(apart))) apart = true;

    if (!BACKWARD) {
      const int before = core.v0 > 0 ? 1 : 0, after = core.v0 + 16 * steps_v < width ? 1 : 0;
      const int v0 = core.v0 - 16 * before;
      square_toeplitz<T>(
          x + 16 - 16 * before, plan.x_pitch, a_tiles, before + steps_v + after, matrices,
          bias_of<T>(args.square.bias, channel), [&](int row, int column, float left, float right) {
            const int c = v0 + column;  // zeros outside the image stay
            T* to = a + row * plan.a_pitch + c - core.v0 + kBandLead;
            if (c < core.v0 - kBandLead || c >= core.v0 + 16 * steps_v + 20 || c >= width) return;
            *reinterpret_cast<unsigned*>(to) = pack<T>(left, c + 1 < width ? right : 0.0f);
          });
      __syncthreads();
    }

    // r_i: rows of the image only, zero around it. Row 0 is kBandLead above the core.
    const int r_row0 = a_u0 - core.u0 + kBandLead, r_row1 = a_u1 - core.u0 + kBandLead;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      zero_rows(r + i * r_size, plan.r_pitch, 0, r_row0);
      zero_rows(r + i * r_size, plan.r_pitch, r_row1, plan.r_rows);
    }
    // Biases are read where they are needed: registers are what is scarce.
    float bias[3] = {};
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (!BACKWARD) bias[i] = bias_of<T>(args.branches[i].row.bias, channel);
    }
    unsigned band[5][2];
    load_matrices_from(band, matrices, kSquare);
    const int segments_v = (steps_v + kSegment - 1) / kSegment;
    for (int task = warp; task < a_tiles * segments_v; task += warps) {
      const int m = task % a_tiles * 16, from = task / a_tiles * kSegment;
      Sliding<BACKWARD, 3, T> window;
      window.start(a, plan.a_pitch, m, 16 * from);
      for (int step = from; step < min(steps_v, from + kSegment); ++step) {
        window.step(a, plan.a_pitch, m, 16 * step);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float sum[3][4];
#pragma unroll
          for (int i = 0; i < 3; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[i][e] = bias[i];
          }
          window.narrow(sum[0], band[0], half);
          window.wide(sum[1], band[1], band[2], half);
          window.wide(sum[2], band[3], band[4], half);
#pragma unroll
          for (int below = 0; below < 2; ++below) {
            const int row = r_row0 + m + lane / 4 + 8 * below;
            if (row >= r_row1) continue;
            T* to = r + row * plan.r_pitch + 16 * step + 8 * half + 2 * (lane % 4);
#pragma unroll
            for (int i = 0; i < 3; ++i) {
              *reinterpret_cast<unsigned*>(to + i * r_size) =
                  pack<T>(sum[i][2 * below], sum[i][2 * below + 1]);
            }
          }
        }
      }
    }
    __syncthreads();

    // Result in place of a, by the thread that needs a there.
    float col_bias = 0.0f;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (!BACKWARD) col_bias += bias_of<T>(args.branches[i].col.bias, channel);
    }
    load_matrices_from(band, matrices, kSquare + 5);
    const int segments_u = (steps_u + kSegment - 1) / kSegment;
    for (int task = warp; task < steps_v * segments_u; task += warps) {
      const int m = task % steps_v * 16, from = task / steps_v * kSegment;
      Sliding<true, 2, T> of_seven;
      Sliding<true, 3, T> of_eleven, of_twenty_one;
      of_seven.start(r, plan.r_pitch, m, 16 * from);
      of_eleven.start(r + r_size, plan.r_pitch, m, 16 * from);
      of_twenty_one.start(r + 2 * r_size, plan.r_pitch, m, 16 * from);
      for (int step = from; step < min(steps_u, from + kSegment); ++step) {
        of_seven.step(r, plan.r_pitch, m, 16 * step);
        of_eleven.step(r + r_size, plan.r_pitch, m, 16 * step);
        of_twenty_one.step(r + 2 * r_size, plan.r_pitch, m, 16 * step);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float sum[4] = {col_bias, col_bias, col_bias, col_bias};
          of_seven.narrow(sum, band[0], half);
          of_eleven.wide(sum, band[1], band[2], half);
          of_twenty_one.wide(sum, band[3], band[4], half);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int at_v = core.v0 + m + lane / 4 + e / 2 * 8;
            const int at_u = core.u0 + 16 * step + 8 * half + 2 * (lane % 4) + e % 2;
            if (at_v >= core.v1 || at_u >= core.u1) continue;
            T* own = BACKWARD ? a + (at_v - core.v0 + kBandLead) * plan.a_pitch + at_u - a_u0
                              : a + (at_u - a_u0) * plan.a_pitch + at_v - core.v0 + kBandLead;
            const float value = sum[e] + widen(*own);
            narrow(*own, value);
            if (BACKWARD && args.da != nullptr && at_v >= out.v0 && at_v < out.v1 &&
                at_u >= out.u0 && at_u < out.u1) {
              args.da[plane * plane_size + static_cast<long long>(at_v) * args.w + at_u] = value;
            }
          }
        }
      }
    }
    __syncthreads();

    if (BACKWARD) {
      // da, zero outside the image, to where the square stage can read it in whole fragments.
      const int rows = (out.v1 - out.v0 + 15) / 16, steps = (out.u1 - out.u0 + 15) / 16;
      for (Walk at(threadIdx.x, blockDim.x, 4 * steps + 4); at.slow < 16 * rows + 4; at.next()) {
        const int at_v = out.v0 - 2 + at.slow, at_u = out.u0 - 4 + 4 * at.fast;
        Four<T> four;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          narrow(four.value[e], 0.0f);
          if (at_v >= core.v0 && at_v < core.v1 && at_u + e >= core.u0 && at_u + e < core.u1) {
            four.value[e] = a[(at_v - core.v0 + kBandLead) * plan.a_pitch + at_u + e - a_u0];
          }
        }
        *reinterpret_cast<Four<T>*>(x + at.slow * plan.x_pitch + 4 * at.fast) = four;
      }
      __syncthreads();
      T* const to = a + (out.v0 - core.v0) * plan.a_pitch;
      square_toeplitz<T>(x, plan.x_pitch, rows, steps, matrices, 0.0f,
                         [&](int row, int column, float left, float right) {
                           if (row >= out.v1 - out.v0) return;
                           *reinterpret_cast<unsigned*>(to + row * plan.a_pitch + column) =
                               pack<T>(left, right);
                         });
      __syncthreads();
      unstage_image(result, to, plan.a_pitch, out.v0, out.v1, out.u0, out.u1, args);
    } else {
      unstage_image(result, a + (core.u0 - a_u0) * plan.a_pitch + kBandLead, plan.a_pitch, out.u0,
                    out.u1, out.v0, out.v1, args);
    }
    if (apart) {
      __syncthreads();  // another thread may have written the same pixel
      const int row0 = BACKWARD ? out.v0 : out.u0, row1 = BACKWARD ? out.v1 : out.u1;
      const int column0 = BACKWARD ? out.u0 : out.v0, column1 = BACKWARD ? out.u1 : out.v1;
      constexpr int strip = kStrips[2] / 2, square = kSquare / 2;
      spoil(result, in, strip + square, row0, row1, column0, column1, args);
      if (BACKWARD && args.da != nullptr) {
        spoil(args.da + plane * plane_size, in, strip, row0, row1, column0, column1, args);
      }
    }
  }
}

}  // namespace famseg::strip_conv
