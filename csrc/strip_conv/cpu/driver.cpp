// Threads, memory and the order of summation around the kernels.

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/buffer.h"
#include "strip_conv/cpu/kernels.h"

namespace famseg::strip_conv {
namespace {

const ForwardKernels& forward_kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return avx512::strip_conv_forward_kernels;
  if (isa == Isa::avx2) return avx2::strip_conv_forward_kernels;
#endif
  static_cast<void>(isa);
  return baseline::strip_conv_forward_kernels;
}

const BackwardKernels& backward_kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return avx512::strip_conv_backward_kernels;
  if (isa == Isa::avx2) return avx2::strip_conv_backward_kernels;
#endif
  static_cast<void>(isa);
  return baseline::strip_conv_backward_kernels;
}

// Calls work(i, scratch) for all i < count, then, with all of that done, rest(i, scratch) for all
// i < rest_count. Work goes to whichever thread is free: results do not depend on that, because
// none reads what another of its kind wrote.
template <typename Work, typename Rest>
void for_each(int64_t count, size_t scratch_bytes, int threads, const Work& work,
              int64_t rest_count, const Rest& rest) {
  const int64_t useful = std::max<int64_t>({count, rest_count, 1});
  threads = static_cast<int>(std::min<int64_t>(threads, useful));
  // Allocated here, because an exception must not leave a parallel region.
  std::vector<Buffer> scratch;
  for (int t = 0; t < threads; ++t) {
    scratch.push_back(allocate(scratch_bytes));
  }
#pragma omp parallel num_threads(threads)
  {
    void* mine = scratch[omp_get_thread_num()].get();
    std::memset(mine, 0, scratch_bytes);  // by its user, so that its pages are near that core
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) work(i, mine);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < rest_count; ++i) rest(i, mine);
  }
}

template <typename Work>
void for_each(int64_t count, size_t scratch_bytes, int threads, const Work& work) {
  for_each(count, scratch_bytes, threads, work, 0, work);
}

#if defined(FAMSEG_AMX)
// False if the result, or a part of it, is still to be computed.
bool forward_by_matrices(Isa isa, const Problem& problem, void* y, int threads) {
  const MatrixKernels& kernels = amx::strip_conv_matrix_kernels;
  if (isa < Isa::amx || !kernels.suits(problem)) return false;
  std::vector<uint8_t> done(problem.c);
  for_each(problem.c, kernels.scratch(problem), threads, [&](int64_t channel, void* scratch) {
    done[channel] = kernels.channel(problem, y, channel, scratch);
  });
  return std::all_of(done.begin(), done.end(), [](uint8_t one) { return one != 0; });
}
#endif

}  // namespace

void forward(Isa isa, const Problem& problem, void* y, int threads) {
  if (problem.n * problem.c * problem.h * problem.w == 0) return;
#if defined(FAMSEG_AMX)
  if (forward_by_matrices(isa, problem, y, threads)) return;
#endif
  const ForwardKernels& kernels = forward_kernels(isa);
  for_each(kernels.blocks(problem), kernels.scratch(problem), threads,
           [&](int64_t block, void* scratch) { kernels.block(problem, y, block, scratch); });
}

void backward(Isa isa, const Problem& problem, const Gradients& gradients, int threads) {
  const BackwardKernels& kernels = backward_kernels(isa);
  const BackwardPlan plan = kernels.plan(problem);
  const Buffer partials = allocate(plan.pieces * plan.partial_bytes);
  char* first = static_cast<char*>(partials.get());
  for_each(
      plan.pieces, plan.scratch_bytes, threads,
      [&](int64_t piece, void* scratch) {
        kernels.piece(problem, gradients, piece, first + piece * plan.partial_bytes, scratch);
      },
      plan.groups,
      [&](int64_t group, void* scratch) {
        kernels.reduce_group(problem, gradients, group, first, scratch);
      });
}

}  // namespace famseg::strip_conv
