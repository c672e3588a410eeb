// Lets g++ compile the text of CUDA kernels and their launchers, and run them on a CPU, for tests
// without a GPU (tests/test_cuda_text.py); the twin of cuda_on_gpu.cuh.
//
// Threads of a block are fibers: each runs until it waits for its block (__syncthreads) or for its
// warp (a shuffle, a matrix instruction), then the next one does. Running them once in forward and
// once in reverse order shows a missing barrier as a difference; a barrier that some threads miss
// is an error. Shared memory is a heap block of the size asked for, in 128-byte steps, so that
// AddressSanitizer sees an access beyond it. Blocks run one after another.
//
// An access at an address that is no multiple of its size ends a GPU's context, and is nothing to
// x86. Compiled with -fsanitize=alignment, every access of a kernel text is checked: the handler is
// here, no library is needed.
//
// No atomics and no asynchronous copies; no timing.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/dtype.h"

#ifndef FAMSEG_ISA
#define FAMSEG_ISA baseline
#endif
#include "common/half.h"

#define __global__
#define __device__
#define __host__
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

// CUDA's own; of one type, which is stricter.
template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

namespace cuda_on_cpu {

enum class Waits { no, for_warp, for_block };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  unsigned index;
  Waits waits = Waits::no;
  bool done = false;
};

// What a lane shows the other lanes of its warp.
struct Exchange {
  unsigned words[8];
  const void* address;
};

inline thread_local ucontext_t scheduler;
inline thread_local Fiber* running = nullptr;  // null outside of kernels
inline thread_local std::string fault;         // what made the running thread give up
inline thread_local const std::function<void()>* kernel = nullptr;
inline thread_local std::vector<Exchange> exchanges;
inline thread_local char* dynamic_shared = nullptr;
// The order in which threads run between two barriers.
inline bool reverse_order = false;

// Those of an H200; tests lower them to have planes cut up.
struct Device {
  size_t shared_per_block = 227 * 1024, shared_per_processor = 228 * 1024;
  size_t static_shared = 0;  // of every kernel: g++ does not tell
};
inline Device device;
// What each kernel's blocks may have of dynamic shared memory, where it was set.
inline std::map<const void*, size_t> allowed;
// Called once, by the next launch, just before it: what another thread does at this moment.
inline void (*interruption)() = nullptr;

// What a launcher asked for. Where launches are only recorded, a GPU's occupancy and instructions can
// be counted for shapes that would take the fibers hours.
struct Launch {
  const void* kernel;
  unsigned threads;
  size_t shared_bytes;
  dim3 grid;
  std::string parameters;  // the kernel's, as a GPU finds them in its constant memory
};

// Each at a multiple of its alignment, as CUDA lays them out.
template <typename... Parameters>
std::string laid_out(const Parameters&... parameters) {
  std::string bytes;
  const auto add = [&](const auto& parameter) {
    const size_t alignment = alignof(std::decay_t<decltype(parameter)>);
    bytes.resize((bytes.size() + alignment - 1) / alignment * alignment);
    bytes.append(reinterpret_cast<const char*>(&parameter), sizeof(parameter));
  };
  (add(parameters), ...);
  return bytes;
}
inline std::vector<Launch> launches;
inline bool only_recorded = false;

inline void wait(Waits what) {
  running->waits = what;
  swapcontext(&running->context, &scheduler);
}

inline std::string written(const dim3& place) {
  return "(" + std::to_string(place.x) + ", " + std::to_string(place.y) + ", " +
         std::to_string(place.z) + ")";
}

// Ends the running thread; the launch throws `what`. A fiber has nobody above it who would catch an
// exception, and what calls the sanitizer's handler is compiled as if that threw none: so the fiber
// is left as it is, for good.
[[noreturn]] inline void give_up(const std::string& what) {
  if (running == nullptr) {
    std::fprintf(stderr, "%s, in no kernel\n", what.c_str());
    std::abort();
  }
  fault = what + ", thread " + written(threadIdx) + " of block " + written(blockIdx);
  swapcontext(&running->context, &scheduler);
  std::abort();
}

// What the compiler tells the handler of an access (gcc/ubsan.c: ubsan_type_mismatch_data).
struct Access {
  const char* file;
  uint32_t line, column;
  struct Type {
    uint16_t kind, info;
    char name[1];  // as many as it takes, and a zero
  }* type;
  unsigned char log_alignment, kind;
};

inline void run_thread() {
  (*kernel)();
  running->done = true;  // uc_link then returns to the scheduler
}

