// How the named arguments of Python's calls become a Problem, for both modules.
#pragma once

#include "common/bind.h"
#include "reassembly/problem.h"

namespace famseg::reassembly {

// Binds run(problem, more...). Its arguments are those that make a Problem, and `names` for more.
// All are named: two addresses in the wrong order would be wrong memory without an error.
template <typename... More, typename... Names>
void bind_problem(py::module_& m, const char* name, void (*run)(const Problem&, More...),
                  const char* doc, const Names&... names) {
  m.def(
      name,
      [run](const std::string& dtype, bool softmax, const Shape& shape, int64_t kernel_size,
            int64_t scale, int64_t groups, Address x, Address weights, bool x_channels_last,
            bool weights_channels_last, More... more) {
        const auto [n, c, h, w] = shape;
        Problem problem;
        problem.dtype = dtype_named(dtype);
        problem.softmax = softmax;
        problem.n = n;
        problem.c = c;
        problem.h = h;
        problem.w = w;
        problem.kernel_size = kernel_size;
        problem.scale = scale;
        problem.groups = groups;
        problem.x = pointer(x);
        problem.weights = pointer(weights);
        problem.x_channels_last = x_channels_last;
        problem.weights_channels_last = weights_channels_last;
        run(problem, more...);
      },
      py::kw_only(), py::arg("dtype"), py::arg("softmax"), py::arg("shape"), py::arg("kernel_size"),
      py::arg("scale"), py::arg("groups"), py::arg("x"), py::arg("weights"),
      py::arg("x_channels_last"), py::arg("weights_channels_last"), names..., doc);
}

}  // namespace famseg::reassembly
