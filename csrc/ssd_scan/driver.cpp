// Threads, memory, the division into blocks of heads, and the order of summation around the
// kernels of cpu.cpp.

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/buffer.h"
#include "ssd_scan/cpu.h"

namespace famseg::ssd_scan {
namespace {

const Kernels& kernels_for(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return avx512::ssd_scan_kernels;
  if (isa == Isa::avx2) return avx2::ssd_scan_kernels;
#endif
  static_cast<void>(isa);
  return baseline::ssd_scan_kernels;
}

int64_t element_bytes(const Problem& p) {
  return p.dtype == Dtype::float64 ? 8 : 4;  // of the arithmetic
}

// How many heads of a group make a block: as many as leave `wanted` blocks. They share the work
// that depends on B and C only, as long as their states fit into a cache.
int64_t heads_per_block(const Problem& p, int64_t wanted) {
  constexpr int64_t most_bytes = 4 << 20;
  // Two states for each head and chunk of some 32 tokens.
  const int64_t states = p.headdim * p.state * element_bytes(p) * (p.tokens() / 32 + 1) * 2;
  const int64_t by_bytes = most_bytes / std::max<int64_t>(states, 1);
  const int64_t heads = std::min({p.batch * p.heads / wanted, by_bytes, p.heads / p.groups});
  return std::max<int64_t>(heads, 1);
}

std::vector<Block> divide(const Problem& p, int64_t most) {
  const int64_t heads = p.heads / p.groups;
  std::vector<Block> blocks;
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    for (int64_t group = 0; group < p.groups; ++group) {
      for (int64_t head = 0; head < heads; head += most) {
        blocks.push_back(
            {batch, group, group * heads + head, std::min(most, heads - head), head / most});
      }
    }
  }
  return blocks;
}

// Calls work(block, scratch) for every block. Blocks go to whichever thread is free: results do not
// depend on that, because no block reads what another wrote.
template <typename Work>
void for_each_block(const std::vector<Block>& blocks, size_t scratch_bytes, int threads,
                    const Work& work) {
  const int64_t count = static_cast<int64_t>(blocks.size());
  if (threads > count) threads = static_cast<int>(count);
  // Allocated here, because an exception must not leave a parallel region.
  std::vector<Buffer> scratch;
  for (int t = 0; t < threads; ++t) scratch.push_back(allocate(scratch_bytes));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) work(blocks[i], scratch[omp_get_thread_num()].get());
}

}  // namespace

void forward(Isa isa, const Problem& problem, const Results& results, int threads) {
  // Here no result depends on the division: two blocks a thread even out the load.
  const int64_t most = heads_per_block(problem, 2 * threads);
  const std::vector<Block> blocks = divide(problem, most);
  if (blocks.empty()) return;
  const Kernels& kernels = kernels_for(isa);
  for_each_block(blocks, kernels.forward_scratch(problem, most), threads,
                 [&](const Block& block, void* scratch) {
                   kernels.forward_block(problem, results, block, scratch);
                 });
}

void backward(Isa isa, const Problem& problem, const Gradients& gradients, int threads) {
  const Kernels& kernels = kernels_for(isa);
  // The sums over heads in the gradients of B and C depend on the division, so it must not depend
  // on the number of threads. Fewer blocks would leave cores idle, more have more shares to add up.
  constexpr int64_t wanted_blocks = 4;
  const int64_t most = heads_per_block(problem, wanted_blocks);
  const std::vector<Block> blocks = divide(problem, most);
  const int64_t blocks_per_group =
      std::max<int64_t>((problem.heads / problem.groups + most - 1) / most, 1);
  const int64_t matrix_bytes = problem.matrix_elements() * element_bytes(problem);
  // The gradient itself takes the first share where it has the type of the arithmetic.
  const bool in_place = problem.dtype == Dtype::float32 || problem.dtype == Dtype::float64;
  std::vector<Buffer> buffers;
  const auto shares = [&](void* gradient) -> Shares {
    if (gradient == nullptr) return {nullptr, nullptr};
    buffers.push_back(allocate(in_place ? 0 : matrix_bytes));
    void* first = in_place ? gradient : buffers.back().get();
    buffers.push_back(allocate((blocks_per_group - 1) * matrix_bytes));
    return {first, buffers.back().get()};
  };
  std::vector<double> a(problem.batch * problem.directions * problem.heads), bias(a.size());
  std::vector<double> skip(problem.batch * problem.heads * problem.headdim);
  const Partials partials = {blocks_per_group, shares(gradients.B), shares(gradients.C),
                             a.data(),         bias.data(),         skip.data()};
  if (!blocks.empty()) {
    for_each_block(blocks, kernels.backward_scratch(problem, most), threads,
                   [&](const Block& block, void* scratch) {
                     kernels.backward_block(problem, gradients, partials, block, scratch);
                   });
  }
  for (const Shares& sum : {partials.B, partials.C}) {
    // Without heads nobody writes them.
    if (blocks.empty() && sum.first != nullptr) std::memset(sum.first, 0, matrix_bytes);
  }
  kernels.reduce_parameters(problem, gradients, partials);
  if (in_place && blocks_per_group == 1) return;
  constexpr int64_t span = 1 << 14;
  const int64_t elements = problem.matrix_elements();
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t first = 0; first < elements; first += span) {
    kernels.reduce_matrices(problem, gradients, partials, first, std::min(first + span, elements));
  }
}

}  // namespace famseg::ssd_scan
