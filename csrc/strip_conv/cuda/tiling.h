// How a strip convolution is cut into blocks, and where a block keeps what in shared memory: what
// the kernels read and the launcher computes.
//
// (u, v): row and column of a plane as it lies in shared memory, where the gradient of x has it
// transposed.
#pragma once

#include "strip_conv/problem.h"

namespace famseg::strip_conv {

constexpr int kMaxBranches = 8;
constexpr int kThreads = 256;  // at most, of a block
// A thread makes 16 outputs of a row convolution, or 16 rows of 4: enough products for each number
// it reads, and 64 sums still fit in registers.
constexpr int kOutputs = 16;
// The sizes that are known to the compiler.
constexpr int kSquare = 5;
constexpr int kStrips[3] = {7, 11, 21};
// Taps of a weight gradient that a pass sums where the size is not known to the compiler.
constexpr int kChunk = 8;
constexpr int kScratch = 28;  // sums of a warp: 25 or 24, in 16-byte steps
// Toeplitz form: the first input of eight outputs, at a kernel of 21 taps, in steps of 8; and how
// many times 16 outputs a warp makes in a row before it starts anew elsewhere.
constexpr int kBandLead = 12;
constexpr int kSegment = 4;
constexpr int kMatrices = kSquare + 2 * 5;  // 64 registers of 32 bits each

template <int VALUE>
struct Constant {
  static constexpr int value = VALUE;
};

// Of the host too, which the toolkit's are not.
template <typename T>
__host__ __device__ constexpr T max(T a, T b) {
  return a > b ? a : b;
}

template <typename T>
__host__ __device__ constexpr T min(T a, T b) {
  return a < b ? a : b;
}

__host__ __device__ constexpr int round4(int value) {
  return (value + 3) / 4 * 4;
}

// A row of taps starts with zeros, so that the window of an output at a multiple of 4 starts at a
// multiple of 4 too, and ends with zeros to a multiple of 4.
__host__ __device__ constexpr int lead(int size) {
  return round4(size / 2) - size / 2;
}
__host__ __device__ constexpr int padded(int size) {
  return round4(lead(size) + size);
}
// A column of taps with kOutputs zeros on either side: no bounds check for 16 outputs at once.
__host__ __device__ constexpr int surrounded(int size) {
  return round4(2 * kOutputs + size);
}

// A problem as the kernels take it. Which of x, dy, y, dx and da a kernel uses, and what it does
// with da, depends on its Kind.
struct Arguments {
  const void* x;  // (planes, h, w), as all of these
  const void* dy;
  void* y;
  void* dx;
  float* da;  // the gradient of x writes it, weight gradients read it; null: not wanted
  long long planes;
  int c, h, w;
  Convolution square;
  Branch branches[kMaxBranches];  // rows and columns exchanged for the gradient of x
  int branch_count;
};

struct Plan {
  int tile_u, tile_v, tiles_u, tiles_v;
  int threads, planes;       // threads of a plane's tile, planes of a block
  int row_reach, col_reach;  // of the widest kernels
  // In floats, from the start of a slot.
  int square_at, row_at[kMaxBranches], col_at[kMaxBranches];
  int a_at, a_pitch, x_at, x_pitch, r_pitch, r_rows, dy_at, scratch_at, slot_floats;
  int sums, branch_sums;  // sums of a weight gradient, those before the branches'
};

// A gradient (C, size) and its place among the partial sums.
struct Output {
  void* to;
  int first, size;
};

struct Outputs {
  Output output[2 + 4 * kMaxBranches];
  int count;
};

enum class Kind { forward, x_gradient, weight_gradients };

inline int round16(int value) {
  return (value + 15) / 16 * 16;
}

// An odd multiple of 4: eight lanes that read 16 bytes each from rows one below the other then hit
// all banks once.
inline int odd_pitch(int width) {
  return round4(width) / 4 % 2 == 1 ? round4(width) : round4(width) + 4;
}

// The plan for tiles of a given size.
inline Plan plan_of_tile(Kind kind, const Arguments& args, int tile_u, int tile_v) {
  const bool transposed = kind == Kind::x_gradient;
  const int height = transposed ? args.w : args.h;
  const int width = transposed ? args.h : args.w;
  const int k = args.square.size, reach = k / 2, reach4 = round4(reach);

  Plan plan = {};
  plan.tile_u = tile_u;
  plan.tile_v = tile_v;
  plan.tiles_u = (height + tile_u - 1) / tile_u;
  plan.tiles_v = (width + tile_v - 1) / tile_v;
  plan.branch_sums = k > 0 ? k * k + 1 : 0;
  plan.sums = plan.branch_sums + 1;
  int at = k * padded(k);
  for (int b = 0; b < args.branch_count; ++b) {
    const int row = args.branches[b].row.size, col = args.branches[b].col.size;
    plan.row_reach = max(plan.row_reach, row / 2);
    plan.col_reach = max(plan.col_reach, col / 2);
    plan.row_at[b] = at;
    plan.col_at[b] = at + padded(row);
    at += padded(row) + surrounded(col);
    plan.sums += row + col + 1;
  }

  const int core_u = transposed ? min(height, tile_u + 2 * reach) : min(height, tile_u);
  const int core_v = transposed ? min(width, tile_v + 2 * reach4) : min(width, tile_v);
  const int a_rows = min(height, core_u + 2 * plan.col_reach);
  const int a_width = round4(plan.row_reach) + round16(core_v) + round4(plan.row_reach + 1);
  plan.a_pitch = odd_pitch(a_width);
  plan.r_pitch = odd_pitch(round16(core_v));
  const int x_rows = transposed ? core_u : min(height, a_rows + 2 * reach);
  plan.x_pitch = (transposed ? round4(tile_v) : a_width) + reach4 + round4(reach + 1);
  const int x_floats = k > 0 ? x_rows * plan.x_pitch : 0, r_floats = a_rows * plan.r_pitch;
  const int patches = (core_v + 3) / 4 * ((core_u + kOutputs - 1) / kOutputs);

  plan.planes = 1;
  plan.threads = patches;
  if (kind == Kind::weight_gradients) {
    plan.threads = min(kThreads, (patches + 31) / 32 * 32);
    plan.scratch_at = at;
    at += kThreads / 32 * kScratch;
  }
  plan.a_at = at;
  at += a_rows * plan.a_pitch;
  if (kind == Kind::weight_gradients) {
    plan.dy_at = at;
    at += a_rows * plan.r_pitch;
  }
  plan.x_at = at;
  // The last chunk of a correlation may read beyond the last row.
  plan.slot_floats = round4(at + max(x_floats, r_floats)) + kChunk;
  return plan;
}

// The same for the Toeplitz form, all but slot_floats in 16-bit numbers from a on. a, x and r_i are
// as wide as the fragments that are read of them, pitches are odd multiples of 8.
inline Plan plan_of_toeplitz_tile(Kind kind, const Arguments& args, int tile_u, int tile_v) {
  const bool transposed = kind == Kind::x_gradient;
  const int height = transposed ? args.w : args.h;
  const int width = transposed ? args.h : args.w;
  const int around = transposed ? 4 : 0;
  const int core_u = round16(min(height, tile_u + 2 * around));
  const int core_v = round16(min(width, tile_v + 2 * around));
  const int a_rows = round16(min(height, core_u + 2 * kBandLead));

  Plan plan = {};
  plan.tile_u = tile_u;
  plan.tile_v = tile_v;
  plan.tiles_u = (height + tile_u - 1) / tile_u;
  plan.tiles_v = (width + tile_v - 1) / tile_v;
  plan.row_reach = plan.col_reach = kStrips[2] / 2;
  plan.planes = 1;
  plan.r_pitch = core_v + 8;
  plan.r_rows = core_u + 32;
  int x_size;
  if (transposed) {
    plan.a_pitch = a_rows + 8;
    plan.x_at = (core_v + 32) * plan.a_pitch;
    plan.x_pitch = round16(min(height, tile_u)) + 24;
    x_size = (round16(min(width, tile_v)) + 4) * plan.x_pitch;
  } else {
    plan.a_pitch = core_v + 40;
    plan.x_at = a_rows * plan.a_pitch;
    plan.x_pitch = core_v + 56;
    x_size = (a_rows + 4) * plan.x_pitch;
  }
  plan.slot_floats = 64 * kMatrices + (plan.x_at + max(x_size, 3 * plan.r_rows * plan.r_pitch)) / 2;
  const int segments_u = (core_u / 16 + kSegment - 1) / kSegment;
  const int segments_v = (core_v / 16 + kSegment - 1) / kSegment;
  const int tasks = max(a_rows / 16 * segments_v, core_v / 16 * segments_u);
  plan.threads = 32 * min(kThreads / 32, tasks);
  return plan;
}

// The cheapest plan that fits: FMAs with what tiles compute twice, a quarter more where a
// multiprocessor holds only one block, which cannot load while it computes: for its shared memory,
// or for its registers, of which a thread of the FMA kernels has up to 255 and 65536 are there.
// `floats` are what a block may have of shared memory and what two blocks may have each. False:
// none fits.
inline bool make_plan(Kind kind, bool toeplitz, const Arguments& args, int floats, int half_floats,
                      Plan& best) {
  const int height = kind == Kind::x_gradient ? args.w : args.h;
  const int width = kind == Kind::x_gradient ? args.h : args.w;
  double lowest = 0.0;
  const auto consider = [&](int tile_u, int tile_v) {
    const Plan plan = toeplitz ? plan_of_toeplitz_tile(kind, args, tile_u, tile_v)
                               : plan_of_tile(kind, args, tile_u, tile_v);
    if (plan.slot_floats > floats || plan.threads > kThreads) return;
    const double k = args.square.size;
    const double rows = min(height, tile_u + 2 * plan.col_reach);
    const double columns = min(width, tile_v + 2 * plan.row_reach);
    const double tile = k * k * rows * columns + 2.0 * plan.row_reach * rows * tile_v +
                        2.0 * plan.col_reach * tile_u * tile_v;
    const bool alone = plan.slot_floats > half_floats || (!toeplitz && plan.threads > kThreads / 2);
    const double cost = (tile + 1.0) * plan.tiles_u * plan.tiles_v * (alone ? 1.25 : 1.0);
    if (lowest != 0.0 && cost >= lowest) return;
    lowest = cost;
    best = plan;
  };
  // From pieces of at most 256, cut further; balanced, so that the last is not a sliver.
  constexpr int kCuts[] = {1, 2, 3, 4, 6, 8};
  const int pieces_u = (height + 255) / 256, pieces_v = (width + 255) / 256;
  for (const int u : kCuts) {
    for (const int v : kCuts) {
      consider(round16((height + pieces_u * u - 1) / (pieces_u * u)),
               round16((width + pieces_v * v - 1) / (pieces_v * v)));
    }
  }
  if (lowest == 0.0) consider(16, 16);
  if (lowest == 0.0) return false;
  if (toeplitz) {
    // The matrices of a channel serve several images, as long as there are blocks for all
    // processors several times over.
    const long long blocks = args.planes * best.tiles_u * best.tiles_v;
    best.planes = blocks >= 4096 ? 4 : blocks >= 2048 ? 2 : 1;
  } else if (kind != Kind::weight_gradients && best.tiles_u * best.tiles_v == 1) {
    // Small planes share a block of some four warps.
    const int room = max(1, half_floats / best.slot_floats);
    best.planes = max(1, min(min(room, 128 / best.threads),
                             args.planes < 128 ? static_cast<int>(args.planes) : 128));
  }
  return true;
}

}  // namespace famseg::strip_conv
