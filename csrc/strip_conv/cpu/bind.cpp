#include "common/bind.h"

#include "strip_conv/cpu/kernels.h"

namespace famseg::strip_conv {
namespace {

// (address, bias address, size)
using Square = std::tuple<Address, Address, int64_t>;
// (row, row bias, row size, column, column bias, column size)
using BranchAddresses = std::tuple<Address, Address, int64_t, Address, Address, int64_t>;
// (row, row bias, column, column bias)
using BranchGradientAddresses = std::tuple<Address, Address, Address, Address>;

std::vector<Branch> branches_from(const std::vector<BranchAddresses>& branches) {
  std::vector<Branch> result;
  for (const auto& [row, row_bias, row_size, column, column_bias, column_size] : branches) {
    result.push_back({pointer(row), pointer(row_bias), row_size, pointer(column),
                      pointer(column_bias), column_size});
  }
  return result;
}

Problem problem_from(const std::string& dtype, const Shape& shape, bool channels_last, Address x,
                     const Square& square, const std::vector<Branch>& branches) {
  const auto [n, c, h, w] = shape;
  const auto [weight, bias, size] = square;
  return {dtype_named(dtype),
          n,
          c,
          h,
          w,
          channels_last,
          pointer(x),
          pointer(weight),
          pointer(bias),
          size,
          branches.data(),
          static_cast<int64_t>(branches.size())};
}

void strip_conv2d_forward(const std::string& dtype, const Shape& shape, bool channels_last,
                          Address x, const Square& square,
                          const std::vector<BranchAddresses>& branches, Address y, int threads) {
  const auto native_branches = branches_from(branches);
  const auto problem = problem_from(dtype, shape, channels_last, x, square, native_branches);
  const Isa isa = active_isa();
  py::gil_scoped_release release;
  forward(isa, problem, pointer(y), threads);
}

void strip_conv2d_backward(const std::string& dtype, const Shape& shape,
                           const std::tuple<bool, bool>& channels_last, Address x,
                           const Square& square, const std::vector<BranchAddresses>& branches,
                           Address y_gradient, Address x_gradient,
                           const std::tuple<Address, Address>& square_gradients,
                           const std::vector<BranchGradientAddresses>& branch_gradients,
                           int threads) {
  if (branch_gradients.size() != branches.size()) {
    throw std::invalid_argument("branch_gradients needs one entry for each branch");
  }
  const auto native_branches = branches_from(branches);
  const auto [x_last, y_last] = channels_last;
  const auto problem = problem_from(dtype, shape, x_last, x, square, native_branches);
  std::vector<BranchGradients> native_gradients;
  for (const auto& [row, row_bias, column, column_bias] : branch_gradients) {
    native_gradients.push_back(
        {pointer(row), pointer(row_bias), pointer(column), pointer(column_bias)});
  }
  const Gradients gradients = {pointer(y_gradient),
                               y_last,
                               pointer(x_gradient),
                               pointer(std::get<0>(square_gradients)),
                               pointer(std::get<1>(square_gradients)),
                               native_gradients.data()};
  const Isa isa = active_isa();
  py::gil_scoped_release release;
  backward(isa, problem, gradients, threads);
}

}  // namespace

void bind(py::module_& m) {
  m.def(
      "strip_conv2d_forward", &strip_conv2d_forward, py::arg("dtype"), py::arg("shape"),
      py::arg("channels_last"), py::arg("x"), py::arg("square"), py::arg("branches"), py::arg("y"),
      py::arg("threads"),
      "channels_last: x and y are (N, H, W, C) in memory; square: (weight, bias, size); branches: "
      "[(row, row bias, row size, column, column bias, column size)].");
  m.def(
      "strip_conv2d_backward", &strip_conv2d_backward, py::arg("dtype"), py::arg("shape"),
      py::arg("channels_last"), py::arg("x"), py::arg("square"), py::arg("branches"),
      py::arg("y_gradient"), py::arg("x_gradient"), py::arg("square_gradients"),
      py::arg("branch_gradients"), py::arg("threads"),
      "As strip_conv2d_forward; channels_last: whether (x and its gradient, the gradient of y) are "
      "(N, H, W, C) in memory; square_gradients: (weight, bias); "
      "branch_gradients: [(row, row "
      "bias, column, column bias)]. Gradients at address 0 are not computed.");
}

}  // namespace famseg::strip_conv
