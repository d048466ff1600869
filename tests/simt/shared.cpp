// The shared memory of the blocks that run.
#include <sys/mman.h>

#include <cstring>
#include <stdexcept>

#include "shadow.h"

namespace simt {

uintptr_t shared_area = 0, shared_begin = 0;
Unit *area_units = nullptr, *shared_units = nullptr;
Readers shared_readers;

namespace {
constexpr size_t kUnitBytes = kSharedArea / 16 * sizeof(Unit);
}  // namespace

char* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("simt: no address space for the shadow memory");
  return static_cast<char*>(memory);
}

void begin_launch_shared() {
  if (shared_area != 0) return;
  shared_area = reinterpret_cast<uintptr_t>(reserve(kSharedArea));
  area_units = reinterpret_cast<Unit*>(reserve(kUnitBytes));
}

void forget_shared() { madvise(area_units, kUnitBytes, MADV_DONTNEED); }

void begin_cluster_memory() {
  for (int rank = 0; rank < state.cluster; ++rank) {
    std::memset(reinterpret_cast<void*>(shared_of(rank)), 0xff, state.launch.shared_bytes);
  }
  shared_readers.clear();
}

void* shared_memory() { return reinterpret_cast<void*>(shared_begin); }

}  // namespace simt
