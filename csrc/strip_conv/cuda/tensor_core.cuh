// Strip convolution 5 + (7, 11, 21) of 16-bit numbers on tensor cores, forward and gradient of x.
// Kernel text only, like fma.cuh, where u, v, z, t and the gradient's form are explained.
// docs/design/toeplitz.md has the figure.
//
// A convolution along a line is a product with a banded Toeplitz matrix: eight neighbouring outputs
// are 16 or 32 inputs times a 16 x 8 or 32 x 8 matrix that holds the kernel, shifted down by one
// from column to column. The matrix is the same everywhere along the line: a channel has 15 of
// them, 4 KB in shared memory, built once and used for several images; a stage keeps its five in
// registers.
//
//   stage    inputs of 8 outputs from      m16n8k16 for 16 x 8    multiply-adds an element
//   square   -4, for each of 5 rows        5                      80
//   first    21, 11: -12; 7: -4            2 + 2 + 1              80
//   second   the same                      2 + 2 + 1              80
//
// 240 against 103 on FMA units that are 15 times slower: 0.5 ps an element at an H200's full rate,
// where FMAs need 3.1 and memory 0.8. Shared memory needs more: inputs are read once for each of
// the five rows (10 bytes an element), once along v (2), once for each branch along u (6); with
// what is staged and written some 32 bytes, 1.0 ps. That is the bound.
//
// Neighbouring outputs share inputs: eight new columns (or rows) come with every eight outputs, the
// others stay in registers. The second stage runs along u with t transposed on its way into
// registers (ldmatrix.trans), so that it has the same form, and the same matrices, as the first.
// The gradient of x starts along image rows' other side: there the first stage reads transposed.
//
// Rows of shared memory are odd multiples of 16 bytes: ldmatrix and the stores of results hit all
// banks once. a and t are rounded to 16 bits on the way, sums are FP32. A product with a zero of
// the band is not skipped, and 0 times a NaN or an infinity is NaN: a tile that holds one is staged
// again without it, and it is put in its places at the end.
#pragma once

#include <type_traits>

#include "strip_conv/cuda/fma.cuh"

namespace famseg::strip_conv {

// A thread's part of a 16 x 8 matrix: element (k, n) is the tap that takes the input at
// `start` + k to the output at n.
template <typename T>
__device__ void toeplitz(unsigned* part, const T* taps, int size, int start, bool mirrored) {
  const int lane = static_cast<int>(threadIdx.x) % 32, n = lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float pair[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int tap = start + 8 * half + 2 * (lane % 4) + i - n + size / 2;
      const bool inside = tap >= 0 && tap < size;
      pair[i] = inside ? widen(taps[mirrored ? size - 1 - tap : tap]) : 0.0f;
    }
    part[half] = pack<T>(pair[0], pair[1]);
  }
}

// A channel's matrices in shared memory, each as its 32 lanes' parts: five of the square's rows,
// then for the first and the second stage one of 7 and two each of 11 and 21.
template <typename T>
__device__ void build_matrices(unsigned* matrices, const Arguments& args, int channel,
                               bool mirrored) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
  for (int f = warp; f < kMatrices; f += warps) {
    unsigned* part = matrices + (f * 32 + lane) * 2;
    if (f < kSquare) {
      const T* taps = static_cast<const T*>(args.square.weight) +
                      static_cast<long long>(channel) * kSquare * kSquare;
      toeplitz(part, taps + (mirrored ? kSquare - 1 - f : f) * kSquare, kSquare, -4, mirrored);
    } else {
      const int which = (f - kSquare) % 5;
      const Branch& branch = args.branches[(which + 1) / 2];
      const Taps& side = f < kSquare + 5 ? branch.first : branch.second;
      const T* taps =
          static_cast<const T*>(side.weight) + static_cast<long long>(channel) * side.size;
      const int start = which == 0 ? -4 : (which - 1) % 2 * 16 - kBandLead;
      toeplitz(part, taps, side.size, start, mirrored);
    }
  }
}

