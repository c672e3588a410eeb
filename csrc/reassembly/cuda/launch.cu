#include <algorithm>

#include "common/cuda.h"
#include "reassembly/cuda/launch.h"
// After the conversions of common/cuda.h: the kernels find them where their templates are defined.
#include "reassembly/cuda/backward.cuh"
#include "reassembly/cuda/forward.cuh"

namespace famseg::reassembly {
namespace {

std::string describe(const Problem& p) {
  return "x (" + std::to_string(p.n) + ", " + std::to_string(p.c) + ", " + std::to_string(p.h) +
         ", " + std::to_string(p.w) + "), kernel_size " + std::to_string(p.kernel_size) +
         ", scale " + std::to_string(p.scale) + ", groups " + std::to_string(p.groups);
}

const char* name(const Problem& p) {
  return p.softmax ? "reassemble" : "carafe";
}

bool is_tuned(const Shape& s) {
  return s.kernel_size == kKernel && s.scale == kScale;
}

long long tiles(const Shape& s) {
  return s.n * s.groups * ((s.h + kTileHeight - 1) / kTileHeight) *
         ((s.w + kTileWidth - 1) / kTileWidth);
}

// Blocks that share a tile's channels, each reading the weights again: where there are too few
// tiles to fill a GPU of 132 processors twice.
int splits(const Shape& s) {
  const long long chunks = (s.c / s.groups + kStaged - 1) / kStaged;
  const long long wanted = (2 * 132 + tiles(s) - 1) / tiles(s);
  const long long some = std::min(wanted, chunks);
  // So many that none of them has no channel.
  const long long share = (s.c / s.groups + some - 1) / some;
  return static_cast<int>((s.c / s.groups + share - 1) / share);
}

long long chunks(const Shape& s) {
  return (s.c / s.groups + kChannels - 1) / kChannels;
}

// The plain kernels stride over what a grid of 2^30 blocks leaves.
template <typename... Parameters, typename... Arguments>
void launch_any(long long total, void* stream, void (*kernel)(Parameters...),
                const Arguments&... arguments) {
  const long long blocks = (total + kPlainThreads - 1) / kPlainThreads;
  const unsigned grid = static_cast<unsigned>(std::min(blocks, 1LL << 30));
  launch(dim3{grid, 1, 1}, kPlainThreads, 0, stream, kernel, arguments...);
}

template <typename T, bool SOFTMAX>
void launch_forward(const Problem& p, const Shape& shape, void* y, void* stream) {
  const auto* x = static_cast<const T*>(p.x);
  const auto* weights = static_cast<const T*>(p.weights);
  auto* to = static_cast<T*>(y);
  if (is_tuned(shape)) {
    const int parts = splits(shape);
    launch(grid_of(tiles(shape) * parts), kThreads, 0, stream, forward_tuned<T, SOFTMAX>, x,
           weights, to, shape, parts);
  } else {
    const long long s2 = static_cast<long long>(p.scale) * p.scale;
    launch_any(p.n * p.groups * chunks(shape) * p.h * p.w * s2, stream, forward_any<T, SOFTMAX>, x,
               weights, to, shape);
  }
}

template <typename T, bool SOFTMAX>
void launch_backward(const Problem& p, const Shape& shape, const Gradients& gradients,
                     float* log_sums, void* stream) {
  const auto* x = static_cast<const T*>(p.x);
  const auto* weights = static_cast<const T*>(p.weights);
  const auto* y_gradient = static_cast<const T*>(gradients.y);
  auto* x_gradient = static_cast<T*>(gradients.x);
  auto* weights_gradient = static_cast<T*>(gradients.weights);
  const long long s2 = static_cast<long long>(p.scale) * p.scale;
  if (weights_gradient != nullptr || SOFTMAX) {  // the gradient of x needs the softmaxes' sums
    if (is_tuned(shape)) {
      launch(grid_of(tiles(shape)), kThreads, 0, stream, gradient_weights_tuned<T, SOFTMAX>, x,
             weights, y_gradient, weights_gradient, log_sums, shape);
    } else {
      launch_any(p.n * p.groups * s2 * p.h * p.w, stream, gradient_weights_any<T, SOFTMAX>, x,
                 weights, y_gradient, weights_gradient, log_sums, shape);
    }
  }
  if (x_gradient == nullptr) return;
  if (is_tuned(shape)) {
    const int parts = splits(shape);
    launch(grid_of(tiles(shape) * parts), kThreads, 0, stream, gradient_x_tuned<T, SOFTMAX>,
           weights, log_sums, y_gradient, x_gradient, shape, parts);
  } else {
    launch_any(p.n * p.groups * chunks(shape) * p.h * p.w, stream, gradient_x_any<T, SOFTMAX>,
               weights, log_sums, y_gradient, x_gradient, shape);
  }
}

// Calls body with a number of the element type and with std::true_type's like for softmax.
template <bool VALUE>
struct Flag {
  static constexpr bool value = VALUE;
};

template <typename Body>
void for_kind(const Problem& p, const Body& body) {
  if (p.x_channels_last || p.weights_channels_last) {
    throw std::runtime_error("no kernel for channels_last");
  }
  for_type(p.dtype, [&](auto element) {
    return p.softmax ? body(element, Flag<true>()) : body(element, Flag<false>());
  });
}

bool is_empty(const Problem& p) {
  return p.n == 0 || p.c == 0 || p.h == 0 || p.w == 0;
}

Shape shape_of(const Problem& p) {
  return {p.n,
          p.c,
          p.h,
          p.w,
          static_cast<int>(p.kernel_size),
          static_cast<int>(p.scale),
          static_cast<int>(p.groups)};
}

}  // namespace

void forward_cuda(const Problem& problem, void* y, void* stream) {
  if (is_empty(problem)) return;
  explained(
      name(problem), [&] { return describe(problem); },
      [&] {
        for_kind(problem, [&](auto element, auto softmax) {
          launch_forward<decltype(element), decltype(softmax)::value>(problem, shape_of(problem), y,
                                                                      stream);
        });
      });
}

void backward_cuda(const Problem& problem, const Gradients& gradients, float* log_sums,
                   void* stream) {
  if (is_empty(problem)) return;
  explained(
      name(problem), [&] { return describe(problem); },
      [&] {
        for_kind(problem, [&](auto element, auto softmax) {
          launch_backward<decltype(element), decltype(softmax)::value>(problem, shape_of(problem),
                                                                       gradients, log_sums, stream);
        });
      });
}

}  // namespace famseg::reassembly
