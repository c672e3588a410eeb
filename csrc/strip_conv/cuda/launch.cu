#include "common/cuda.h"
// After the conversions of common/cuda.h: the kernels find them where their templates are defined.
#include "strip_conv/cuda/fma_strips.cuh"
#include "strip_conv/cuda/fma_weight_gradients.cuh"
#include "strip_conv/cuda/tensor_core_strips.cuh"
//
#include "strip_conv/cuda/launch.h"

namespace famseg::strip_conv {
namespace {

std::string describe(const Problem& p) {
  std::string text = "x (" + std::to_string(p.n) + ", " + std::to_string(p.c) + ", " +
                     std::to_string(p.h) + ", " + std::to_string(p.w) + "), square " +
                     std::to_string(p.square.size) + ", strips";
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const Branch& b = p.branches[i];
    text += " " + std::to_string(b.row.size) + "x" + std::to_string(b.col.size);
  }
  return text;
}

Arguments arguments_of(const Problem& p, Kind kind) {
  if (p.channels_last) throw std::runtime_error("no kernel for channels_last");
  if (p.branch_count > kMaxBranches) throw std::runtime_error("too many branches");
  Arguments args = {};
  args.planes = p.n * p.c;
  args.c = static_cast<int>(p.c);
  args.h = static_cast<int>(p.h);
  args.w = static_cast<int>(p.w);
  args.square = p.square;
  args.branch_count = static_cast<int>(p.branch_count);
  for (int i = 0; i < args.branch_count; ++i) {
    const Branch& b = p.branches[i];
    args.branches[i] = kind == Kind::x_gradient ? Branch{b.col, b.row} : b;
  }
  return args;
}

bool has_tuned_sizes(const Arguments& args) {
  if (args.square.size != kSquare || args.branch_count != 3) return false;
  for (int i = 0; i < 3; ++i) {
    const Branch& b = args.branches[i];
    if (b.row.size != kStrips[i] || b.col.size != kStrips[i]) return false;
  }
  return true;
}

Plan plan_for(Kind kind, bool toeplitz, const Arguments& args) {
  const Limits limits = device_limits();
  constexpr size_t reserved = 1024;  // what the driver keeps of each block's
  const int floats = static_cast<int>(limits.shared_per_block / sizeof(float));
  const int half = static_cast<int>((limits.shared_per_processor / 2 - reserved) / sizeof(float));
  Plan plan;
  if (!make_plan(kind, toeplitz, args, floats, half, plan)) {
    throw std::runtime_error("this GPU's shared memory of " +
                             std::to_string(limits.shared_per_block) +
                             " bytes is too small for these kernel sizes");
  }
  return plan;
}

template <typename T>
void launch_strips_toeplitz(Kind kind, const Arguments& args, void* stream) {
  const Plan plan = plan_for(kind, true, args);
  const long long images = args.planes / args.c;
  const long long turns = (images + plan.planes - 1) / plan.planes;
  launch(grid_of(turns * args.c * plan.tiles_u * plan.tiles_v), plan.threads,
         sizeof(float) * plan.slot_floats, stream,
         kind == Kind::forward ? strips_toeplitz<T, false> : strips_toeplitz<T, true>, args, plan);
}

template <typename T>
void launch_strips(Kind kind, const Arguments& args, void* stream) {
  if constexpr (sizeof(T) == 2) {
    if (has_tuned_sizes(args)) return launch_strips_toeplitz<T>(kind, args, stream);
  }
  const Plan plan = plan_for(kind, false, args);
  const long long groups = (args.planes + plan.planes - 1) / plan.planes;
  const dim3 grid = grid_of(groups * plan.tiles_u * plan.tiles_v);
  const unsigned threads = (plan.planes * plan.threads + 31) / 32 * 32;
  const size_t bytes = sizeof(float) * plan.slot_floats * plan.planes;
  auto kernel = kind == Kind::forward ? strips<T, false, false> : strips<T, false, true>;
  if constexpr (sizeof(T) == 4) {
    if (has_tuned_sizes(args)) {
      kernel = kind == Kind::forward ? strips<T, true, false> : strips<T, true, true>;
    }
  }
  launch(grid, threads, bytes, stream, kernel, args, plan);
}

template <typename T>
void launch_weight_gradients(const Arguments& args, const Problem& p, const Gradients& gradients,
                             float* partials, void* stream) {
  const Plan plan = plan_for(Kind::weight_gradients, false, args);
  const long long tiles = plan.tiles_u * plan.tiles_v;
  launch(grid_of(args.planes * tiles), plan.threads, sizeof(float) * plan.slot_floats, stream,
         has_tuned_sizes(args) ? weight_gradients<T, true> : weight_gradients<T, false>, args, plan,
         partials);

  // In the order in which weight_gradients writes them.
  Outputs outputs = {};
  const auto add = [&](void* to, int first, int size) {
    outputs.output[outputs.count++] = {to, first, size};
  };
  const int k = args.square.size;
  if (k > 0) {
    add(gradients.square.weight, 0, k * k);
    add(gradients.square.bias, k * k, 1);
  }
  const int dy_sum = plan.branch_sums;
  int at = dy_sum + 1;
  for (int i = 0; i < args.branch_count; ++i) {
    const int row = args.branches[i].row.size, col = args.branches[i].col.size;
    const BranchGradient& to = gradients.branches[i];
    add(to.col.weight, at, col);
    add(to.row.weight, at + col, row);
    add(to.row.bias, at + col + row, 1);
    add(to.col.bias, dy_sum, 1);
    at += col + row + 1;
  }
  const long long sums = static_cast<long long>(args.c) * plan.sums;
  const unsigned blocks = static_cast<unsigned>(min(4096, static_cast<int>((sums + 63) / 64)));
  launch(dim3{blocks, 1, 1}, 64, 0, stream, sum_partials<T>, partials, p.n * tiles, args.c,
         plan.sums, outputs);
}

bool is_empty(const Problem& p) {
  return p.n == 0 || p.c == 0 || p.h == 0 || p.w == 0;
}

}  // namespace

