// Strip convolution in FP32 arithmetic, forward and backward, any sizes. Kernel text only: whoever
// includes it includes common/cuda.h (or its twins) first. tiling.h says what is where.
//
// The work is bound by FMAs: 5 + (7, 11, 21) costs 25 + 39 + 39 = 103 an element against 8 bytes of
// memory traffic; an H200 does 103 FMAs in 3.1 ps, moves 8 bytes in 1.7 ps. So everything but FMAs
// must be rare: a thread makes 16 outputs of a row convolution or 4 x 16 of a column or square one
// from registers, which reads 16 bytes of shared memory for some 25 FMAs.
//
// Cycles of a multiprocessor for 32 elements, where a 16-byte read of a warp takes 4:
//
//   stage           FMA    shared memory: reads, taps, writes
//   square          6.3    3.8 + 1.0
//   first, 3 sizes  9.8    6.0 + 0.8 + 3.0
//   second          9.8    5.3 + 0.6
//
// 25.8 against some 21 with what is staged: FMAs are the bound if both overlap, which is what
// several blocks a multiprocessor, or their warps between two barriers, are for.
//
// No bank conflicts: lanes of a warp walk along a row in steps of 16 bytes (square, second), or
// down the rows (first), whose pitch is an odd multiple of 16 bytes.
//
// The gradient of x has the same form with the stages in reverse order and the kernels mirrored:
// columns, rows, then the square. So its plane is staged transposed and one kernel serves both:
//
//   forward           z = square(x) + bias   y  = z + sum_i second_i(first_i(z))
//   gradient of x     z = dy                 da = z + sum_i second_i(first_i(z)),  dx = square(da)
//
// In (u, v): forward u is the row, v the column; in the gradient of x u is the column. `first` runs
// along v, which is contiguous in shared memory, `second` along u.
#pragma once

#include "strip_conv/cuda/tiling.h"

namespace famseg::strip_conv {

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

__device__ inline Four<float> load4(const float* from) {
  return *reinterpret_cast<const Four<float>*>(from);
}

__device__ inline void store4(float* to, const float* from) {
  *reinterpret_cast<Four<float>*>(to) = {{from[0], from[1], from[2], from[3]}};
}

__device__ inline int at_least(int a, int b) {
  return a > b ? a : b;
}

__device__ inline int at_most(int a, int b) {
  return a < b ? a : b;
}

// The steps of one of `threads` threads over (slow, fast), fast < `width`, without a division each.
struct Walk {
  int slow, fast, width, slow_step, fast_step;

  __device__ Walk(int id, int threads, int width)
      : slow(id / width),
        fast(id % width),
        width(width),
        slow_step(threads / width),
        fast_step(threads % width) {}

  __device__ void next() {
    slow += slow_step;
    fast += fast_step;
    if (fast >= width) {
      fast -= width;
      ++slow;
    }
  }
};

struct Region {
  int u0, u1, v0, v1;
};

// A thread's place in its block: which plane, which of the plane's threads, and which tile.
struct Place {
  long long plane;
  int tile, slot, id, threads;
  bool active, beyond;  // beyond: no block of this tile at all

  __device__ Place(const Plan& plan, long long planes) : threads(plan.threads) {
    const long long block = static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x;
    const int tiles = plan.tiles_u * plan.tiles_v;
    slot = static_cast<int>(threadIdx.x) / threads;
    id = static_cast<int>(threadIdx.x) % threads;
    tile = static_cast<int>(block % tiles);
    plane = block / tiles * plan.planes + slot;
    active = slot < plan.planes && plane < planes;
    beyond = block / tiles * plan.planes >= planes;
  }

