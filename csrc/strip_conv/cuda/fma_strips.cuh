// y, and the gradient of x, in FP32 arithmetic. Kernel text only, like fma_stages.cuh.
//
// The gradient has the form of y with the stages in reverse order and the kernels mirrored: columns,
// rows, then the square. So its plane is staged transposed, and one kernel serves both:
//
//   forward    a = square(x) + bias    y  = a + sum_i (col_i(row_i(a) + bias) + bias)
//   gradient   a = dy                  da = a + sum_i col_i(row_i(a)),  dx = square(da)
//
// The names a, r, row and col are those of the plane as it is staged: in the gradient's kernel a is
// dy, r is dr_i, row_i runs along the image's columns with the kernel of its col_i', and col_i along
// its rows with that of row_i'.
#pragma once

#include "strip_conv/cuda/fma_stages.cuh"

namespace famseg::strip_conv {

// One block makes one tile of one plane, or of plan.planes small ones. Shared memory, each slot:
//
//   weights | a: rows of the tile and of col_i's reach | x, later r, later da
//
// 64 x 64, 5 + (7, 11, 21): 24 + 24 KB, 64 threads, 4 blocks a processor of an H200, 3 on an A100;
// 128 x 128 in tiles of 128 x 64: 48 + 49 KB, 128 threads, 2 blocks.
template <typename T, bool TUNED, bool BACKWARD>
__global__ void __launch_bounds__(kThreads, 1) strips(Arguments args, Plan plan) {
  const ThreadPlace me(plan, args.planes);
  if (me.beyond) return;
  float* shared = static_cast<float*>(shared_memory()) + me.slot * plan.slot_floats;
  float* const a = shared + plan.a_at;
  float* const r = shared + plan.x_at;
  float* const x = shared + plan.x_at;

  const int height = BACKWARD ? args.w : args.h;
  const int width = BACKWARD ? args.h : args.w;
  const int k = args.square.size, reach = k / 2, reach4 = round4(reach);
  const Region out = me.region(plan, height, width);
  // Where the sum over the branches is needed.
  const Region core = {
      BACKWARD ? max(0, out.u0 - reach) : out.u0,
      BACKWARD ? min(height, out.u1 + reach) : out.u1,
      BACKWARD ? max(0, out.v0 - reach4) : out.v0,
      BACKWARD ? min(width, out.v1 + reach4) : out.v1,
  };
  const int segments = (core.v1 - core.v0 + kOutputs - 1) / kOutputs;
  const int a_left = round4(plan.row_reach);
  const Region a_region = {
      max(0, core.u0 - plan.col_reach),
      min(height, core.u1 + plan.col_reach),
      core.v0 - a_left,
      core.v0 + kOutputs * segments + round4(plan.row_reach + 1),
  };
  const int a_rows = a_region.u1 - a_region.u0;

  const long long plane_size = static_cast<long long>(args.h) * args.w;
  const T* in = static_cast<const T*>(BACKWARD ? args.dy : args.x) + me.plane * plane_size;
  T* result = static_cast<T*>(BACKWARD ? args.dx : args.y) + me.plane * plane_size;
  const long long channel = me.plane % args.c;

  if (me.active) {
    stage_weights<T>(shared, args, plan, channel, BACKWARD, BACKWARD, me);
    if (BACKWARD) {
      stage_transposed(a, plan.a_pitch, in, a_region, height, width, me);
    } else if (k == 0) {
      stage(a, plan.a_pitch, in, a_region, width, me);
    } else {
      fill_zero(a, a_rows * plan.a_pitch, me);
      const Region x_region = {max(0, a_region.u0 - reach), min(height, a_region.u1 + reach),
                               a_region.v0 - reach4, a_region.v1 + round4(reach + 1)};
      stage(x, plan.x_pitch, in, x_region, width, me);
    }
  }
  __syncthreads();

  if (!BACKWARD && k > 0) {
    if (me.active) {
      // Only columns of the image: the others are zero.
      const Region inside = {a_region.u0, a_region.u1, max(0, a_region.v0),
                             min(width, a_region.v1)};
      const int skipped = inside.v0 - a_region.v0, x_row = max(0, a_region.u0 - reach);
      const int x_rows = min(height, a_region.u1 + reach) - x_row;
      square_stage<TUNED>(a + skipped, plan.a_pitch, x + skipped, plan.x_pitch, x_row, x_rows,
                          inside, width, shared + plan.square_at, k,
                          bias_of<T>(args.square.bias, channel), me);
    }
    __syncthreads();
  }

  // This thread's outputs: 16 rows of 4 columns, kept in registers over all branches.
  const int groups = (core.v1 - core.v0 + 3) / 4;
  const int own_u = core.u0 + me.id / groups * kOutputs, own_v = core.v0 + me.id % groups * 4;
  const bool owner = me.active && own_u < core.u1;
  float sum[kOutputs][4] = {};
  if (owner) {
    float bias = 0.0f;
    for (int b = 0; b < args.branch_count && !BACKWARD; ++b) {
      bias += bias_of<T>(args.branches[b].col.bias, channel);
    }
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      if (own_u + o >= core.u1) continue;
      const Four<float> own =
          load4(a + (own_u + o - a_region.u0) * plan.a_pitch + a_left + own_v - core.v0);
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[o][c] = own.value[c] + bias;
    }
  }