// Lets those go on for whom everybody has come; false when nobody can.
inline bool release(std::vector<Fiber>& fibers) {
  bool released = false, all_at_barrier = true;
  for (size_t warp = 0; warp < fibers.size(); warp += 32) {
    const size_t end = warp + 32 < fibers.size() ? warp + 32 : fibers.size();
    bool all_at_warp = true;
    for (size_t t = warp; t < end; ++t) {
      const bool at_end = fibers[t].done;
      all_at_warp = all_at_warp && (at_end || fibers[t].waits == Waits::for_warp);
      all_at_barrier = all_at_barrier && (at_end || fibers[t].waits == Waits::for_block);
    }
    for (size_t t = warp; t < end && all_at_warp; ++t) {
      fibers[t].waits = Waits::no;
      released = released || !fibers[t].done;
    }
  }
  for (size_t t = 0; t < fibers.size() && all_at_barrier; ++t) {
    fibers[t].waits = Waits::no;
    released = released || !fibers[t].done;
  }
  return released;
}

// Runs `body`, a call of the kernel, for every thread of the grid.
inline void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  constexpr size_t stack_bytes = 128 * 1024;
  static thread_local std::vector<Fiber> pool;
  const size_t count = size_t(block.x) * block.y * block.z;
  if (pool.size() != count) pool = std::vector<Fiber>(count);
  for (Fiber& fiber : pool) {
    if (!fiber.stack) fiber.stack.reset(new char[stack_bytes]);
  }
  gridDim = grid;
  blockDim = block;
  kernel = &body;
  exchanges.resize((count + 31) / 32 * 32);
  for (size_t b = 0; b < size_t(grid.x) * grid.y * grid.z; ++b) {
    blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    // A new one for each block, filled with NaNs: nothing of another block can be read by mistake.
    std::unique_ptr<char, void (*)(void*)> shared(
        static_cast<char*>(std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128)), std::free);
    for (size_t i = 0; i < shared_bytes; ++i) shared.get()[i] = char(0xff);
    dynamic_shared = shared.get();
    for (size_t t = 0; t < count; ++t) {
      Fiber& fiber = pool[t];
      fiber.done = false;
      fiber.waits = Waits::no;
      fiber.index = unsigned(t);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = stack_bytes;
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, run_thread, 0);
    }
    do {
      for (size_t k = 0; k < count; ++k) {
        Fiber& fiber = pool[reverse_order ? count - 1 - k : k];
        if (fiber.done || fiber.waits != Waits::no) continue;
        running = &fiber;
        threadIdx = {fiber.index % block.x, fiber.index / block.x % block.y,
                     fiber.index / block.x / block.y};
        swapcontext(&scheduler, &fiber.context);
        running = nullptr;
        if (!fault.empty()) throw std::runtime_error(std::exchange(fault, {}));
      }
    } while (release(pool));
    for (const Fiber& fiber : pool) {
      if (!fiber.done) throw std::logic_error("threads wait at different barriers");
    }
  }
}

inline Exchange& mine() {
  return exchanges[running->index];
}
inline const Exchange& lane(unsigned l) {
  return exchanges[running->index / 32 * 32 + l];
}

}  // namespace cuda_on_cpu

// Its name is the compiler's; that of -fno-sanitize-recover, after which nothing goes on.
extern "C" __attribute__((visibility("hidden"), used, noinline)) inline void
__ubsan_handle_type_mismatch_v1_abort(void* data, void* address) {
  const auto& access = *static_cast<const cuda_on_cpu::Access*>(data);
  char place[32];
  std::snprintf(place, sizeof place, "%p", address);
  cuda_on_cpu::give_up(
      std::string("misaligned address ") + place + " of " + access.type->name +
      ", which must be at a multiple of " + std::to_string(1u << access.log_alignment) + ": " +
      (access.file == nullptr ? "?" : access.file) + ":" + std::to_string(access.line));
}

inline void __syncthreads() {
  cuda_on_cpu::wait(cuda_on_cpu::Waits::for_block);
}

inline int __syncthreads_or(int value) {
  using namespace cuda_on_cpu;
  mine().words[0] = value != 0;
  __syncthreads();
  unsigned any = 0;
  for (unsigned t = 0; t < blockDim.x; ++t) any |= exchanges[t].words[0];
  __syncthreads();
  return static_cast<int>(any);
}

inline void __syncwarp() {
  cuda_on_cpu::wait(cuda_on_cpu::Waits::for_warp);
}

