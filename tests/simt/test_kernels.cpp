#include "test_kernels.h"

#include <map>
#include <stdexcept>

#include "simt.h"

namespace simt {
namespace {
std::map<std::string, void (*)(const TestArguments&)>& kernels() {
  static std::map<std::string, void (*)(const TestArguments&)> all;
  return all;
}
}  // namespace

TestKernel::TestKernel(const char* name, void (*run)(const TestArguments&)) { kernels()[name] = run; }

void run_test_kernel(const std::string& name, const std::vector<TestTensor>& tensors,
                     const std::vector<int64_t>& numbers) {
  const Call call;
  TestArguments arguments{{}, numbers};
  for (const auto& [address, bytes, use] : tensors) {
    if (use == "fill") unwritten(reinterpret_cast<void*>(address), bytes);
    allow(reinterpret_cast<void*>(address), bytes, use == "read" ? Access::read : Access::write);
    arguments.tensors.push_back(reinterpret_cast<void*>(address));
  }
  const auto found = kernels().find(name);
  if (found == kernels().end()) throw std::invalid_argument("no test kernel is called " + name);
  found->second(arguments);
}

}  // namespace simt
