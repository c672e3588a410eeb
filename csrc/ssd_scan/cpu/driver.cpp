// Threads, memory, the division into blocks of heads, and the order of summation around the
// kernels.

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "ssd_scan/cpu/kernels.h"

namespace famseg::ssd_scan {
namespace {

const BlockKernel& block_kernel(Isa isa, const Problem& p, const Results& results) {
  const BlockKernel* tiles = FAMSEG_AMX_KERNELS(isa, ssd_scan_bf16_block);
  const bool y_only = results.final_states == nullptr;
  if (tiles != nullptr && p.dtype == Dtype::bfloat16 && y_only) return *tiles;
  return FAMSEG_KERNELS(isa, ssd_scan_forward_kernels).block;
}

int64_t element_bytes(const Problem& p) {
  return p.dtype == Dtype::float64 ? 8 : 4;  // of the arithmetic
}

// How many heads of a group make a block, if each takes `bytes` of memory and `most_bytes` are to
// be had.
int64_t heads_per_block(const Problem& p, int64_t bytes, int64_t most_bytes) {
  const int64_t fitting = most_bytes / std::max<int64_t>(bytes, 1);
  return std::max<int64_t>(std::min(fitting, p.heads / p.groups), 1);
}

// The blocks of all images and groups, in order, `most` heads each.
std::vector<Block> divide(const Problem& p, int64_t most) {
  const int64_t heads = p.heads / p.groups;
  std::vector<Block> blocks;
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    for (int64_t group = 0; group < p.groups; ++group) {
      for (int64_t head = 0; head < heads; head += most) {
        blocks.push_back({batch, group, group * heads + head, std::min(most, heads - head)});
      }
    }
  }
  return blocks;
}

// Heads share the work that depends on B and C only, as long as their states fit into a cache. No
// result depends on the division: two blocks a thread even out the load.
std::vector<Block> divide_forward(const Problem& p, int64_t chunks, int threads) {
  const int64_t states = p.headdim * p.d_state * element_bytes(p) * chunks;
  const int64_t fitting = heads_per_block(p, states, 2 << 20);
  return divide(p, std::clamp<int64_t>(p.batch * p.heads / (2 * threads), 1, fitting));
}

// What any of the blocks needs. All have as many heads but the last of each group: with fewer heads
// more chunks share a segment, so that it may need more than the others.
size_t scratch_bytes(const BlockKernel& kernel, const Problem& p,
                     const std::vector<Block>& blocks) {
  if (blocks.empty()) return 0;
  return std::max(kernel.scratch(p, blocks.front().heads), kernel.scratch(p, blocks.back().heads));
}

// Blocks go to whichever thread is free: results do not depend on that, because no block reads what
// another wrote.
void run_blocks(const BlockKernel& kernel, const Problem& p, const Destination& to, int64_t chunks,
                int threads) {
  const std::vector<Block> blocks = divide_forward(p, chunks, threads);
  const int64_t count = static_cast<int64_t>(blocks.size());
  run_parallel(
      Scratch(useful_threads(threads, count), scratch_bytes(kernel, p, blocks), Fill::nothing),
      Stage{count, [&](int64_t i, void* scratch) { kernel.run(p, to, blocks[i], scratch); }});
}

// All three stages of the backward pass for parts that do not depend on each other.
void run_parts(const BackwardKernels& kernels, const Problem& p, const Gradients& gradients,
               const Sums& sums, const std::vector<Part>& parts, int64_t chunks,
               const Scratch& scratch) {
  const int64_t sides = p.directions == 1 ? 1 : 2;
  const int64_t heads = parts[0].block.heads, count = static_cast<int64_t>(parts.size());
  run_parallel(
      scratch,
      Stage{count * heads * sides,
            [&](int64_t i, void* mine) {
              const Part& part = parts[i / (heads * sides)];
              kernels.scan_states(p, gradients, part, i % sides, i / sides % heads, mine);
            }},
      Stage{count * chunks,
            [&](int64_t i, void* mine) {
              kernels.chunk_gradients(p, gradients, sums, parts[i / chunks], i % chunks, mine);
            }},
      Stage{count * heads * sides, [&](int64_t i, void*) {
              const Part& part = parts[i / (heads * sides)];
              kernels.step_gradients(p, gradients, sums, part, i % sides, i / sides % heads);
            }});
}

// A word's exponent is all ones in infinities and NaN only: its lowest bit, added, then carries
// into the sign bit.
template <typename Word>
bool all_finite(const void* values, int64_t count, int mantissa_bits, int threads) {
  typedef Word Bits __attribute__((may_alias));
  constexpr int64_t block = 1 << 14;
  constexpr Word sign = static_cast<Word>(Word(1) << (8 * sizeof(Word) - 1));
  const Word one = static_cast<Word>(Word(1) << mantissa_bits);
  const Word exponent = static_cast<Word>(sign - one);
  const Bits* words = static_cast<const Bits*>(values);
  const int64_t blocks = (count + block - 1) / block;
  std::vector<uint8_t> bad(blocks);
  run_parallel(Scratch(useful_threads(threads, blocks), 0, Fill::nothing),
               Stage{blocks, [&](int64_t b, void*) {
                       Word seen = 0;
                       for (int64_t i = b * block; i < std::min((b + 1) * block, count); ++i) {
                         seen = static_cast<Word>(seen | ((words[i] & exponent) + one));
                       }
                       bad[b] = (seen & sign) != 0;
                     }});
  return std::find(bad.begin(), bad.end(), 1) == bad.end();
}

// `wide`: a tensor in the type of the arithmetic. Null is finite.
bool all_finite(const Problem& p, const void* values, int64_t count, bool wide, int threads) {
  if (values == nullptr) return true;
  if (p.dtype == Dtype::float64) return all_finite<uint64_t>(values, count, 52, threads);
  if (wide || p.dtype == Dtype::float32) return all_finite<uint32_t>(values, count, 23, threads);
  return all_finite<uint16_t>(values, count, p.dtype == Dtype::bfloat16 ? 7 : 10, threads);
}

}  // namespace

