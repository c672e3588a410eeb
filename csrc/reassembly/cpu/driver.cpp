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
  int64_t of_pixel = taps * (p.c + 16 * p.groups);
  if (p.encoder != nullptr) {
    of_pixel +=
        taps * p.groups * p.encoder->channels * p.encoder->kernel_size * p.encoder->kernel_size;
  }
  const int64_t work = p.n * p.h * p.w * of_pixel;
  const int64_t worthwhile = work / kWorthAThread + 1;
  return Scratch(useful_threads(threads, std::min(worthwhile, blocks)), bytes, Fill::zeros);
}

// A problem with memory for its encoder's packed weights.
struct WithEncoder {
  WithEncoder(const Problem& p, const EncoderKernels& kernels)
      : memory(allocate(kernels.packed(p))), encoder(*p.encoder), problem(p) {
    encoder.packed = memory.get();
    problem.encoder = &encoder;
  }
  WithEncoder(const WithEncoder&) = delete;

  Buffer memory;
  Encoder encoder;
  Problem problem;
};

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

void upsample_forward(Isa isa, const Problem& problem, void* y, int threads) {
  if (problem.n == 0 || problem.c == 0 || problem.h == 0 || problem.w == 0) return;
  const ForwardKernels& kernels = FAMSEG_KERNELS(isa, reassembly_forward_kernels);
  const EncoderKernels& of_encoder = FAMSEG_KERNELS(isa, reassembly_encoder_kernels);
  const WithEncoder packed(problem, of_encoder);
  const Problem& p = packed.problem;
  const int64_t blocks = kernels.blocks(p);
  run_parallel(
      scratch_for(p, blocks, kernels.scratch(p), threads),
      Stage{of_encoder.pack_pieces(p),
            [&](int64_t piece, void*) { of_encoder.pack(p, false, piece); }},
      Stage{blocks, [&](int64_t block, void* scratch) { kernels.block(p, y, block, scratch); }});
}

void upsample_backward(Isa isa, const Problem& problem, const Gradients& gradients, int threads) {
  if (problem.n == 0 || problem.h == 0 || problem.w == 0) return;
  const EncoderKernels& of_encoder = FAMSEG_KERNELS(isa, reassembly_encoder_kernels);
  const WithEncoder packed(problem, of_encoder);
  const Problem& p = packed.problem;
  const int64_t pieces = of_encoder.pieces(p, gradients);
  const Buffer partial = allocate(of_encoder.partial(p, gradients));
  run_parallel(scratch_for(p, pieces, of_encoder.scratch(p, gradients), threads),
               Stage{of_encoder.pack_pieces(p),
                     [&](int64_t piece, void*) { of_encoder.pack(p, true, piece); }},
               Stage{pieces,
                     [&](int64_t piece, void* scratch) {
                       of_encoder.piece(p, gradients, partial.get(), piece, scratch);
                     }},
               Stage{of_encoder.sums(p, gradients), [&](int64_t sum, void* scratch) {
                       of_encoder.sum(p, gradients, partial.get(), sum, scratch);
                     }});
}

}  // namespace famseg::reassembly
