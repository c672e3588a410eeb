// Threads and memory around the kernels of passes.cpp.

#include <omp.h>

#include <cstring>
#include <vector>

#include "common/buffer.h"
#include "reassembly/cpu/kernels.h"

namespace famseg::reassembly {
namespace {

const Kernels& kernels_for(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return avx512::reassembly_kernels;
  if (isa == Isa::avx2) return avx2::reassembly_kernels;
#endif
  static_cast<void>(isa);
  return baseline::reassembly_kernels;
}

// Below this many multiply-adds (some 10 us) a second thread costs more than it brings.
constexpr int64_t kWorthAThread = 1 << 18;

int useful_threads(const Problem& p, int64_t blocks, int threads) {
  const int64_t taps = p.kernel_size * p.kernel_size * p.scale * p.scale;
  // The softmax of one pixel costs about as much as 16 channels.
  const int64_t work = p.n * p.h * p.w * taps * (p.c + 16 * p.groups);
  const int64_t useful = work / kWorthAThread + 1;
  const int64_t most = useful < blocks ? useful : blocks;
  return most < threads ? static_cast<int>(most) : threads;
}

// Calls work(block, scratch) for every block. Blocks go to whichever thread is free: results do not
// depend on that, because no block reads what another wrote.
template <typename Work>
void for_each_block(int64_t blocks, size_t scratch_bytes, int threads, const Work& work) {
  // Allocated here, because an exception must not leave a parallel region.
  std::vector<Buffer> scratch;
  for (int t = 0; t < threads; ++t) {
    scratch.push_back(allocate(scratch_bytes));
  }
#pragma omp parallel num_threads(threads)
  {
    void* mine = scratch[omp_get_thread_num()].get();
    // By its user, so that its pages are near that core.
    std::memset(mine, 0, scratch_bytes);
    // nowait: the region ends with a barrier anyway.
#pragma omp for schedule(dynamic) nowait
    for (int64_t block = 0; block < blocks; ++block) work(block, mine);
  }
}

}  // namespace

void forward(Isa isa, const Problem& problem, void* y, int threads) {
  if (problem.n == 0 || problem.c == 0 || problem.h == 0 || problem.w == 0) return;
  const Kernels& kernels = kernels_for(isa);
  const int64_t blocks = kernels.forward_blocks(problem);
  for_each_block(
      blocks, kernels.forward_scratch(problem), useful_threads(problem, blocks, threads),
      [&](int64_t block, void* scratch) { kernels.forward_block(problem, y, block, scratch); });
}

void backward(Isa isa, const Problem& problem, const Gradients& gradients, int threads) {
  // Without channels the gradient of the weights is still there, and zero.
  if (problem.n == 0 || problem.h == 0 || problem.w == 0) return;
  const Kernels& kernels = kernels_for(isa);
  const int64_t blocks = kernels.backward_blocks(problem, gradients);
  for_each_block(blocks, kernels.backward_scratch(problem, gradients),
                 useful_threads(problem, blocks, threads), [&](int64_t block, void* scratch) {
                   kernels.backward_block(problem, gradients, block, scratch);
                 });
}

}  // namespace famseg::reassembly