  __device__ Region region(const Plan& plan, int height, int width) const {
    const int u = tile / plan.tiles_v * plan.tile_u, v = tile % plan.tiles_v * plan.tile_v;
    return {u, at_most(height, u + plan.tile_u), v, at_most(width, v + plan.tile_v)};
  }
};

// Fills to[(u - u0) * pitch + v - v0] from a plane (height, width), zero where v is outside it; u
// must be inside, v0 and v1 - v0 be multiples of 4.
template <typename S>
__device__ void stage(float* to, int pitch, const S* plane, Region r, int width, const Place& me) {
  const bool vector = width % 4 == 0 && reinterpret_cast<size_t>(plane) % (4 * sizeof(S)) == 0;
  for (Walk at(me.id, me.threads, (r.v1 - r.v0) / 4); at.slow < r.u1 - r.u0; at.next()) {
    const int v = r.v0 + 4 * at.fast;
    const S* from = plane + static_cast<long long>(r.u0 + at.slow) * width + v;
    float value[4] = {};
    if (vector && v >= 0 && v < width) {
      const Four<S> four = *reinterpret_cast<const Four<S>*>(from);
#pragma unroll
      for (int i = 0; i < 4; ++i) value[i] = widen(four.value[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (v + i >= 0 && v + i < width) value[i] = widen(from[i]);
      }
    }
    store4(to + at.slow * pitch + 4 * at.fast, value);
  }
}

// The same from a plane (width, height). Lanes walk along a row of the plane, so that its memory is
// read in whole lines; the price is a four-way bank conflict, once for each element.
template <typename S>
__device__ void stage_transposed(float* to, int pitch, const S* plane, Region r, int height,
                                 int width, const Place& me) {
  for (Walk at(me.id, me.threads, r.u1 - r.u0); at.slow < r.v1 - r.v0; at.next()) {
    const int u = r.u0 + at.fast, v = r.v0 + at.slow;
    const bool inside = v >= 0 && v < width;
    to[at.fast * pitch + at.slow] =
        inside ? widen(plane[static_cast<long long>(v) * height + u]) : 0.0f;
  }
}

template <typename S>
__device__ void unstage_transposed(S* plane, const float* from, int pitch, Region r, int height,
                                   const Place& me) {
  for (Walk at(me.id, me.threads, r.u1 - r.u0); at.slow < r.v1 - r.v0; at.next()) {
    narrow(plane[static_cast<long long>(r.v0 + at.slow) * height + r.u0 + at.fast],
           from[at.fast * pitch + at.slow]);
  }
}

__device__ inline void fill_zero(float* to, int floats, const Place& me) {
  const float zero[4] = {};
  for (int i = 4 * me.id; i < floats; i += 4 * me.threads) store4(to + i, zero);
}

// Taps as float, zeros before and after them. `mirrored` turns a kernel into its adjoint.
template <typename T>
__device__ void stage_taps(float* to, int length, int before, const T* from, int size,
                           bool mirrored, const Place& me) {
  for (int i = me.id; i < length; i += me.threads) {
    const int tap = i - before;
    const bool inside = tap >= 0 && tap < size;
    to[i] = inside ? widen(from[mirrored ? size - 1 - tap : tap]) : 0.0f;
  }
}

template <typename T>
__device__ void stage_weights(float* to, const Arguments& args, const Plan& plan, long long channel,
                              bool mirrored, bool second_mirrored, const Place& me) {
  const int k = args.square.size;
  const T* square = static_cast<const T*>(args.square.weight) + channel * k * k;
  for (int i = me.id; i < k * padded(k); i += me.threads) {
    const int slow = i / padded(k), fast = i % padded(k) - lead(k);
    const bool inside = fast >= 0 && fast < k;
    // The gradient of x is made transposed.
    const int tap = mirrored ? (k - 1 - fast) * k + k - 1 - slow : slow * k + fast;
    to[plan.square_at + i] = inside ? widen(square[tap]) : 0.0f;
  }
  for (int b = 0; b < args.branch_count; ++b) {
    const Branch& branch = args.branches[b];
    const T* first = static_cast<const T*>(branch.first.weight) + channel * branch.first.size;
    const T* second = static_cast<const T*>(branch.second.weight) + channel * branch.second.size;
    stage_taps(to + plan.first_at[b], padded(branch.first.size), lead(branch.first.size), first,
               branch.first.size, mirrored, me);
    stage_taps(to + plan.second_at[b], surrounded(branch.second.size), kOutputs, second,
               branch.second.size, second_mirrored, me);
  }
}

template <typename T>
__device__ float bias_of(const void* bias, long long channel) {
  return bias == nullptr ? 0.0f : widen(static_cast<const T*>(bias)[channel]);
}

// In what follows K is the kernel size where it is known to the compiler, which then unrolls all,
// or 0. Padding taps are left out, not multiplied by: 0 times a NaN or an infinity is NaN.

// 16 neighbouring outputs along v. `in` points to the first input of the first output's window,
// rounded down to 16 bytes.
template <int K>
__device__ void along_v(float (&sum)[kOutputs], const float* in, const float* taps, int size) {
  float window[kOutputs + 4];
#pragma unroll
  for (int i = 0; i < kOutputs; i += 4) {
    const Four<float> four = load4(in + i);
#pragma unroll
    for (int t = 0; t < 4; ++t) window[i + t] = four.value[t];
  }
  const int k = K > 0 ? K : size, chunks = padded(k) / 4;
#pragma unroll(K > 0 ? 16 : 1)
  for (int q = 0; q < chunks; ++q) {
    const Four<float> tap = load4(taps + 4 * q), next = load4(in + kOutputs + 4 * q);
#pragma unroll
    for (int t = 0; t < 4; ++t) window[kOutputs + t] = next.value[t];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      if (4 * q + t < lead(k) || 4 * q + t >= lead(k) + k) continue;
#pragma unroll
      for (int r = 0; r < kOutputs; ++r) sum[r] += tap.value[t] * window[r + t];
    }
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) window[i] = window[i + 4];
  }
}

