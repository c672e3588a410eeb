// Pieces of work over threads, with scratch memory for each thread.
//
// A piece goes to whichever thread is free. Results do not depend on that, because no piece reads
// what another piece of its stage wrote.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/buffer.h"

namespace famseg {

enum class Fill { nothing, zeros };

// As many pieces of memory as threads are to run. Allocated by the caller's thread, because an
// exception must not leave a parallel region. Filled by the thread that uses it when a run begins,
// so that its pages are near that core.
struct Scratch {
  Scratch(int threads, size_t bytes, Fill fill) : bytes(bytes), fill(fill) {
    for (int t = 0; t < threads; ++t) of_thread.push_back(allocate(bytes));
  }

  size_t bytes;
  Fill fill;
  std::vector<Buffer> of_thread;
};

// No more threads than pieces, and no fewer than one.
inline int useful_threads(int threads, int64_t pieces) {
  return static_cast<int>(std::clamp<int64_t>(pieces, 1, threads));
}

// work(piece, scratch) for all piece < count.
template <typename Work>
struct Stage {
  int64_t count;
  Work work;
};
template <typename Work>
Stage(int64_t, Work) -> Stage<Work>;

// Within a parallel region. A stage begins when all pieces of the one before it are done.
template <typename First, typename... Rest>
void run_stages(void* scratch, const First& first, const Rest&... rest) {
  // nowait: after the last stage the end of the region is the barrier.
#pragma omp for schedule(dynamic) nowait
  for (int64_t piece = 0; piece < first.count; ++piece) first.work(piece, scratch);
  if constexpr (sizeof...(rest) > 0) {
#pragma omp barrier
    run_stages(scratch, rest...);
  }
}

template <typename... Stages>
void run_parallel(const Scratch& scratch, const Stages&... stages) {
  const int threads = static_cast<int>(scratch.of_thread.size());
#pragma omp parallel num_threads(threads)
  {
    void* mine = scratch.of_thread[omp_get_thread_num()].get();
    if (scratch.fill == Fill::zeros) std::memset(mine, 0, scratch.bytes);
    run_stages(mine, stages...);
  }
}

}  // namespace famseg
