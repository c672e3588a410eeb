// Threads, memory and the order of summation around the kernels of cpu.cpp.

#include <omp.h>

#include <cstring>
#include <vector>

#include "common/buffer.h"
#include "strip_conv/cpu.h"

namespace famseg::strip_conv {
namespace {

const Kernels& kernels_for(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return avx512::strip_conv_kernels;
  if (isa == Isa::avx2) return avx2::strip_conv_kernels;
#endif
  static_cast<void>(isa);
  return baseline::strip_conv_kernels;
}

// Calls work(plane, scratch) for every plane. Planes go to whichever thread is free: results do not
// depend on that, because no plane reads what another wrote.
template <typename Work>
void for_each_plane(int64_t planes, size_t scratch_bytes, int threads, const Work& work) {
  if (threads > planes) threads = static_cast<int>(planes);
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
    for (int64_t plane = 0; plane < planes; ++plane) work(plane, mine);
  }
}

}  // namespace

void forward(Isa isa, const Problem& problem, void* y, int threads) {
  const int64_t planes = problem.n * problem.c;
  if (planes == 0 || problem.h == 0 || problem.w == 0) return;
  const Kernels& kernels = kernels_for(isa);
  for_each_plane(
      planes, kernels.forward_scratch(problem), threads,
      [&](int64_t plane, void* scratch) { kernels.forward_plane(problem, y, plane, scratch); });
}

void backward(Isa isa, const Problem& problem, const Gradients& gradients, int threads) {
  const Kernels& kernels = kernels_for(isa);
  // Empty images still have gradients of weights: zeros, by the reduction below.
  const bool empty = problem.h == 0 || problem.w == 0;
  const int64_t planes = empty ? 0 : problem.n * problem.c;
  const int64_t taps = kernels.partial_size(problem);
  std::vector<double> partials(static_cast<size_t>(problem.n * problem.c * taps));
  if (planes > 0) {
    for_each_plane(planes, kernels.backward_scratch(problem), threads,
                   [&](int64_t plane, void* scratch) {
                     kernels.backward_plane(problem, gradients, plane,
                                            partials.data() + plane * taps, scratch);
                   });
  }
  for (int64_t channel = 0; channel < problem.c; ++channel) {
    kernels.reduce_channel(problem, gradients, channel, partials.data());
  }
}

}  // namespace famseg::strip_conv
