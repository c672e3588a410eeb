// Settings of the emulation that tests/test_cuda_text.py builds the CUDA module with.

#include <dlfcn.h>

#include "common/cuda_on_cpu.h"

// Another GPU, of which nothing has been asked yet.
extern "C" void emulate(bool reverse_order, size_t shared_per_block, size_t shared_per_processor,
                        size_t static_shared) {
  cuda_on_cpu::reverse_order = reverse_order;
  cuda_on_cpu::device = {shared_per_block, shared_per_processor, static_shared};
  cuda_on_cpu::allowed.clear();
  cuda_on_cpu::interruption = nullptr;
  cuda_on_cpu::only_recorded = false;
}

// What another thread does between what the next launch sets and the launch itself.
extern "C" void interrupt(void (*callback)()) {
  cuda_on_cpu::interruption = callback;
}

// Launches from here to the next call of `emulate` are recorded and not run.
extern "C" void record() {
  cuda_on_cpu::launches.clear();
  cuda_on_cpu::only_recorded = true;
}

extern "C" size_t recorded() {
  return cuda_on_cpu::launches.size();
}

// The symbol of a recorded launch's kernel, its threads and its dynamic shared memory.
extern "C" const char* recorded_launch(size_t index, unsigned* threads, size_t* shared_bytes) {
  const cuda_on_cpu::Launch& launch = cuda_on_cpu::launches.at(index);
  *threads = launch.threads;
  *shared_bytes = launch.shared_bytes;
  Dl_info found;
  return dladdr(launch.kernel, &found) != 0 ? found.dli_sname : nullptr;
}

// Its parameters, of which there are `size` bytes; and the blocks along x, y and z.
extern "C" const void* recorded_parameters(size_t index, size_t* size, unsigned* grid) {
  const cuda_on_cpu::Launch& launch = cuda_on_cpu::launches.at(index);
  *size = launch.parameters.size();
  grid[0] = launch.grid.x;
  grid[1] = launch.grid.y;
  grid[2] = launch.grid.z;
  return launch.parameters.data();
}
