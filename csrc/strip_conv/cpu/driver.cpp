// Threads, memory and the order of summation around the kernels.

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "strip_conv/cpu/kernels.h"

namespace famseg::strip_conv {
namespace {

// False if the result, or a part of it, is still to be computed.
bool forward_by_matrices(const MatrixKernels* kernels, const Problem& problem, void* y,
                         int threads) {
  if (kernels == nullptr || !kernels->suits(problem)) return false;
  std::vector<uint8_t> done(problem.c);
  run_parallel(Scratch(useful_threads(threads, problem.c), kernels->scratch(problem), Fill::zeros),
               Stage{problem.c, [&](int64_t channel, void* scratch) {
                       done[channel] = kernels->channel(problem, y, channel, scratch);
                     }});
  return std::all_of(done.begin(), done.end(), [](uint8_t one) { return one != 0; });
}

}  // namespace

void forward(Isa isa, const Problem& problem, void* y, int threads) {
  if (problem.n * problem.c * problem.h * problem.w == 0) return;
  const MatrixKernels* matrix_kernels = FAMSEG_AMX_KERNELS(isa, strip_conv_matrix_kernels);
  if (forward_by_matrices(matrix_kernels, problem, y, threads)) return;
  const ForwardKernels& kernels = FAMSEG_KERNELS(isa, strip_conv_forward_kernels);
  const int64_t blocks = kernels.blocks(problem);
  run_parallel(Scratch(useful_threads(threads, blocks), kernels.scratch(problem), Fill::zeros),
               Stage{blocks, [&](int64_t block, void* scratch) {
                       kernels.block(problem, y, block, scratch);
                     }});
}

void backward(Isa isa, const Problem& problem, const Gradients& gradients, int threads) {
  const BackwardKernels& kernels = FAMSEG_KERNELS(isa, strip_conv_backward_kernels);
  const BackwardPlan plan = kernels.plan(problem, gradients);
  const Buffer partials = allocate(plan.pieces * plan.partial_bytes);
  char* first = static_cast<char*>(partials.get());
  const int useful = useful_threads(threads, std::max(plan.pieces, plan.groups));
  run_parallel(Scratch(useful, plan.scratch_bytes, Fill::zeros),
               Stage{plan.pieces,
                     [&](int64_t piece, void* scratch) {
                       kernels.piece(problem, gradients, piece, first + piece * plan.partial_bytes,
                                     scratch);
                     }},
               Stage{plan.groups, [&](int64_t group, void* scratch) {
                       kernels.reduce_group(problem, gradients, group, first, scratch);
                     }});
}

}  // namespace famseg::strip_conv