// This thread's parts of five matrices.
__device__ inline void load_matrices_from(unsigned (&part)[5][2], const unsigned* matrices,
                                          int first) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int f = 0; f < 5; ++f) {
#pragma unroll
    for (int i = 0; i < 2; ++i) part[f][i] = matrices[((first + f) * 32 + lane) * 2 + i];
  }
}

// 16 x 16 elements from (m, k) on of a matrix in shared memory, stored by rows of m or, TRANSPOSED,
// by rows of k. Registers 0, 1 hold k = 0..7, registers 2, 3 hold k = 8..15.
template <bool TRANSPOSED, typename T>
__device__ void load_fragment(unsigned (&fragment)[4], const T* matrix, int pitch, int m, int k) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = lane % 8, m_half = lane / 8 % 2 * 8, k_half = lane / 16 * 8;
  const T* from = TRANSPOSED ? matrix + (k + k_half + row) * pitch + m + m_half
                             : matrix + (m + m_half + row) * pitch + k + k_half;
  load_matrices<TRANSPOSED>(fragment, from);
}

// The fragment between two neighbours.
__device__ inline void between(unsigned (&middle)[4], const unsigned (&left)[4],
                               const unsigned (&right)[4]) {
  middle[0] = left[2];
  middle[1] = left[3];
  middle[2] = right[0];
  middle[3] = right[1];
}

// A strip of 16 lines (m) along k: 16 outputs a step, from 16 COUNT inputs of which 16 are new. The
// kernels of 11 and 21 need three fragments, that of 7 two.
template <bool TRANSPOSED, int COUNT, typename T>
struct Sliding {
  unsigned fragment[COUNT][4];

  __device__ void start(const T* matrix, int pitch, int m, int k) {
#pragma unroll
    for (int f = 1; f < COUNT; ++f) {
      load_fragment<TRANSPOSED>(fragment[f], matrix, pitch, m, k + 16 * (f - 1));
    }
  }

  // `k` is the place of the first output's first input.
  __device__ void step(const T* matrix, int pitch, int m, int k) {
#pragma unroll
    for (int f = 1; f < COUNT; ++f) {
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[f - 1][i] = fragment[f][i];
    }
    load_fragment<TRANSPOSED>(fragment[COUNT - 1], matrix, pitch, m, k + 16 * (COUNT - 1));
  }

  // Outputs 0..7 (half 0) or 8..15 of a kernel of 11 or 21.
  __device__ void wide(float (&sum)[4], const unsigned (&left)[2], const unsigned (&right)[2],
                       int half) const {
    if (half == 0) {
      multiply_add<T>(sum, fragment[0], left);
      multiply_add<T>(sum, fragment[1], right);
    } else {
      unsigned first[4], second[4];
      between(first, fragment[0], fragment[1]);
      between(second, fragment[1], fragment[2]);
      multiply_add<T>(sum, first, left);
      multiply_add<T>(sum, second, right);
    }
  }

  // Of the kernel of 7.
  __device__ void narrow(float (&sum)[4], const unsigned (&band)[2], int half) const {
    if (half == 0) {
      unsigned first[4];
      between(first, fragment[0], fragment[1]);
      multiply_add<T>(sum, first, band);
    } else {
      multiply_add<T>(sum, fragment[1], band);
    }
  }
};

// Zero in rows [from, until) of a matrix of 16-bit numbers whose pitch is a multiple of 4.
template <typename T>
__device__ void zero_rows(T* matrix, int pitch, int from, int until) {
  const int count = (until - from) * pitch;
  for (int i = 4 * static_cast<int>(threadIdx.x); i < count;
       i += 4 * static_cast<int>(blockDim.x)) {
    Four<T> zero;
#pragma unroll
    for (int e = 0; e < 4; ++e) narrow(zero.value[e], 0.0f);
    *reinterpret_cast<Four<T>*>(matrix + from * pitch + i) = zero;
  }
}

