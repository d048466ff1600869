// How the emulator's own tests name and call the kernels of tests/simt/kernels.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

namespace simt {

struct TestArguments {
  std::vector<void*> tensors;
  std::vector<int64_t> numbers;

  template <typename T>
  T* tensor(int i) const {
    return static_cast<T*>(tensors.at(i));
  }
  int number(int i) const { return static_cast<int>(numbers.at(i)); }
};

// A variable of this type makes a kernel known by name.
struct TestKernel {
  TestKernel(const char* name, void (*run)(const TestArguments&));
};

// Address, bytes, and what may be done to them: "read", "write", or "fill", which nobody has written yet.
using TestTensor = std::tuple<uintptr_t, int64_t, std::string>;
void run_test_kernel(const std::string& name, const std::vector<TestTensor>& tensors,
                     const std::vector<int64_t>& numbers);

}  // namespace simt
