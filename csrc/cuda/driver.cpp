// Whether this machine's driver can run what is in this library. The CUDA runtime is linked in, and may be newer than
// torch's own.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include <string>

namespace {

// Empty, or what is wrong. Any driver of the runtime's major version will do, and any later one. The driver is asked
// past the runtime, whose cudaDriverGetVersion initialises it: a process that imports this could then not fork, or
// choose its devices.
std::string cuda_problem() {
  constexpr int kBuilt = CUDART_VERSION / 1000;
  int version = 0;
  void* const driver = dlopen("libcuda.so.1", RTLD_NOW);
  void* const found = driver == nullptr ? nullptr : dlsym(driver, "cuDriverGetVersion");
  if (found == nullptr || reinterpret_cast<int (*)(int*)>(found)(&version) != 0) return "there is no CUDA driver";
  if (version / 1000 >= kBuilt) return "";
  return "they were built with CUDA " + std::to_string(kBuilt) + ", and the driver knows CUDA " +
         std::to_string(version / 1000);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastformer, m) { m.def("cuda_problem() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(fastformer, CompositeExplicitAutograd, m) {
  m.impl("cuda_problem", TORCH_BOX(&cuda_problem));
}