// Whether one of the four is not finite: its exponent is all ones, and one more carries.
template <typename T>
__device__ bool not_finite(const Four<T>& four) {
  constexpr bool bfloat16 = std::is_same_v<T, Bfloat16>;
  constexpr unsigned exponents = bfloat16 ? 0x7f807f80u : 0x7c007c00u;
  constexpr unsigned ones = bfloat16 ? 0x00800080u : 0x04000400u;
  const unsigned* pairs = reinterpret_cast<const unsigned*>(four.value);
  const unsigned carried = ((pairs[0] & exponents) + ones) | ((pairs[1] & exponents) + ones);
  return (carried & 0x80008000u) != 0;
}

// to[row * pitch + column] for rows, columns of a region that may reach beyond the image (zero
// there); its first column and width are multiples of 4. `apart`: zero for what is not finite.
// Returns whether this thread has staged something that is not finite.
template <typename T>
__device__ bool stage_image(T* to, int pitch, const T* plane, int row0, int rows, int column0,
                            int columns, bool apart, const Arguments& args) {
  bool found = false;
  const bool vector =
      args.columns % 4 == 0 && reinterpret_cast<size_t>(plane) % (4 * sizeof(T)) == 0;
  for (Walk at(threadIdx.x, blockDim.x, columns / 4); at.slow < rows; at.next()) {
    const int row = row0 + at.slow, column = column0 + 4 * at.fast;
    const T* from = plane + static_cast<long long>(row) * args.columns + column;
    Four<T> four;
    if (vector && row >= 0 && row < args.rows && column >= 0 && column < args.columns) {
      four = *reinterpret_cast<const Four<T>*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        narrow(four.value[i], 0.0f);
        if (row >= 0 && row < args.rows && column + i >= 0 && column + i < args.columns) {
          four.value[i] = from[i];
        }
      }
    }
    if (apart) {
      for (int i = 0; i < 4; ++i) {
        if (widen(four.value[i]) * 0.0f != 0.0f) narrow(four.value[i], 0.0f);
      }
    }
    found |= not_finite(four);
    *reinterpret_cast<Four<T>*>(to + at.slow * pitch + 4 * at.fast) = four;
  }
  return found;
}

// NaN into a plane's pixels of a region, where something in `from` is not finite at most `reach`
// rows and columns away. The strips' reaches lie in one another, and where the zeros around the
// image cut one way from pixel to pixel off, there is another one inside.
template <typename To, typename T>
__device__ void spoil(To* plane, const T* from, int reach, int row0, int row1, int column0,
                      int column1, const Arguments& args) {
  for (Walk at(threadIdx.x, blockDim.x, column1 - column0); at.slow < row1 - row0; at.next()) {
    const int row = row0 + at.slow, column = column0 + at.fast;
    const int last_row = at_most(args.rows - 1, row + reach);
    const int last_column = at_most(args.columns - 1, column + reach);
    float sum = 0.0f;
    for (int r = at_least(0, row - reach); r <= last_row; ++r) {
      const T* line = from + static_cast<long long>(r) * args.columns;
      for (int c = at_least(0, column - reach); c <= last_column; ++c) {
        sum += widen(line[c]) * 0.0f;
      }
    }
    if (sum != 0.0f) narrow(plane[static_cast<long long>(row) * args.columns + column], sum);
  }
}

template <typename T>
__device__ void unstage_image(T* plane, const T* from, int pitch, int row0, int row1, int column0,
                              int column1, const Arguments& args) {
  const bool vector =
      args.columns % 4 == 0 && reinterpret_cast<size_t>(plane) % (4 * sizeof(T)) == 0;
  for (Walk at(threadIdx.x, blockDim.x, (column1 - column0 + 3) / 4); at.slow < row1 - row0;
       at.next()) {
    const int column = column0 + 4 * at.fast;
    T* to = plane + static_cast<long long>(row0 + at.slow) * args.columns + column;
    const Four<T> four = *reinterpret_cast<const Four<T>*>(from + at.slow * pitch + 4 * at.fast);
    if (vector && column + 4 <= column1) {
      *reinterpret_cast<Four<T>*>(to) = four;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (column + i < column1) to[i] = four.value[i];
      }
    }
  }
}

