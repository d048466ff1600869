// What Python sees.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "runtime.h"
#include "schedule.h"
#include "test_kernels.h"

namespace py = pybind11;

PYBIND11_MODULE(fastformer_simt, m) {
  py::class_<simt::Finding>(m, "Finding")
      .def_readonly("kind", &simt::Finding::kind)
      .def_readonly("kernel", &simt::Finding::kernel)
      .def_readonly("text", &simt::Finding::text)
      .def_readonly("address", &simt::Finding::address)
      .def_readonly("block", &simt::Finding::block)
      .def_readonly("thread", &simt::Finding::thread)
      .def_readonly("other_block", &simt::Finding::other_block)
      .def_readonly("other_thread", &simt::Finding::other_thread)
      .def_readonly("lines", &simt::Finding::lines)
      .def_readonly("other_lines", &simt::Finding::other_lines)
      .def("__repr__", [](const simt::Finding& finding) { return finding.text; });
  m.def(
      "set_seed", [](std::optional<uint32_t> seed) { simt::set_seed(seed ? int64_t{*seed} : -1); }, py::arg("seed"),
      "Threads run in an order drawn from `seed` at every switch, or without one in theirs.");
  m.def("findings", [] { return simt::findings; }, "What was found wrong in the last launch.");
  m.def(
      "counters", [] { return simt::counters(); },
      "How many launches, switches of fibers and accesses there were since the module was loaded.");
  m.def("run", &simt::run_test_kernel, py::arg("name"), py::arg("tensors"), py::arg("numbers"),
        "Launches a kernel of tests/simt/kernels. tensors: (address, bytes, read | write | fill).");
}
