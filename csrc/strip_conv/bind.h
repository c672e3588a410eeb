// How the named arguments of Python's calls become a Problem and its Gradients, for both modules.
#pragma once

#include "common/bind.h"
#include "strip_conv/problem.h"

namespace famseg::strip_conv {

using Addresses = std::vector<Address>;  // one a branch, or none

inline void* pointer_at(const Addresses& addresses, size_t branch) {
  return addresses.empty() ? nullptr : pointer(addresses.at(branch));
}

// Binds run(problem, more...). Its arguments are those that make a Problem, and `names` for more.
// All are named: two addresses in the wrong order would be wrong memory without an error.
template <typename Result, typename... More, typename... Names>
void bind_problem(py::module_& m, const char* name, Result (*run)(const Problem&, More...),
                  const char* doc, const Names&... names) {
  m.def(
      name,
      [run](const std::string& dtype, const Shape& shape, bool channels_last, Address x,
            Address square_weight, Address square_bias, int square_size,
            const Addresses& row_weights, const Addresses& row_biases,
            const std::vector<int>& row_sizes, const Addresses& col_weights,
            const Addresses& col_biases, const std::vector<int>& col_sizes, More... more) {
        const size_t count = row_weights.size();
        std::vector<Branch> branches(count);
        for (size_t i = 0; i < count; ++i) {
          branches[i].row = {pointer(row_weights[i]), pointer_at(row_biases, i), row_sizes.at(i)};
          branches[i].col = {pointer(col_weights.at(i)), pointer_at(col_biases, i),
                             col_sizes.at(i)};
        }
        const auto [n, c, h, w] = shape;
        Problem problem;
        problem.dtype = dtype_named(dtype);
        problem.n = n;
        problem.c = c;
        problem.h = h;
        problem.w = w;
        problem.channels_last = channels_last;
        problem.x = pointer(x);
        problem.square = {pointer(square_weight), pointer(square_bias), square_size};
        problem.branches = branches.data();
        problem.branch_count = static_cast<int64_t>(count);
        return run(problem, more...);
      },
      py::kw_only(), py::arg("dtype"), py::arg("shape"), py::arg("channels_last"), py::arg("x"),
      py::arg("square_weight"), py::arg("square_bias"), py::arg("square_size"),
      py::arg("row_weights"), py::arg("row_biases"), py::arg("row_sizes"), py::arg("col_weights"),
      py::arg("col_biases"), py::arg("col_sizes"), names..., doc);
}

inline std::vector<BranchGradient> branch_gradients(const Problem& problem,
                                                    const Addresses& row_weights,
                                                    const Addresses& row_biases,
                                                    const Addresses& col_weights,
                                                    const Addresses& col_biases) {
  std::vector<BranchGradient> gradients(problem.branch_count);
  for (size_t i = 0; i < gradients.size(); ++i) {
    gradients[i].row = {pointer_at(row_weights, i), pointer_at(row_biases, i)};
    gradients[i].col = {pointer_at(col_weights, i), pointer_at(col_biases, i)};
  }
  return gradients;
}

}  // namespace famseg::strip_conv