// The square convolution of `steps` times 16 columns, 16 rows a warp: five products, one for each
// row of the kernel, with the image moved up by a row each. x's row 0 is two rows above the first
// output row, its column 0 four columns left of the first output column. Calls
// store(row, column, value, value of the next column) for every output.
template <typename T, typename Store>
__device__ void square_toeplitz(const T* x, int pitch, int row_tiles, int steps,
                                const unsigned* matrices, float bias, const Store& store) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
  const int segments = (steps + kSegment - 1) / kSegment;
  unsigned band[kSquare][2];
  load_matrices_from(band, matrices, 0);
  for (int task = warp; task < row_tiles * segments; task += warps) {
    const int row = task % row_tiles * 16, first = task / row_tiles * kSegment;
    const int last = at_most(steps, first + kSegment);
    unsigned right[kSquare][4];
#pragma unroll
    for (int ky = 0; ky < kSquare; ++ky) {
      load_fragment<false>(right[ky], x, pitch, row + ky, 16 * first);
    }
    for (int step = first; step < last; ++step) {
      float sum[2][4] = {{bias, bias, bias, bias}, {bias, bias, bias, bias}};
#pragma unroll
      for (int ky = 0; ky < kSquare; ++ky) {
        multiply_add<T>(sum[0], right[ky], band[ky]);
        unsigned middle[4], left[4] = {right[ky][0], right[ky][1], right[ky][2], right[ky][3]};
        load_fragment<false>(right[ky], x, pitch, row + ky, 16 * step + 16);
        between(middle, left, right[ky]);
        multiply_add<T>(sum[1], middle, band[ky]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + lane / 4, c = 16 * step + 8 * half + 2 * (lane % 4);
        store(r, c, sum[half][0], sum[half][1]);
        store(r + 8, c, sum[half][2], sum[half][3]);
      }
    }
  }
}