  const auto branch = [&](auto size, int b) {
    const Convolution& row = args.branches[b].row;
    const Convolution& col = args.branches[b].col;
    if (me.active) {
      row_stage<decltype(size)::value>(r, plan.r_pitch, a + a_left, plan.a_pitch, a_rows, segments,
                                       shared + plan.row_at[b], row.size,
                                       BACKWARD ? 0.0f : bias_of<T>(row.bias, channel), me);
    }
    __syncthreads();
    if (owner) {
      along_u<decltype(size)::value>(sum, r + own_v - core.v0, plan.r_pitch,
                                     own_u - col.size / 2 - a_region.u0, a_rows,
                                     shared + plan.col_at[b], col.size);
    }
    __syncthreads();  // the next branch, or da, goes where r is
  };
  for_branches<TUNED>(args.branch_count, branch);

  if (!BACKWARD) {
    if (!owner) return;
    const bool vector = width % 4 == 0 && reinterpret_cast<size_t>(result) % (4 * sizeof(T)) == 0;
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      if (own_u + o >= core.u1) continue;
      T* to = result + static_cast<long long>(own_u + o) * width + own_v;
      Four<T> four;
#pragma unroll
      for (int c = 0; c < 4; ++c) narrow(four.value[c], sum[o][c]);
      if (vector) {
        *reinterpret_cast<Four<T>*>(to) = four;
      } else {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (own_v + c < core.v1) to[c] = four.value[c];
        }
      }
    }
    return;
  }

  // da goes to memory for the weight gradients, and through the mirrored square kernel.
  const int x_v0 = out.v0 - reach4;
  if (me.active && k > 0) fill_zero(x, (core.u1 - core.u0) * plan.x_pitch, me);
  __syncthreads();
  if (owner) {
    float* to = k > 0 ? x + (own_u - core.u0) * plan.x_pitch + own_v - x_v0
                      : a + (own_u - a_region.u0) * plan.a_pitch + a_left + own_v - core.v0;
    const int pitch = k > 0 ? plan.x_pitch : plan.a_pitch;
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (own_u + o < core.u1 && own_v + c < core.v1) to[o * pitch + c] = sum[o][c];
      }
    }
  }
  __syncthreads();
  const float* from = a + (out.u0 - a_region.u0) * plan.a_pitch + a_left + out.v0 - core.v0;
  if (k > 0) {
    if (me.active) {
      if (args.da != nullptr) {
        unstage_transposed(args.da + me.plane * plane_size,
                           x + (out.u0 - core.u0) * plan.x_pitch + reach4, plan.x_pitch, out,
                           height, me);
      }
      square_stage<TUNED>(a, plan.a_pitch, x, plan.x_pitch, core.u0, core.u1 - core.u0, out, width,
                          shared + plan.square_at, k, 0.0f, me);
    }
    from = a;
    __syncthreads();
  }
  if (me.active) unstage_transposed(result, from, plan.a_pitch, out, height, me);
}

}  // namespace famseg::strip_conv