int max_branches() {
  return kMaxBranches;
}

void forward_cuda(const Problem& problem, void* y, void* stream) {
  if (is_empty(problem)) return;
  explained(
      "strip_conv2d", [&] { return describe(problem); },
      [&] {
        for_type(problem.dtype, [&](auto element) {
          Arguments args = arguments_of(problem, Kind::forward);
          args.x = problem.x;
          args.y = y;
          launch_strips<decltype(element)>(Kind::forward, args, stream);
        });
      });
}

Workspace backward_workspace_cuda(const Problem& problem, bool weights) {
  if (is_empty(problem) || !weights) return {0, 0};
  Workspace workspace = {};
  explained(
      "strip_conv2d", [&] { return describe(problem); },
      [&] {
        const Plan plan =
            plan_for(Kind::weight_gradients, false, arguments_of(problem, Kind::weight_gradients));
        const int64_t planes = problem.n * problem.c;
        workspace.da = problem.square.size > 0 ? planes * problem.h * problem.w : 0;
        workspace.partials = planes * plan.tiles_u * plan.tiles_v * plan.sums;
      });
  return workspace;
}

void backward_cuda(const Problem& problem, const Gradients& gradients, float* da, float* partials,
                   void* stream) {
  if (is_empty(problem)) return;
  explained(
      "strip_conv2d backward", [&] { return describe(problem); },
      [&] {
        for_type(problem.dtype, [&](auto element) {
          using T = decltype(element);
          if (gradients.dx != nullptr) {
            Arguments args = arguments_of(problem, Kind::x_gradient);
            args.dy = gradients.dy;
            args.dx = gradients.dx;
            args.da = da;
            launch_strips<T>(Kind::x_gradient, args, stream);
          }
          if (partials == nullptr) return;
          Arguments args = arguments_of(problem, Kind::weight_gradients);
          args.x = problem.x;
          args.dy = gradients.dy;
          args.da = da;
          launch_weight_gradients<T>(args, problem, gradients, partials, stream);
        });
      });
}

}  // namespace famseg::strip_conv
