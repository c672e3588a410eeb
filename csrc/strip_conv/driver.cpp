// Threads, memory and the order of summation around the kernels.

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/buffer.h"
#include "strip_conv/cpu.h"

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

// Calls work(i, scratch) for all i < count. Work goes to whichever thread is free: results do not
// depend on that, because none reads what another wrote.
template <typename Work>
void for_each(int64_t count, size_t scratch_bytes, int threads, const Work& work) {
  if (threads > count) threads = static_cast<int>(count);
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
  }
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
  // Empty images still have gradients of weights: zeros, by the reduction below.
  const bool empty = problem.h == 0 || problem.w == 0;
  const int64_t planes = empty ? 0 : problem.n * problem.c;
  const int64_t taps = kernels.partial_size(problem);
  std::vector<double> partials(static_cast<size_t>(problem.n * problem.c * taps));
  if (planes > 0) {
    for_each(planes, kernels.scratch(problem), threads, [&](int64_t plane, void* scratch) {
      kernels.plane(problem, gradients, plane, partials.data() + plane * taps, scratch);
    });
  }
  for (int64_t channel = 0; channel < problem.c; ++channel) {
    kernels.reduce_channel(problem, gradients, channel, partials.data());
  }
}

}  // namespace famseg::strip_conv