// 16 x 4 outputs along u. `in` points to row 0 of `rows`, at the outputs' columns; `first_row` is
// the first input row of the first output, rows outside count as zero.
template <int K>
__device__ void along_u(float (&sum)[kOutputs][4], const float* in, int pitch, int first_row,
                        int rows, const float* taps, int size) {
  const int k = K > 0 ? K : size, inputs = kOutputs + k - 1;
#pragma unroll(K > 0 ? 128 : 1)
  for (int j = 0; j < inputs; ++j) {
    Four<float> value = {};
    if (first_row + j >= 0 && first_row + j < rows) value = load4(in + (first_row + j) * pitch);
#pragma unroll
    for (int r = 0; r < kOutputs; ++r) {
      if (j < r || j >= r + k) continue;
      const float tap = taps[kOutputs + j - r];
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[r][c] += tap * value.value[c];
    }
  }
}

// 16 x 4 outputs of the square convolution; `in` as for along_v, rows as for along_u.
template <int K>
__device__ void in_both(float (&sum)[kOutputs][4], const float* in, int pitch, int first_row,
                        int rows, const float* taps, int size) {
  const int k = K > 0 ? K : size, chunks = padded(k) / 4;
#pragma unroll(K > 0 ? 128 : 1)
  for (int j = 0; j < kOutputs + k - 1; ++j) {
    const bool inside = first_row + j >= 0 && first_row + j < rows;
    const float* row = in + (first_row + j) * pitch;
#pragma unroll(K > 0 ? 16 : 1)
    for (int q = 0; q < chunks; ++q) {
      Four<float> left = {}, right = {};
      if (inside) {
        left = load4(row + 4 * q);
        right = load4(row + 4 * q + 4);
      }
      const float window[8] = {left.value[0],  left.value[1],  left.value[2],  left.value[3],
                               right.value[0], right.value[1], right.value[2], right.value[3]};
#pragma unroll
      for (int r = 0; r < kOutputs; ++r) {
        if (j < r || j >= r + k) continue;
        const Four<float> tap = load4(taps + (j - r) * padded(k) + 4 * q);
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          if (4 * q + t < lead(k) || 4 * q + t >= lead(k) + k) continue;
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[r][c] += tap.value[t] * window[t + c];
        }
      }
    }
  }
}

// The square convolution of region `r` of a plane of `width`: z = square(x) + bias, where x's row 0
// is image row `x_row` of `x_rows` and its column 0 is 4-aligned(reach) left of r.v0.
template <bool TUNED>
__device__ void square_stage(float* z, int z_pitch, const float* x, int x_pitch, int x_row,
                             int x_rows, Region r, int width, const float* taps, int size,
                             float bias, const Place& me) {
  for (Walk at(me.id, me.threads, (r.v1 - r.v0 + 3) / 4); kOutputs * at.slow < r.u1 - r.u0;
       at.next()) {
    const int u = r.u0 + kOutputs * at.slow;
    float sum[kOutputs][4];
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[o][c] = bias;
    }
    in_both<TUNED ? kSquare : 0>(sum, x + 4 * at.fast, x_pitch, u - size / 2 - x_row, x_rows, taps,
                                 size);
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      if (u + o >= r.u1) continue;
#pragma unroll
      for (int c = 0; c < 4; ++c) {  // what follows reads zeros outside the image
        if (r.v0 + 4 * at.fast + c >= width) sum[o][c] = 0.0f;
      }
      store4(z + (kOutputs * at.slow + o) * z_pitch + 4 * at.fast, sum[o]);
    }
  }
}

