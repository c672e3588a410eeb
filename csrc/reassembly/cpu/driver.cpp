// Threads and memory around the kernels.

#include "common/dispatch.h"
#include "common/parallel.h"
#include "reassembly/cpu/kernels.h"

namespace famseg::reassembly {
namespace {

// Below this many multiply-adds (some 10 us) a second thread costs more than it brings.
constexpr int64_t kWorthAThread = 1 << 18;

Scratch scratch_for(const Problem& p, int64_t blocks, size_t bytes, int threads) {
  const int64_t taps = p.kernel_size * p.kernel_size * p.scale * p.scale;
  // The softmax of one pixel costs about as much as 16 channels.
  const int64_t work = p.n * p.h * p.w * taps * (p.c + 16 * p.groups);
  const int64_t worthwhile = work / kWorthAThread + 1;
  return Scratch(useful_threads(threads, std::min(worthwhile, blocks)), bytes, Fill::zeros);
}

}  // namespace

void forward(Isa isa, const Problem& problem, void* y, int threads) {
  if (problem.n == 0 || problem.c == 0 || problem.h == 0 || problem.w == 0) return;
  const ForwardKernels& kernels = FAMSEG_KERNELS(isa, reassembly_forward_kernels);
  const int64_t blocks = kernels.blocks(problem);
  run_parallel(scratch_for(problem, blocks, kernels.scratch(problem), threads),
               Stage{blocks, [&](int64_t block, void* scratch) {
                       kernels.block(problem, y, block, scratch);
                     }});
}

void backward(Isa isa, const Problem& problem, const Gradients& gradients, int threads) {
  // Without channels the gradient of the weights is still there, and zero.
  if (problem.n == 0 || problem.h == 0 || problem.w == 0) return;
  const BackwardKernels& kernels = FAMSEG_KERNELS(isa, reassembly_backward_kernels);
  const int64_t blocks = kernels.blocks(problem, gradients);
  run_parallel(scratch_for(problem, blocks, kernels.scratch(problem, gradients), threads),
               Stage{blocks, [&](int64_t block, void* scratch) {
                       kernels.block(problem, gradients, block, scratch);
                     }});
}

}  // namespace famseg::reassembly