bool forward(Isa isa, const Problem& problem, const Results& results, int threads) {
  const Destination to = {results.y, results.final_states, nullptr, nullptr};
  const int64_t chunks = FAMSEG_KERNELS(isa, ssd_scan_forward_kernels).chunks(problem);
  run_blocks(block_kernel(isa, problem, results), problem, to, chunks, threads);
  return all_finite(problem, results.y, problem.elements(), false, threads) &&
         all_finite(problem, results.final_states, problem.state_elements(), true, threads);
}

bool backward(Isa isa, const Problem& problem, const Gradients& gradients, int threads) {
  const BackwardKernels& kernels = FAMSEG_KERNELS(isa, ssd_scan_backward_kernels);
  const ForwardKernels& forward = FAMSEG_KERNELS(isa, ssd_scan_forward_kernels);
  const int64_t chunks = forward.chunks(problem);
  if (gradients.z != nullptr) {
    // It needs y before the gate, the forward pass once more.
    const Destination to = {nullptr, nullptr, gradients.y, gradients.z};
    run_blocks(forward.block, problem, to, chunks, threads);
  }
  // The order of summation depends on this division, so it must not depend on the threads. 16 MB of
  // tape are still faster than a second block of heads with G and its gradients once more.
  const int64_t most = heads_per_block(problem, kernels.tape(problem, 1), 16 << 20);
  const std::vector<Block> blocks = divide(problem, most);
  const bool wide = problem.dtype == Dtype::float32 || problem.dtype == Dtype::float64;
  const int64_t axes = problem.directions == 4 ? 2 : 1;
  const bool shared = problem.matrices == 1;
  const int64_t group_heads = problem.heads / problem.groups;
  const int64_t matrix_parts =
      std::max<int64_t>((group_heads + most - 1) / most, 1) * (shared ? axes : 1);
  std::vector<Buffer> buffers;
  const auto sum = [&](void* gradient, int64_t parts, int64_t elements) -> void* {
    if (gradient == nullptr || wide || parts == 1) return nullptr;
    buffers.push_back(allocate(elements * sizeof(float)));
    return buffers.back().get();
  };
  const int64_t pixels = problem.batch * problem.tokens();
  std::vector<double> a(problem.batch * problem.directions * problem.heads), bias(a.size());
  std::vector<double> steps(a.size());
  std::vector<double> skip(problem.batch * problem.heads * problem.headdim);
  const Sums sums = {sum(gradients.x, axes, pixels * problem.heads * problem.headdim),
                     sum(gradients.B, matrix_parts, problem.matrix_elements()),
                     sum(gradients.C, matrix_parts, problem.matrix_elements()),
                     a.data(),
                     bias.data(),
                     steps.data(),
                     skip.data()};
  if (group_heads == 0) {
    // Nobody writes these.
    const int64_t bytes = problem.matrix_elements() * (wide ? element_bytes(problem) : 2);
    for (void* gradient : {gradients.B, gradients.C}) {
      if (gradient != nullptr) std::memset(gradient, 0, bytes);
    }
  }

  // As many parts at once as keep the threads busy and their tapes in the cache.
  const int64_t tape_bytes = static_cast<int64_t>(kernels.tape(problem, most));
  const int64_t pairs = problem.batch * problem.groups;
  const int64_t wanted = std::max<int64_t>((8 << 20) / std::max<int64_t>(tape_bytes, 1),
                                           (threads + 2 * most - 1) / (2 * most));
  const int64_t at_once = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(pairs, 1));
  std::vector<Buffer> tapes;
  for (int64_t i = 0; i < at_once; ++i) tapes.push_back(allocate(tape_bytes));
  const Scratch scratch(threads, kernels.scratch(problem), Fill::nothing);
  const int64_t group_blocks = (group_heads + most - 1) / most;
  for (int64_t k = 0; k < group_blocks; ++k) {
    for (int64_t axis = 0; axis < axes; ++axis) {
      const bool first = k == 0 && (axis == 0 || !shared);
      const bool last = k == group_blocks - 1 && (axis == axes - 1 || !shared);
      for (int64_t pair = 0; pair < pairs; pair += at_once) {
        std::vector<Part> parts;
        for (int64_t i = pair; i < std::min(pair + at_once, pairs); ++i) {
          parts.push_back({blocks[i * group_blocks + k], axis, first, last, tapes[i - pair].get()});
        }
        run_parts(kernels, problem, gradients, sums, parts, chunks, scratch);
      }
    }
  }
  kernels.parameter_gradients(problem, gradients, sums);

  const auto finite = [&](const void* gradient, int64_t count) {
    return all_finite(problem, gradient, count, false, threads);
  };
  // Only what is finite is 0 without itself; not std::isfinite, which does not know the wider
  // number of benchmarks/multiplications.h.
  return std::all_of(steps.begin(), steps.end(), [](double sum) { return sum - sum == 0; }) &&
         finite(gradients.x, problem.elements()) && finite(gradients.z, problem.elements()) &&
         finite(gradients.B, problem.matrix_elements()) &&
         finite(gradients.C, problem.matrix_elements());
}

}  // namespace famseg::ssd_scan