inline float __shfl_xor_sync(unsigned, float value, unsigned mask) {
  using namespace cuda_on_cpu;
  mine().words[0] = famseg::baseline::bits_of(value);
  __syncwarp();
  const unsigned other = lane(running->index % 32 ^ mask).words[0];
  __syncwarp();
  return famseg::baseline::float_of(other);
}

// The few calls of the runtime that the bindings and the launchers make.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
constexpr int CUDART_VERSION = 0;
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "invalid argument";
}
inline const char* cudaGetErrorName(cudaError_t status) {
  return status == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidValue";
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const cuda_on_cpu::Device& device = cuda_on_cpu::device;
  *value = static_cast<int>(attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor
                                ? device.shared_per_processor
                                : device.shared_per_block);
  return cudaSuccess;
}

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->sharedSizeBytes = cuda_on_cpu::device.static_shared;
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  const cuda_on_cpu::Device& device = cuda_on_cpu::device;
  if (value < 0 || value + device.static_shared > device.shared_per_block) {
    return cudaErrorInvalidValue;
  }
  cuda_on_cpu::allowed[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_on_cpu;
  if (const auto other_thread = std::exchange(interruption, nullptr)) other_thread();
  const void* symbol = reinterpret_cast<const void*>(kernel);
  const size_t unasked = 48 * 1024 - device.static_shared;
  const auto asked = allowed.find(symbol);
  if (config->dynamicSmemBytes > (asked == allowed.end() ? unasked : asked->second)) {
    return cudaErrorInvalidValue;
  }
  if (only_recorded) {
    launches.push_back({symbol, config->blockDim.x, config->dynamicSmemBytes, config->gridDim,
                        laid_out<Parameters...>(arguments...)});
  } else {
    cuda_on_cpu::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                        [&] { kernel(arguments...); });
  }
  return cudaSuccess;
}

namespace famseg {

using baseline::Bfloat16;
using baseline::Float16;
using baseline::narrow;
using baseline::widen;

inline void* shared_memory() {
  return cuda_on_cpu::dynamic_shared;
}

// Two numbers in a register, the first in the lower half.
template <typename T>
unsigned pack(float first, float second) {
  T low, high;
  narrow(low, first);
  narrow(high, second);
  return low.bits | static_cast<unsigned>(high.bits) << 16;
}

template <typename T>
float unpack(unsigned pair, int which) {
  return widen(T{static_cast<uint16_t>(pair >> 16 * which)});
}

// ldmatrix: four 8 x 8 matrices of 16-bit numbers; lane 8 m + r has the address of row r of matrix
// m, lane l gets elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of each, or, transposed,
// (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4).
template <bool TRANSPOSED>
void load_matrices(unsigned (&registers)[4], const void* row) {
  using namespace cuda_on_cpu;
  if (reinterpret_cast<size_t>(row) % 16 != 0) give_up("misaligned address of ldmatrix");
  mine().address = row;
  __syncwarp();
  const unsigned l = running->index % 32, slow = l / 4, fast = 2 * (l % 4);
  for (unsigned m = 0; m < 4; ++m) {
    unsigned pair = 0;
    for (unsigned e = 0; e < 2; ++e) {
      const unsigned r = TRANSPOSED ? fast + e : slow, c = TRANSPOSED ? slow : fast + e;
      const auto* from = static_cast<const uint16_t*>(lane(8 * m + r).address);
      pair |= static_cast<unsigned>(from[c]) << 16 * e;
    }
    registers[m] = pair;
  }
  __syncwarp();
}

// mma.sync.m16n8k16: sum (16 x 8) += a (16 x 16) b (16 x 8); which lane holds what is in the PTX
// manual, "Matrix fragments for mma.m16n8k16 with floating point type".
template <typename T>
void multiply_add(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  using namespace cuda_on_cpu;
  for (int i = 0; i < 4; ++i) mine().words[i] = a[i];
  for (int i = 0; i < 2; ++i) mine().words[4 + i] = b[i];
  __syncwarp();
  const unsigned l = running->index % 32;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = l / 4, upper = i / 2, column = 2 * (l % 4) + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned quad = k % 8 / 2, half = k / 8;
      sum[i] += unpack<T>(lane(4 * row + quad).words[upper + 2 * half], k % 2) *
                unpack<T>(lane(4 * column + quad).words[4 + half], k % 2);
    }
  }
  __syncwarp();
}

}  // namespace famseg
