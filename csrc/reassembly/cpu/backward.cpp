// The backward pass of reassemble and carafe for one instruction set (see common/simd.h: this file
// is compiled once for each).

#include "reassembly/cpu/backward_block.h"

namespace famseg::FAMSEG_ISA {
namespace {

template <typename S, typename T>
void compute_plain_block(const Problem& p, const Gradients& gradients, int64_t number,
                         void* scratch) {
  const Geometry g = block_geometry<T>(p, gradients);
  Arena arena{static_cast<char*>(scratch)};
  const Space<T> space = take_space<T>(g, arena);
  const Block block = block_at(g, number);
  compute_block<S, T>(p, gradients, g, space, block, [&](const auto& during) {
    load_weights<S>(p, g, block.index, block.region.grown(g.halo, g.halo_side),
                    shifted(space.weights, -g.halo_side), during);
  });
  if (gradients.weights == nullptr) return;
  // All phases of a tap of a mask are one channel and have one gradient each.
  store_planes(g, space.weights_gradient, p.softmax ? g.taps * g.phases : g.taps, block.region,
               weights_image(p, g, static_cast<S*>(gradients.weights), block.index));
}

int64_t blocks(const Problem& p, const Gradients& gradients) {
  return by_dtype(p.dtype, [&](auto element) {
    return block_count(p, block_geometry<Compute<decltype(element)>>(p, gradients));
  });
}

size_t scratch(const Problem& p, const Gradients& gradients) {
  return by_dtype(p.dtype, [&](auto element) {
    using T = Compute<decltype(element)>;
    Arena counting;
    take_space<T>(block_geometry<T>(p, gradients), counting);
    return static_cast<size_t>(counting.used);
  });
}

void block(const Problem& p, const Gradients& gradients, int64_t number, void* scratch) {
  by_dtype(p.dtype, [&](auto element) {
    using S = decltype(element);
    compute_plain_block<S, Compute<S>>(p, gradients, number, scratch);
  });
}

}  // namespace

// `extern` because a const object is otherwise local to its file.
extern const reassembly::BackwardKernels reassembly_backward_kernels;
const reassembly::BackwardKernels reassembly_backward_kernels = {blocks, scratch, block};

}  // namespace famseg::FAMSEG_ISA