// t = first(z) + bias for all `rows` rows and segments of 16 columns. Lanes walk down the rows.
template <int K>
__device__ void first_stage(float* t, int t_pitch, const float* z, int z_pitch, int rows,
                            int segments, const float* taps, int size, float bias,
                            const Place& me) {
  for (Walk at(me.id, me.threads, rows); at.slow < segments; at.next()) {
    float sum[kOutputs];
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) sum[o] = bias;
    along_v<K>(sum, z + at.fast * z_pitch + kOutputs * at.slow - round4((K > 0 ? K : size) / 2),
               taps, size);
    float* to = t + at.fast * t_pitch + kOutputs * at.slow;
#pragma unroll
    for (int o = 0; o < kOutputs; o += 4) store4(to + o, sum + o);
  }
}

// One block makes one tile of one plane, or of plan.planes small ones. Shared memory, each slot:
//
//   weights | z: rows of the tile and of the second kernels' reach | x, later t, later da
//
// 64 x 64, 5 + (7, 11, 21): 24 + 24 KB, 64 threads, 4 blocks a processor of an H200, 3 on an A100;
// 128 x 128 in tiles of 128 x 64: 48 + 49 KB, 128 threads, 2 blocks.
template <typename T, bool TUNED, bool BACKWARD>
__global__ void __launch_bounds__(kThreads, 1) strips(Arguments args, Plan plan) {
  const Place me(plan, args.planes);
  if (me.beyond) return;
  float* shared = static_cast<float*>(shared_memory()) + me.slot * plan.slot_floats;
  float* const z = shared + plan.z_at;
  float* const t = shared + plan.x_at;
  float* const x = shared + plan.x_at;

  const int height = BACKWARD ? args.columns : args.rows;
  const int width = BACKWARD ? args.rows : args.columns;
  const int k = args.square.size, reach = k / 2, reach4 = round4(reach);
  const Region out = me.region(plan, height, width);
  // Where the sum over the branches is needed.
  const Region core = {
      BACKWARD ? at_least(0, out.u0 - reach) : out.u0,
      BACKWARD ? at_most(height, out.u1 + reach) : out.u1,
      BACKWARD ? at_least(0, out.v0 - reach4) : out.v0,
      BACKWARD ? at_most(width, out.v1 + reach4) : out.v1,
  };
  const int segments = (core.v1 - core.v0 + kOutputs - 1) / kOutputs;
  const int z_left = round4(plan.first_reach);
  const Region z_region = {
      at_least(0, core.u0 - plan.second_reach),
      at_most(height, core.u1 + plan.second_reach),
      core.v0 - z_left,
      core.v0 + kOutputs * segments + round4(plan.first_reach + 1),
  };
  const int z_rows = z_region.u1 - z_region.u0;

  const long long plane_size = static_cast<long long>(args.rows) * args.columns;
  const T* in = static_cast<const T*>(args.in) + me.plane * plane_size;
  T* result = static_cast<T*>(args.out) + me.plane * plane_size;
  const long long channel = me.plane % args.channels;

  if (me.active) {
    stage_weights<T>(shared, args, plan, channel, BACKWARD, BACKWARD, me);
    if (BACKWARD) {
      stage_transposed(z, plan.z_pitch, in, z_region, height, width, me);
    } else if (k == 0) {
      stage(z, plan.z_pitch, in, z_region, width, me);
    } else {
      fill_zero(z, z_rows * plan.z_pitch, me);
      const Region x_region = {at_least(0, z_region.u0 - reach),
                               at_most(height, z_region.u1 + reach), z_region.v0 - reach4,
                               z_region.v1 + round4(reach + 1)};
      stage(x, plan.x_pitch, in, x_region, width, me);
    }
  }
  __syncthreads();

  if (!BACKWARD && k > 0) {
    if (me.active) {
      // Only columns of the image: the others are zero.
      const Region inside = {z_region.u0, z_region.u1, at_least(0, z_region.v0),
                             at_most(width, z_region.v1)};
      const int skipped = inside.v0 - z_region.v0, x_row = at_least(0, z_region.u0 - reach);
      const int x_rows = at_most(height, z_region.u1 + reach) - x_row;
      square_stage<TUNED>(z + skipped, plan.z_pitch, x + skipped, plan.x_pitch, x_row, x_rows,
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
      bias += bias_of<T>(args.branches[b].second.bias, channel);
    }
#pragma unroll
    for (int r = 0; r < kOutputs; ++r) {
      if (own_u + r >= core.u1) continue;
      const Four<float> own =
          load4(z + (own_u + r - z_region.u0) * plan.z_pitch + z_left + own_v - core.v0);
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[r][c] = own.value[c] + bias;
    }
  }

  const auto branch = [&](auto first_size, auto second_size, int b) {
    const Taps& first = args.branches[b].first;
    const Taps& second = args.branches[b].second;
    if (me.active) {
      first_stage<decltype(first_size)::value>(
          t, plan.t_pitch, z + z_left, plan.z_pitch, z_rows, segments, shared + plan.first_at[b],
          first.size, BACKWARD ? 0.0f : bias_of<T>(first.bias, channel), me);
    }
    __syncthreads();
    if (owner) {
      along_u<decltype(second_size)::value>(sum, t + own_v - core.v0, plan.t_pitch,
                                            own_u - second.size / 2 - z_region.u0, z_rows,
                                            shared + plan.second_at[b], second.size);
    }
    __syncthreads();  // the next branch, or da, goes where t is
  };
  if constexpr (TUNED) {
    branch(Constant<kStrips[0]>(), Constant<kStrips[0]>(), 0);
    branch(Constant<kStrips[1]>(), Constant<kStrips[1]>(), 1);
    branch(Constant<kStrips[2]>(), Constant<kStrips[2]>(), 2);
  } else {
    for (int b = 0; b < args.branch_count; ++b) branch(Constant<0>(), Constant<0>(), b);
  }

  if (!BACKWARD) {
    if (!owner) return;
    const bool vector = width % 4 == 0 && reinterpret_cast<size_t>(result) % (4 * sizeof(T)) == 0;
#pragma unroll
    for (int r = 0; r < kOutputs; ++r) {
      if (own_u + r >= core.u1) continue;
      T* to = result + static_cast<long long>(own_u + r) * width + own_v;
      Four<T> four;
#pragma unroll
      for (int c = 0; c < 4; ++c) narrow(four.value[c], sum[r][c]);
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
                      : z + (own_u - z_region.u0) * plan.z_pitch + z_left + own_v - core.v0;
    const int pitch = k > 0 ? plan.x_pitch : plan.z_pitch;
#pragma unroll
    for (int r = 0; r < kOutputs; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (own_u + r < core.u1 && own_v + c < core.v1) to[r * pitch + c] = sum[r][c];
      }
    }
  }
  __syncthreads();
  const float* from = z + (out.u0 - z_region.u0) * plan.z_pitch + z_left + out.v0 - core.v0;
  if (k > 0) {
    if (me.active) {
      if (args.middle != nullptr) {
        unstage_transposed(args.middle + me.plane * plane_size,
                           x + (out.u0 - core.u0) * plan.x_pitch + reach4, plan.x_pitch, out,
                           height, me);
      }
      square_stage<TUNED>(z, plan.z_pitch, x, plan.x_pitch, core.u0, core.u1 - core.u0, out, width,
                          shared + plan.square_at, k, 0.0f, me);
    }
    from = z;
    __syncthreads();
  }
  if (me.active) unstage_transposed(result, from, plan.z_pitch, out, height, me);
}

// --- gradients of weights and biases
// ---------------------------------------------------------------
//
// Correlations with as many FMAs as the convolutions, the roles exchanged: the taps are the sums in
// registers, a thread's outputs' gradients the factors. Each thread sums over what it owns, then
// the warp by shuffles, the warps in order: `partial` (n, tile, c, taps). A second kernel adds up
// n and tiles in order. No atomics, the same bits in every run.

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
//   weights | scratch | a, as z above | dy (before: da) on the tile's columns | x, later t
//
// t is first row(a), then the gradient that comes through the column kernel. FMAs an element: 25
// and 39 to recompute a and the row results, 39 for the gradient through the columns, 103 for the
// correlations. 128 x 128 in tiles of 128 x 64: 144 KB, 128 threads, one block a processor.
template <typename T, bool TUNED>
__global__ void __launch_bounds__(kThreads, 1)
    weight_gradients(Arguments args, Plan plan, float* __restrict__ partial) {
  const Place me(plan, args.planes);
  if (me.beyond) return;
  float* const shared = static_cast<float*>(shared_memory());
  float* const scratch = shared + plan.scratch_at;
  float* const a = shared + plan.z_at;
  float* const dy = shared + plan.d_at;
  float* const x = shared + plan.x_at;
  float* const t = shared + plan.x_at;

  const int height = args.rows, width = args.columns;
  const int k = args.square.size, reach = k / 2, reach4 = round4(reach);
  const Region out = me.region(plan, height, width);
  const int own_rows = out.u1 - out.u0;
  const int segments = (out.v1 - out.v0 + kOutputs - 1) / kOutputs;
  const int groups = (out.v1 - out.v0 + 3) / 4, left = round4(plan.first_reach);
  const int row0 = at_least(0, out.u0 - plan.second_reach);
  const int rows = at_most(height, out.u1 + plan.second_reach) - row0;
  const Region a_region = {row0, row0 + rows, out.v0 - left,
                           out.v0 + kOutputs * segments + round4(plan.first_reach + 1)};
  const long long plane_size = static_cast<long long>(height) * width;
  const T* x_plane = static_cast<const T*>(args.in) + me.plane * plane_size;
  const T* dy_plane = static_cast<const T*>(args.out) + me.plane * plane_size;
  const long long channel = me.plane % args.channels;
  float* to = partial +
              ((me.plane / args.channels * plan.tiles_u * plan.tiles_v + me.tile) * args.channels +
               channel) *
                  plan.partials;

  // The column kernels carry dy back: mirrored.
  stage_weights<T>(shared, args, plan, channel, false, true, me);

  // The gradient of what a correlation correlates, zero beyond the tile's columns: their sums must
  // not see the neighbour's.
  const auto own_columns = [&](float* buffer, const auto* plane, int u0, int u1) {
    for (Walk at(me.id, me.threads, kOutputs * segments); at.slow < u1 - u0; at.next()) {
      const int v = out.v0 + at.fast;
      buffer[at.slow * plan.t_pitch + at.fast] =
          v < out.v1 ? widen(plane[static_cast<long long>(u0 + at.slow) * width + v]) : 0.0f;
    }
  };
  const auto sum_over = [&](const float* buffer, int first_row, float* where) {
    float sum[1] = {};
    for (Walk at(me.id, me.threads, 4 * segments); at.slow < own_rows; at.next()) {
      const Four<float> four = load4(buffer + (first_row + at.slow) * plan.t_pitch + 4 * at.fast);
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
    const Region x_region = {at_least(0, row0 - reach), at_most(height, row0 + rows + reach),
                             a_region.v0 - reach4, a_region.v1 + round4(reach + 1)};
    const int x_rows = x_region.u1 - x_region.u0;
    stage(x, plan.x_pitch, x_plane, x_region, width, me);
    own_columns(dy, args.middle + me.plane * plane_size, out.u0, out.u1);
    fill_zero(a, rows * plan.z_pitch, me);
    __syncthreads();

    const int first = out.u0 - reach - x_region.u0;
    if constexpr (TUNED) {
      float sum[kSquare * kSquare] = {};
      patches([&](int u, int v) {
        float own[kOutputs][4];
        load_own(own, dy + u * plan.t_pitch + v, plan.t_pitch, own_rows - u);
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
            correlate_along_v<0>(sum, dy + at.fast * plan.t_pitch + kOutputs * at.slow,
                                 x + row * plan.x_pitch + left + kOutputs * at.slow + base);
          }
          const int from = at_least(0, lead(k) - base), until = at_most(kChunk, lead(k) + k - base);
          reduce(sum, scratch, to + ky * k + base + from - lead(k), from, until);
        }
      }
    }
    sum_over(dy, 0, to + k * k);

    const Region inside = {a_region.u0, a_region.u1, at_least(0, a_region.v0),
                           at_most(width, a_region.v1)};
    const int skipped = inside.v0 - a_region.v0;
    square_stage<TUNED>(a + skipped, plan.z_pitch, x + skipped, plan.x_pitch, x_region.u0, x_rows,
                        inside, width, shared + plan.square_at, k,
                        bias_of<T>(args.square.bias, channel), me);
  } else {
    stage(a, plan.z_pitch, x_plane, a_region, width, me);
  }
  own_columns(dy, dy_plane, row0, row0 + rows);
  __syncthreads();
  to += plan.branch_partials;
  sum_over(dy, out.u0 - row0, to++);  // the gradient of each column bias

  const auto branch = [&](auto row_size, auto column_size, int b) {
    constexpr int K = decltype(row_size)::value, L = decltype(column_size)::value;
    const Taps& first = args.branches[b].first;
    const Taps& second = args.branches[b].second;
    const int own_row = out.u0 - row0;
    first_stage<K>(t, plan.t_pitch, a + left, plan.z_pitch, rows, segments,
                   shared + plan.first_at[b], first.size, bias_of<T>(first.bias, channel), me);
    __syncthreads();
    constexpr int kColumnTaps = L > 0 ? L : kChunk;
    for (int base = 0; base < second.size; base += kColumnTaps) {
      float sum[kColumnTaps] = {};
      patches([&](int u, int v) {
        float own[kOutputs][4];
        load_own(own, dy + (own_row + u) * plan.t_pitch + v, plan.t_pitch, own_rows - u);
        correlate_along_u(sum, own, t + v, plan.t_pitch, own_row + u - second.size / 2 + base,
                          rows);
      });
      reduce(sum, scratch, to + base, 0, at_most(kColumnTaps, second.size - base));
    }
    to += second.size;

    patches([&](int u, int v) {
      float sum[kOutputs][4] = {};
      along_u<L>(sum, dy + v, plan.t_pitch, own_row + u - second.size / 2, rows,
                 shared + plan.second_at[b], second.size);
#pragma unroll
      for (int r = 0; r < kOutputs; ++r) {
        if (u + r < own_rows) store4(t + (u + r) * plan.t_pitch + v, sum[r]);
      }
    });
    // The last segment may be wider than the groups that were written.
    for (Walk at(me.id, me.threads, kOutputs); at.slow < own_rows; at.next()) {
      const int v = 4 * groups + at.fast;
      if (v < kOutputs * segments) t[at.slow * plan.t_pitch + v] = 0.0f;
    }
    __syncthreads();

    constexpr int kRowTaps = K > 0 ? padded(K) : kChunk;
    const int size = first.size;
    for (int base = 0; base < padded(size); base += kRowTaps) {
      float sum[kRowTaps] = {};
      for (Walk at(me.id, me.threads, own_rows); at.slow < segments; at.next()) {
        correlate_along_v<K>(sum, t + at.fast * plan.t_pitch + kOutputs * at.slow,
                             a + (own_row + at.fast) * plan.z_pitch + left + kOutputs * at.slow -
                                 round4(size / 2) + base);
      }
      const int from = at_least(0, lead(size) - base);
      const int until = at_most(kRowTaps, lead(size) + size - base);
      reduce(sum, scratch, to + base + from - lead(size), from, until);
    }
    sum_over(t, 0, to + size);
    to += size + 1;
  };
  if constexpr (TUNED) {
    branch(Constant<kStrips[0]>(), Constant<kStrips[0]>(), 0);
    branch(Constant<kStrips[1]>(), Constant<kStrips[1]>(), 1);
    branch(Constant<kStrips[2]>(), Constant<kStrips[2]>(), 2);
  } else {
    for (int b = 0; b < args.branch_count; ++b) branch(Constant<0>(), Constant<0>(), b);
  }
}

// Adds up the partials (count, channels, plan.partials) over count, in order and in double, and
// writes them to the gradients that are wanted.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    sum_partials(const float* __restrict__ partial, long long count, int channels, int partials,
                 Outputs outputs) {
  const long long total = static_cast<long long>(channels) * partials;
  const long long step = static_cast<long long>(gridDim.x) * blockDim.x;
  for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += step) {
    const long long channel = i / partials;
    const int place = static_cast<int>(i % partials);
    double sum = 0.0;
    for (long long n = 0; n < count; ++n) sum += partial[n * total + i];
    for (int o = 0; o < outputs.count; ++o) {
      const Output& output = outputs.output[o];
      if (output.to == nullptr || place < output.first || place >= output.first + output.size) {
        continue;  // one sum may go to several: all column biases have the same gradient
      }
      narrow(static_cast<T*>(output.to)[channel * output.size + place - output.first],
             static_cast<float>(sum));
    }
  }
}

}  // namespace famseg::strip_conv
