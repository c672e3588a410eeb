// Strip convolution in FP32 arithmetic, any sizes: tiles in shared memory, and the convolutions that
// a block's threads make of them. fma_strips.cuh and fma_weight_gradients.cuh are made of these.
// Kernel text only: whoever includes it includes common/cuda.h (or its twins) first. tiling.h says
// what is where.
//
// The work is bound by FMAs: 5 + (7, 11, 21) costs 25 + 39 + 39 = 103 an element against 8 bytes of
// memory traffic; an H200 does 103 FMAs in 3.1 ps, moves 8 bytes in 1.7 ps. So everything but FMAs
// must be rare: a thread makes 16 outputs of a row convolution or 4 x 16 of a column or square one
// from registers, which reads 16 bytes of shared memory for some 25 FMAs.
//
// Cycles of a multiprocessor for 32 elements, where a 16-byte read of a warp takes 4:
//
//   stage            FMA    shared memory: reads, taps, writes
//   square           6.3    3.8 + 1.0
//   row_i, 3 sizes   9.8    6.0 + 0.8 + 3.0
//   col_i            9.8    5.3 + 0.6
//
// 25.8 against some 21 with what is staged: FMAs are the bound if both overlap, which is what
// several blocks a multiprocessor, or their warps between two barriers, are for.
//
// No bank conflicts: lanes of a warp walk along a row in steps of 16 bytes (square, col_i), or down
// the rows (row_i), whose pitch is an odd multiple of 16 bytes.
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
struct ThreadPlace {
  long long plane;
  int tile, slot, id, threads;
  bool active, beyond;  // beyond: no block of this tile at all

  __device__ ThreadPlace(const Plan& plan, long long planes) : threads(plan.threads) {
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
    return {u, min(height, u + plan.tile_u), v, min(width, v + plan.tile_v)};
  }
};

// Fills to[(u - u0) * pitch + v - v0] from a plane (height, width), zero where v is outside it; u
// must be inside, v0 and v1 - v0 be multiples of 4.
template <typename S>
__device__ void stage(float* to, int pitch, const S* plane, Region r, int width,
                      const ThreadPlace& me) {
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
                                 int width, const ThreadPlace& me) {
  for (Walk at(me.id, me.threads, r.u1 - r.u0); at.slow < r.v1 - r.v0; at.next()) {
    const int u = r.u0 + at.fast, v = r.v0 + at.slow;
    const bool inside = v >= 0 && v < width;
    to[at.fast * pitch + at.slow] =
        inside ? widen(plane[static_cast<long long>(v) * height + u]) : 0.0f;
  }
}

template <typename S>
__device__ void unstage_transposed(S* plane, const float* from, int pitch, Region r, int height,
                                   const ThreadPlace& me) {
  for (Walk at(me.id, me.threads, r.u1 - r.u0); at.slow < r.v1 - r.v0; at.next()) {
    narrow(plane[static_cast<long long>(r.v0 + at.slow) * height + r.u0 + at.fast],
           from[at.fast * pitch + at.slow]);
  }
}

__device__ inline void fill_zero(float* to, int floats, const ThreadPlace& me) {
  const float zero[4] = {};
  for (int i = 4 * me.id; i < floats; i += 4 * me.threads) store4(to + i, zero);
}

// Taps as float, zeros before and after them. `mirrored` turns a kernel into its adjoint.
template <typename T>
__device__ void stage_taps(float* to, int length, int before, const T* from, int size,
                           bool mirrored, const ThreadPlace& me) {
  for (int i = me.id; i < length; i += me.threads) {
    const int tap = i - before;
    const bool inside = tap >= 0 && tap < size;
    to[i] = inside ? widen(from[mirrored ? size - 1 - tap : tap]) : 0.0f;
  }
}

template <typename T>
__device__ void stage_weights(float* to, const Arguments& args, const Plan& plan, long long channel,
                              bool mirrored, bool col_mirrored, const ThreadPlace& me) {
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
    const T* row = static_cast<const T*>(branch.row.weight) + channel * branch.row.size;
    const T* col = static_cast<const T*>(branch.col.weight) + channel * branch.col.size;
    stage_taps(to + plan.row_at[b], padded(branch.row.size), lead(branch.row.size), row,
               branch.row.size, mirrored, me);
    stage_taps(to + plan.col_at[b], surrounded(branch.col.size), kOutputs, col, branch.col.size,
               col_mirrored, me);
  }
}

template <typename T>
__device__ float bias_of(const void* bias, long long channel) {
  return bias == nullptr ? 0.0f : widen(static_cast<const T*>(bias)[channel]);
}

// Calls branch(size, b) for each branch, with its sizes as a Constant: 0 where they are not known to
// the compiler.
template <bool TUNED, typename Body>
__device__ void for_branches(int count, const Body& branch) {
  if constexpr (TUNED) {
    branch(Constant<kStrips[0]>(), 0);
    branch(Constant<kStrips[1]>(), 1);
    branch(Constant<kStrips[2]>(), 2);
  } else {
    for (int b = 0; b < count; ++b) branch(Constant<0>(), b);
  }
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

// The square convolution of a region of a plane of `width`: a = square(x) + bias, where x's row 0 is
// image row `x_row` of `x_rows` and its column 0 is 4-aligned(reach) left of region.v0.
template <bool TUNED>
__device__ void square_stage(float* a, int a_pitch, const float* x, int x_pitch, int x_row,
                             int x_rows, Region region, int width, const float* taps, int size,
                             float bias, const ThreadPlace& me) {
  for (Walk at(me.id, me.threads, (region.v1 - region.v0 + 3) / 4);
       kOutputs * at.slow < region.u1 - region.u0; at.next()) {
    const int u = region.u0 + kOutputs * at.slow;
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
      if (u + o >= region.u1) continue;
#pragma unroll
      for (int c = 0; c < 4; ++c) {  // what follows reads zeros outside the image
        if (region.v0 + 4 * at.fast + c >= width) sum[o][c] = 0.0f;
      }
      store4(a + (kOutputs * at.slow + o) * a_pitch + 4 * at.fast, sum[o]);
    }
  }
}

// r = row(a) + bias for all `rows` rows and segments of 16 columns. Lanes walk down the rows.
template <int K>
__device__ void row_stage(float* r, int r_pitch, const float* a, int a_pitch, int rows,
                          int segments, const float* taps, int size, float bias,
                          const ThreadPlace& me) {
  for (Walk at(me.id, me.threads, rows); at.slow < segments; at.next()) {
    float sum[kOutputs];
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) sum[o] = bias;
    along_v<K>(sum, a + at.fast * a_pitch + kOutputs * at.slow - round4((K > 0 ? K : size) / 2),
               taps, size);
    float* to = r + at.fast * r_pitch + kOutputs * at.slow;
#pragma unroll
    for (int o = 0; o < kOutputs; o += 4) store4(to + o, sum + o);
  }
}

}  // namespace famseg::strip_conv
