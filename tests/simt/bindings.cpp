// What Python sees.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

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
  m.def("last_launch", [] { return simt::last_launch(); }, "The {blocks, cluster} of the last launch.");
  m.def(
      "kernels", [] { return simt::names_of(simt::kernels()); },
      "The kernels there are, {address in the module: name}.");
  m.def("launched", [] { return simt::launched(); }, "Addresses of the kernels launched since the module was loaded.");
  m.def(
      "set_device",
      [](size_t shared_bytes, int multiprocessors, int compute_capability, int64_t l2_bytes) {
        if (shared_bytes > simt::kMostShared) throw std::invalid_argument("no device has so much shared memory");
        simt::device = {shared_bytes, multiprocessors, compute_capability, l2_bytes};
      },
      py::arg("shared_bytes") = simt::Device().shared_bytes,
      py::arg("multiprocessors") = simt::Device().multiprocessors,
      py::arg("compute_capability") = simt::Device().compute_capability, py::arg("l2_bytes") = simt::Device().l2_bytes,
      "What the kernels are told of the device: bytes of shared memory a block can have, multiprocessors, the compute "
      "capability (90 is that of sm_90), and bytes of the L2 cache.");
  m.def(
      "set_patience",
      [](uint64_t accesses, uint64_t synchronisations, double seconds) {
        simt::patience = {accesses, synchronisations, seconds};
      },
      py::arg("accesses") = simt::Patience().accesses, py::arg("synchronisations") = simt::Patience().synchronisations,
      py::arg("seconds") = simt::Patience().seconds,
      "A kernel never ends whose thread makes so many accesses without a switch to another, or whose threads each "
      "synchronise so often in a block, or which does neither for so many seconds.");
  m.def("run", &simt::run_test_kernel, py::arg("name"), py::arg("tensors"), py::arg("numbers"),
        "Launches a kernel of tests/simt/kernels. tensors: (address, bytes, read | write | fill).");
}
