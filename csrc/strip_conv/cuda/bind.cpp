#include "common/bind.h"

#include <utility>

#include "strip_conv/cuda/launch.h"

namespace famseg::strip_conv {
namespace {

// (weight, bias, size)
using Square = std::tuple<Address, Address, int>;
// (row weight, row bias, row size, column weight, column bias, column size)
using Branch = std::tuple<Address, Address, int, Address, Address, int>;
// Gradients (row weight, row bias, column weight, column bias)
using BranchGradient = std::tuple<Address, Address, Address, Address>;

CudaProblem strip_problem(const std::string& dtype, const Shape& shape, Address x,
                          const Square& square, const std::vector<Branch>& branches) {
  const auto [n, c, h, w] = shape;
  const auto [weight, bias, size] = square;
  CudaProblem problem = {dtype_named(dtype), n,    c, h, w, pointer(x), pointer(weight),
                         pointer(bias),      size, {}};
  if (branches.size() > static_cast<size_t>(max_branches())) {
    throw std::invalid_argument("too many branches");
  }
  for (const auto& [row, row_bias, row_size, column, column_bias, column_size] : branches) {
    problem.branches.push_back({pointer(row), pointer(row_bias), row_size, pointer(column),
                                pointer(column_bias), column_size});
  }
  return problem;
}

void strip_conv2d_forward(const std::string& dtype, const Shape& shape, Address x,
                          const Square& square, const std::vector<Branch>& branches, Address y,
                          Address stream) {
  const auto problem = strip_problem(dtype, shape, x, square, branches);
  py::gil_scoped_release release;
  forward_cuda(problem, pointer(y), pointer(stream));
}

std::pair<int64_t, int64_t> strip_conv2d_workspace(const std::string& dtype, const Shape& shape,
                                                   Address x, const Square& square,
                                                   const std::vector<Branch>& branches,
                                                   bool weights) {
  const auto workspace =
      backward_workspace_cuda(strip_problem(dtype, shape, x, square, branches), weights);
  return {workspace.middle, workspace.partial};
}

void strip_conv2d_backward(const std::string& dtype, const Shape& shape, Address x,
                           const Square& square, const std::vector<Branch>& branches,
                           Address y_gradient,
                           const std::tuple<Address, Address, Address>& gradients,
                           const std::vector<BranchGradient>& branch_gradients,
                           const std::pair<Address, Address>& workspace, Address stream) {
  if (branch_gradients.size() != branches.size()) {
    throw std::invalid_argument("branch_gradients needs one entry for each branch");
  }
  const auto problem = strip_problem(dtype, shape, x, square, branches);
  const auto [x_gradient, square_weight, square_bias] = gradients;
  CudaGradients native = {pointer(x_gradient), pointer(square_weight), pointer(square_bias), {}};
  for (const auto& [row, row_bias, column, column_bias] : branch_gradients) {
    native.branches.push_back(
        {pointer(row), pointer(row_bias), pointer(column), pointer(column_bias)});
  }
  py::gil_scoped_release release;
  backward_cuda(problem, pointer(y_gradient), native, static_cast<float*>(pointer(workspace.first)),
                static_cast<float*>(pointer(workspace.second)), pointer(stream));
}

}  // namespace

void bind(py::module_& m) {
  m.def("strip_conv2d_max_branches", &max_branches);
  m.def("strip_conv2d_forward", &strip_conv2d_forward, py::arg("dtype"), py::arg("shape"),
        py::arg("x"), py::arg("square"), py::arg("branches"), py::arg("y"), py::arg("stream"),
        "square: (weight, bias, size), size 0 for none; branches: [(row weight, bias, size, column "
        "weight, bias, size)]; an address is 0 where there is nothing.");
  m.def("strip_conv2d_workspace", &strip_conv2d_workspace, py::arg("dtype"), py::arg("shape"),
        py::arg("x"), py::arg("square"), py::arg("branches"), py::arg("weights"),
        "Float32 numbers that strip_conv2d_backward wants: (gradient of the square, partial sums); "
        "weights: whether any gradient of a weight or bias is wanted. 0: pass address 0.");
  m.def("strip_conv2d_backward", &strip_conv2d_backward, py::arg("dtype"), py::arg("shape"),
        py::arg("x"), py::arg("square"), py::arg("branches"), py::arg("y_gradient"),
        py::arg("gradients"), py::arg("branch_gradients"), py::arg("workspace"), py::arg("stream"),
        "As strip_conv2d_forward; gradients: (x, square weight, square bias); branch_gradients: "
        "[(row, row bias, column, column bias)]; those at address 0 are not written, but that of x "
        "must be there where the workspace holds a gradient of the square.");
}

}  // namespace famseg::strip_conv
