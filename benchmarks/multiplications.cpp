// Arithmetic that counts itself, and plain functions around the drivers of the CPU kernels, for
// multiplications.py. Compiled after multiplications.h as the kernels are.

#include <vector>

#include "reassembly/cpu/kernels.h"
#include "ssd_scan/cpu/kernels.h"
#include "strip_conv/cpu/kernels.h"

namespace {

using famseg::Dtype;
using famseg::Isa;
using Quad = __float128;

int64_t multiplications = 0;

void* at(uint64_t address) {
  return reinterpret_cast<void*>(address);
}

}  // namespace

extern "C" {

// What compiled code calls; in libgcc's place, so they must not be visible to other libraries, nor
// others' to this one. All values fit into 64 bits: results are those of real fp64 arithmetic.
[[gnu::visibility("hidden")]] Quad __multf3(Quad a, Quad b) {
  ++multiplications;
  return static_cast<Double>(a) * static_cast<Double>(b);
}
[[gnu::visibility("hidden")]] Quad __addtf3(Quad a, Quad b) {
  return static_cast<Double>(a) + static_cast<Double>(b);
}
[[gnu::visibility("hidden")]] Quad __subtf3(Quad a, Quad b) {
  return static_cast<Double>(a) - static_cast<Double>(b);
}

void widen(const Double* from, Quad* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}
void narrow(const Quad* from, Double* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<Double>(from[i]);
}

// Each returns the multiplications that it made. The last address is that of the result.

// sizes: n, c, h, w, square size, branches; addresses: x, square weight, square bias, y; of each
// branch weight, bias and size of the row, then of the column.
int64_t strip_conv2d(const int64_t* sizes, const uint64_t* addresses, const uint64_t* sides) {
  const auto convolution = [](const uint64_t* side) {
    return famseg::strip_conv::Convolution{at(side[0]), at(side[1]), static_cast<int>(side[2])};
  };
  std::vector<famseg::strip_conv::Branch> branches;
  for (int64_t i = 0; i < sizes[5]; ++i, sides += 6) {
    branches.push_back({convolution(sides), convolution(sides + 3)});
  }
  famseg::strip_conv::Problem problem{};
  problem.dtype = Dtype::float64;
  problem.n = sizes[0];
  problem.c = sizes[1];
  problem.h = sizes[2];
  problem.w = sizes[3];
  problem.x = at(addresses[0]);
  problem.square = {at(addresses[1]), at(addresses[2]), static_cast<int>(sizes[4])};
  problem.branches = branches.data();
  problem.branch_count = sizes[5];
  multiplications = 0;
  famseg::strip_conv::forward(Isa::baseline, problem, at(addresses[3]), 1);
  return multiplications;
}

// sizes: n, c, h, w, kernel size, scale, groups; addresses: features, masks, y.
int64_t carafe(const int64_t* sizes, const uint64_t* addresses) {
  famseg::reassembly::Problem problem{};
  problem.dtype = Dtype::float64;
  problem.n = sizes[0];
  problem.c = sizes[1];
  problem.h = sizes[2];
  problem.w = sizes[3];
  problem.kernel_size = sizes[4];
  problem.scale = sizes[5];
  problem.groups = sizes[6];
  problem.x = at(addresses[0]);
  problem.weights = at(addresses[1]);
  multiplications = 0;
  famseg::reassembly::forward(Isa::baseline, problem, at(addresses[2]), 1);
  return multiplications;
}

// sizes: batch, height, width, heads, headdim, groups, d_state, directions, matrices of B and C;
// addresses: x, dt, A, B, C, y.
int64_t ssd_scan_2d(const int64_t* sizes, const uint64_t* addresses) {
  famseg::ssd_scan::Problem problem{};
  problem.dtype = Dtype::float64;
  problem.batch = sizes[0];
  problem.height = sizes[1];
  problem.width = sizes[2];
  problem.heads = sizes[3];
  problem.headdim = sizes[4];
  problem.groups = sizes[5];
  problem.d_state = sizes[6];
  problem.directions = sizes[7];
  problem.matrices = sizes[8];
  problem.dt_max = HUGE_VAL;
  problem.x = at(addresses[0]);
  problem.dt = at(addresses[1]);
  problem.A = at(addresses[2]);
  problem.B = at(addresses[3]);
  problem.C = at(addresses[4]);
  multiplications = 0;
  (void)famseg::ssd_scan::forward(Isa::baseline, problem, {at(addresses[5]), nullptr}, 1);
  return multiplications;
}

}  // extern "C"