// One block: one tile of one channel, of plan.planes images one after another. Shared memory in
// 16-bit numbers:
//
//   the matrices | z | x, later the three t, later (gradient) da
//
// z is stored as the image is: rows u, columns v forward, rows v, columns u for the gradient.
// 64 x 64: 13 + 41 KB, 4 warps, 4 blocks a processor of an H200; 128 x 128 in tiles of 128 x 64:
// 26 + 69 KB, 8 warps, 2 blocks.
template <typename T, bool BACKWARD>
__global__ void __launch_bounds__(kThreads, 2) strips_toeplitz(Arguments args, Plan plan) {
  const int tiles = plan.tiles_u * plan.tiles_v;
  const long long block = static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x;
  const int tile = static_cast<int>(block % tiles);
  const int channel = static_cast<int>(block / tiles % args.channels);
  const int images = static_cast<int>(args.planes / args.channels);
  const long long turn = block / tiles / args.channels;
  if (turn * plan.planes >= images) return;
  const int first_image = static_cast<int>(turn) * plan.planes;
  const int last_image = at_most(images, first_image + plan.planes);

  unsigned* const matrices = static_cast<unsigned*>(shared_memory());
  T* const z = reinterpret_cast<T*>(matrices + kMatrices * 64);
  T* const x = z + plan.x_at;
  T* const t = z + plan.x_at;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;

  build_matrices<T>(matrices, args, channel, BACKWARD);
  const int height = BACKWARD ? args.columns : args.rows;
  const int width = BACKWARD ? args.rows : args.columns;
  const int u = tile / plan.tiles_v * plan.tile_u, v = tile % plan.tiles_v * plan.tile_v;
  const Region out = {u, at_most(height, u + plan.tile_u), v, at_most(width, v + plan.tile_v)};
  // Where the sum over the branches is needed: four more than the tile, two of them for 8 bytes.
  constexpr int around = BACKWARD ? 4 : 0;
  const Region core = {at_least(0, out.u0 - around), at_most(height, out.u1 + around),
                       at_least(0, out.v0 - around), at_most(width, out.v1 + around)};
  const int z_u0 = at_least(0, core.u0 - kBandLead), z_u1 = at_most(height, core.u1 + kBandLead);
  const int steps_u = (core.u1 - core.u0 + 15) / 16, steps_v = (core.v1 - core.v0 + 15) / 16;
  const int t_size = plan.t_pitch * plan.t_rows;
  const long long plane_size = static_cast<long long>(args.rows) * args.columns;

  for (int image = first_image; image < last_image; ++image) {
    const long long plane = static_cast<long long>(image) * args.channels + channel;
    const T* in = static_cast<const T*>(args.in) + plane * plane_size;
    T* result = static_cast<T*>(args.out) + plane * plane_size;
    const int z_tiles = (z_u1 - z_u0 + 15) / 16;

    __syncthreads();  // the previous image is written
    const auto stage = [&](bool apart) {
      if (BACKWARD) {
        return stage_image(z, plan.z_pitch, in, core.v0 - kBandLead, 16 * steps_v + 32, z_u0,
                           16 * z_tiles, apart, args);
      }
      // Columns: 16 more on the left if there is image, 4 for the square.
      return stage_image(x, plan.x_pitch, in, z_u0 - 2, 16 * z_tiles + 4, core.v0 - 20,
                         16 * steps_v + 48, apart, args);
    };
    if (!BACKWARD) zero_rows(z, plan.z_pitch, 0, 16 * z_tiles);
    bool apart = false;
    while (__syncthreads_or(stage(apart))) apart = true;

    if (!BACKWARD) {
      const int before = core.v0 > 0 ? 1 : 0, after = core.v0 + 16 * steps_v < width ? 1 : 0;
      const int v0 = core.v0 - 16 * before;
      square_toeplitz<T>(
          x + 16 - 16 * before, plan.x_pitch, z_tiles, before + steps_v + after, matrices,
          bias_of<T>(args.square.bias, channel), [&](int row, int column, float left, float right) {
            const int c = v0 + column;  // zeros outside the image stay
            T* to = z + row * plan.z_pitch + c - core.v0 + kBandLead;
            if (c < core.v0 - kBandLead || c >= core.v0 + 16 * steps_v + 20 || c >= width) return;
            *reinterpret_cast<unsigned*>(to) = pack<T>(left, c + 1 < width ? right : 0.0f);
          });
      __syncthreads();
    }

    // t: rows of the image only, zero around it. Row 0 is kBandLead above the core.
    const int t_row0 = z_u0 - core.u0 + kBandLead, t_row1 = z_u1 - core.u0 + kBandLead;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      zero_rows(t + i * t_size, plan.t_pitch, 0, t_row0);
      zero_rows(t + i * t_size, plan.t_pitch, t_row1, plan.t_rows);
    }
    // Biases are read where they are needed: registers are what is scarce.
    float bias[3] = {};
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (!BACKWARD) bias[i] = bias_of<T>(args.branches[i].first.bias, channel);
    }
    unsigned band[5][2];
    load_matrices_from(band, matrices, kSquare);
    const int segments_v = (steps_v + kSegment - 1) / kSegment;
    for (int task = warp; task < z_tiles * segments_v; task += warps) {
      const int m = task % z_tiles * 16, from = task / z_tiles * kSegment;
      Sliding<BACKWARD, 3, T> window;
      window.start(z, plan.z_pitch, m, 16 * from);
      for (int step = from; step < at_most(steps_v, from + kSegment); ++step) {
        window.step(z, plan.z_pitch, m, 16 * step);
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
          for (int r = 0; r < 2; ++r) {
            const int row = t_row0 + m + lane / 4 + 8 * r;
            if (row >= t_row1) continue;
            T* to = t + row * plan.t_pitch + 16 * step + 8 * half + 2 * (lane % 4);
#pragma unroll
            for (int i = 0; i < 3; ++i) {
              *reinterpret_cast<unsigned*>(to + i * t_size) =
                  pack<T>(sum[i][2 * r], sum[i][2 * r + 1]);
            }
          }
        }
      }
    }
    __syncthreads();

    // Result in place of z, by the thread that needs z there.
    float second_bias = 0.0f;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (!BACKWARD) second_bias += bias_of<T>(args.branches[i].second.bias, channel);
    }
    load_matrices_from(band, matrices, kSquare + 5);
    const int segments_u = (steps_u + kSegment - 1) / kSegment;
    for (int task = warp; task < steps_v * segments_u; task += warps) {
      const int m = task % steps_v * 16, from = task / steps_v * kSegment;
      Sliding<true, 2, T> of_seven;
      Sliding<true, 3, T> of_eleven, of_twenty_one;
      of_seven.start(t, plan.t_pitch, m, 16 * from);
      of_eleven.start(t + t_size, plan.t_pitch, m, 16 * from);
      of_twenty_one.start(t + 2 * t_size, plan.t_pitch, m, 16 * from);
      for (int step = from; step < at_most(steps_u, from + kSegment); ++step) {
        of_seven.step(t, plan.t_pitch, m, 16 * step);
        of_eleven.step(t + t_size, plan.t_pitch, m, 16 * step);
        of_twenty_one.step(t + 2 * t_size, plan.t_pitch, m, 16 * step);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float sum[4] = {second_bias, second_bias, second_bias, second_bias};
          of_seven.narrow(sum, band[0], half);
          of_eleven.wide(sum, band[1], band[2], half);
          of_twenty_one.wide(sum, band[3], band[4], half);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int at_v = core.v0 + m + lane / 4 + e / 2 * 8;
            const int at_u = core.u0 + 16 * step + 8 * half + 2 * (lane % 4) + e % 2;
            if (at_v >= core.v1 || at_u >= core.u1) continue;
            T* own = BACKWARD ? z + (at_v - core.v0 + kBandLead) * plan.z_pitch + at_u - z_u0
                              : z + (at_u - z_u0) * plan.z_pitch + at_v - core.v0 + kBandLead;
            const float value = sum[e] + widen(*own);
            narrow(*own, value);
            if (BACKWARD && args.middle != nullptr && at_v >= out.v0 && at_v < out.v1 &&
                at_u >= out.u0 && at_u < out.u1) {
              args.middle[plane * plane_size + static_cast<long long>(at_v) * args.columns + at_u] =
                  value;
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
            four.value[e] = z[(at_v - core.v0 + kBandLead) * plan.z_pitch + at_u + e - z_u0];
          }
        }
        *reinterpret_cast<Four<T>*>(x + at.slow * plan.x_pitch + 4 * at.fast) = four;
      }
      __syncthreads();
      T* const to = z + (out.v0 - core.v0) * plan.z_pitch;
      square_toeplitz<T>(x, plan.x_pitch, rows, steps, matrices, 0.0f,
                         [&](int row, int column, float left, float right) {
                           if (row >= out.v1 - out.v0) return;
                           *reinterpret_cast<unsigned*>(to + row * plan.z_pitch + column) =
                               pack<T>(left, right);
                         });
      __syncthreads();
      unstage_image(result, to, plan.z_pitch, out.v0, out.v1, out.u0, out.u1, args);
    } else {
      unstage_image(result, z + (core.u0 - z_u0) * plan.z_pitch + kBandLead, plan.z_pitch, out.u0,
                    out.u1, out.v0, out.v1, args);
    }
    if (apart) {
      __syncthreads();  // another thread may have written the same pixel
      const int row0 = BACKWARD ? out.v0 : out.u0, row1 = BACKWARD ? out.v1 : out.u1;
      const int column0 = BACKWARD ? out.u0 : out.v0, column1 = BACKWARD ? out.u1 : out.v1;
      constexpr int strip = kStrips[2] / 2, square = kSquare / 2;
      spoil(result, in, strip + square, row0, row1, column0, column1, args);
      if (BACKWARD && args.middle != nullptr) {
        spoil(args.middle + plane * plane_size, in, strip, row0, row1, column0, column1, args);
      }
    }
  }
}

}  // namespace famseg::strip_conv
