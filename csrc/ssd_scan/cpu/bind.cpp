#include "common/bind.h"

#include "ssd_scan/problem.h"

namespace famseg::ssd_scan {
namespace {

// Defines a function of a problem and of `more`, all by keyword only.
template <typename... More, typename... Names>
void bind_problem(py::module_& m, const char* name, bool (*run)(const Problem&, More...),
                  const char* doc, const Names&... names) {
  m.def(
      name,
      [run](const std::string& dtype, int64_t batch, int64_t height, int64_t width, int64_t heads,
            int64_t headdim, int64_t groups, int64_t d_state, int64_t directions, int64_t matrices,
            int64_t chunk_size, bool dt_softplus, double dt_min, double dt_max, Address x,
            Address dt, Address A, Address B, Address C, Address D, Address z, Address dt_bias,
            Address initial_states, Address resets, More... more) {
        Problem p{};
        p.dtype = dtype_named(dtype);
        p.batch = batch;
        p.height = height;
        p.width = width;
        p.heads = heads;
        p.headdim = headdim;
        p.groups = groups;
        p.d_state = d_state;
        p.directions = directions;
        p.matrices = matrices;
        p.chunk_size = chunk_size;
        p.dt_softplus = dt_softplus;
        p.dt_min = dt_min;
        p.dt_max = dt_max;
        p.x = pointer(x);
        p.dt = pointer(dt);
        p.A = pointer(A);
        p.B = pointer(B);
        p.C = pointer(C);
        p.D = pointer(D);
        p.z = pointer(z);
        p.dt_bias = pointer(dt_bias);
        p.initial_states = pointer(initial_states);
        p.resets = static_cast<const uint8_t*>(pointer(resets));
        return run(p, more...);
      },
      py::kw_only(), py::arg("dtype"), py::arg("batch"), py::arg("height"), py::arg("width"),
      py::arg("heads"), py::arg("headdim"), py::arg("groups"), py::arg("d_state"),
      py::arg("directions"), py::arg("matrices"), py::arg("chunk_size"), py::arg("dt_softplus"),
      py::arg("dt_min"), py::arg("dt_max"), py::arg("x"), py::arg("dt"), py::arg("A"), py::arg("B"),
      py::arg("C"), py::arg("D"), py::arg("z"), py::arg("dt_bias"), py::arg("initial_states"),
      py::arg("resets"), names..., doc);
}

bool run_forward(const Problem& problem, Address y, Address final_states, int threads) {
  const Isa isa = active_isa();
  py::gil_scoped_release release;
  return forward(isa, problem, {pointer(y), pointer(final_states)}, threads);
}

bool run_backward(const Problem& problem, Address y_gradient, Address final_states_gradient,
                  Address x_gradient, Address dt_gradient, Address A_gradient, Address B_gradient,
                  Address C_gradient, Address D_gradient, Address z_gradient,
                  Address dt_bias_gradient, Address initial_states_gradient, int threads) {
  Gradients gradients{};
  gradients.y = pointer(y_gradient);
  gradients.final_states = pointer(final_states_gradient);
  gradients.x = pointer(x_gradient);
  gradients.dt = pointer(dt_gradient);
  gradients.A = pointer(A_gradient);
  gradients.B = pointer(B_gradient);
  gradients.C = pointer(C_gradient);
  gradients.D = pointer(D_gradient);
  gradients.z = pointer(z_gradient);
  gradients.dt_bias = pointer(dt_bias_gradient);
  gradients.initial_states = pointer(initial_states_gradient);
  const Isa isa = active_isa();
  py::gil_scoped_release release;
  return backward(isa, problem, gradients, threads);
}

}  // namespace

void bind(py::module_& m) {
  bind_problem(
      m, "ssd_scan_forward", run_forward,
      "Shapes and types are in csrc/ssd_scan/problem.h. Returns whether all is finite that the "
      "results are made of; if not, they are not to be used.",
      py::arg("y"), py::arg("final_states"), py::arg("threads"));
  bind_problem(
      m, "ssd_scan_backward", run_backward,
      "As ssd_scan_forward, from the gradients of y and of the final states. Gradients at address "
      "0 are not computed.",
      py::arg("y_gradient"), py::arg("final_states_gradient"), py::arg("x_gradient"),
      py::arg("dt_gradient"), py::arg("A_gradient"), py::arg("B_gradient"), py::arg("C_gradient"),
      py::arg("D_gradient"), py::arg("z_gradient"), py::arg("dt_bias_gradient"),
      py::arg("initial_states_gradient"), py::arg("threads"));
}

}  // namespace famseg::ssd_scan
