#include "common/cuda.h"
// After the conversions of common/cuda.h: the kernels find them where their templates are defined.
#include "strip_conv/cuda/tensor_core.cuh"
//
#include "strip_conv/cuda/launch.h"

namespace famseg::strip_conv {
namespace {

std::string describe(const CudaProblem& p) {
  std::string text = "x (" + std::to_string(p.n) + ", " + std::to_string(p.c) + ", " +
                     std::to_string(p.h) + ", " + std::to_string(p.w) + "), square " +
                     std::to_string(p.square_size) + ", strips";
  for (const CudaBranch& b : p.branches) {
    text += " " + std::to_string(b.row_size) + "x" + std::to_string(b.column_size);
  }
  return text;
}

Arguments arguments_of(const CudaProblem& p, Kind kind) {
  Arguments args = {};
  args.planes = p.n * p.c;
  args.channels = static_cast<int>(p.c);
  args.rows = static_cast<int>(p.h);
  args.columns = static_cast<int>(p.w);
  args.square = {p.square_weight, p.square_bias, p.square_size};
  args.branch_count = static_cast<int>(p.branches.size());
  for (int i = 0; i < args.branch_count; ++i) {
    const CudaBranch& b = p.branches[i];
    const Taps row = {b.row_weight, b.row_bias, b.row_size};
    const Taps column = {b.column_weight, b.column_bias, b.column_size};
    args.branches[i] = kind == Kind::x_gradient ? Branch{column, row} : Branch{row, column};
  }
  return args;
}

bool has_tuned_sizes(const Arguments& args) {
  if (args.square.size != kSquare || args.branch_count != 3) return false;
  for (int i = 0; i < 3; ++i) {
    const Branch& b = args.branches[i];
    if (b.first.size != kStrips[i] || b.second.size != kStrips[i]) return false;
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
  const long long images = args.planes / args.channels;
  const long long turns = (images + plan.planes - 1) / plan.planes;
  launch(grid_of(turns * args.channels * plan.tiles_u * plan.tiles_v), plan.threads,
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
void launch_weight_gradients(const Arguments& args, const CudaProblem& p,
                             const CudaGradients& gradients, float* partial, void* stream) {
  const Plan plan = plan_for(Kind::weight_gradients, false, args);
  const long long tiles = plan.tiles_u * plan.tiles_v;
  launch(grid_of(args.planes * tiles), plan.threads, sizeof(float) * plan.slot_floats, stream,
         has_tuned_sizes(args) ? weight_gradients<T, true> : weight_gradients<T, false>, args, plan,
         partial);

  // In the order in which weight_gradients writes them.
  Outputs outputs = {};
  const auto add = [&](void* to, int first, int size) {
    outputs.output[outputs.count++] = {to, first, size};
  };
  const int k = p.square_size;
  if (k > 0) {
    add(gradients.square_weight, 0, k * k);
    add(gradients.square_bias, k * k, 1);
  }
  const int dy_sum = plan.branch_partials;
  int at = dy_sum + 1;
  for (size_t i = 0; i < p.branches.size(); ++i) {
    const int row = p.branches[i].row_size, column = p.branches[i].column_size;
    const CudaGradients::Side& side = gradients.branches[i];
    add(side.column_weight, at, column);
    add(side.row_weight, at + column, row);
    add(side.row_bias, at + column + row, 1);
    add(side.column_bias, dy_sum, 1);
    at += column + row + 1;
  }
  const long long sums = static_cast<long long>(args.channels) * plan.partials;
  const unsigned blocks = static_cast<unsigned>(smaller(4096, static_cast<int>((sums + 63) / 64)));
  launch(dim3{blocks, 1, 1}, 64, 0, stream, sum_partials<T>, partial, p.n * tiles, args.channels,
         plan.partials, outputs);
}

template <typename Body>
void for_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32:
      return body(float());
    case Dtype::float16:
      return body(Float16());
    case Dtype::bfloat16:
      return body(Bfloat16());
    case Dtype::float64:
      break;
  }
  throw std::runtime_error("no float64 kernel");
}

bool is_empty(const CudaProblem& p) {
  return p.n == 0 || p.c == 0 || p.h == 0 || p.w == 0;
}

}  // namespace

int max_branches() {
  return kMaxBranches;
}

void forward_cuda(const CudaProblem& problem, void* y, void* stream) {
  if (is_empty(problem)) return;
  explained(
      "strip_conv2d", [&] { return describe(problem); },
      [&] {
        for_type(problem.dtype, [&](auto element) {
          Arguments args = arguments_of(problem, Kind::forward);
          args.in = problem.x;
          args.out = y;
          launch_strips<decltype(element)>(Kind::forward, args, stream);
        });
      });
}

CudaWorkspace backward_workspace_cuda(const CudaProblem& problem, bool weights) {
  if (is_empty(problem) || !weights) return {0, 0};
  CudaWorkspace workspace = {};
  explained(
      "strip_conv2d", [&] { return describe(problem); },
      [&] {
        const Plan plan =
            plan_for(Kind::weight_gradients, false, arguments_of(problem, Kind::weight_gradients));
        const int64_t planes = problem.n * problem.c;
        workspace.middle = problem.square_size > 0 ? planes * problem.h * problem.w : 0;
        workspace.partial = planes * plan.tiles_u * plan.tiles_v * plan.partials;
      });
  return workspace;
}

void backward_cuda(const CudaProblem& problem, const void* y_gradient,
                   const CudaGradients& gradients, float* middle, float* partial, void* stream) {
  if (is_empty(problem)) return;
  explained(
      "strip_conv2d backward", [&] { return describe(problem); },
      [&] {
        for_type(problem.dtype, [&](auto element) {
          using T = decltype(element);
          if (gradients.x != nullptr) {
            Arguments args = arguments_of(problem, Kind::x_gradient);
            args.in = y_gradient;
            args.out = gradients.x;
            args.middle = middle;
            launch_strips<T>(Kind::x_gradient, args, stream);
          }
          if (partial == nullptr) return;
          Arguments args = arguments_of(problem, Kind::weight_gradients);
          args.in = problem.x;
          args.out = const_cast<void*>(y_gradient);
          args.middle = middle;
          launch_weight_gradients<T>(args, problem, gradients, partial, stream);
        });
      });
}

}  // namespace famseg::strip_conv
