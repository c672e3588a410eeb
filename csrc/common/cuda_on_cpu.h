// Lets g++ compile the text of a CUDA kernel and run it on a CPU, for tests without a GPU.
//
// Threads of a block are fibers: each runs until __syncthreads(), then the next one does. Running
// them once in forward and once in reverse order shows a missing barrier as a difference. Blocks
// run one after another, so that a __shared__ variable can be a static one.
//
// No warps, atomics, tensor cores or asynchronous copies.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 index;
  bool done = false;
};

inline thread_local ucontext_t scheduler;
inline thread_local Fiber* running = nullptr;
inline thread_local const std::function<void()>* kernel = nullptr;

inline void run_thread() {
  (*kernel)();
  running->done = true;  // uc_link then returns to the scheduler
}

// Runs `body`, a call of the kernel, for every thread of the grid.
inline void launch(dim3 grid, dim3 block, bool reverse, const std::function<void()>& body) {
  constexpr size_t stack_bytes = 64 * 1024;
  gridDim = grid;
  blockDim = block;
  kernel = &body;
  std::vector<Fiber> fibers(size_t(block.x) * block.y * block.z);
  for (Fiber& fiber : fibers) fiber.stack.reset(new char[stack_bytes]);
  for (size_t b = 0; b < size_t(grid.x) * grid.y * grid.z; ++b) {
    blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    for (size_t t = 0; t < fibers.size(); ++t) {
      Fiber& fiber = fibers[t];
      fiber.done = false;
      fiber.index = {unsigned(t % block.x), unsigned(t / block.x % block.y),
                     unsigned(t / block.x / block.y)};
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = stack_bytes;
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, run_thread, 0);
    }
    // Each round takes every thread from one barrier to the next.
    for (bool waiting = true; waiting;) {
      waiting = false;
      for (size_t k = 0; k < fibers.size(); ++k) {
        Fiber& fiber = fibers[reverse ? fibers.size() - 1 - k : k];
        if (fiber.done) continue;
        running = &fiber;
        threadIdx = fiber.index;
        swapcontext(&scheduler, &fiber.context);
        waiting = waiting || !fiber.done;
      }
    }
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() {
  swapcontext(&cuda_on_cpu::running->context, &cuda_on_cpu::scheduler);
}
