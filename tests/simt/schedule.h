// What the launch needs of the other files.
#pragma once

#include <map>
#include <set>

#include "runtime.h"

namespace simt {

void begin_cluster_synchronisation();
// Clusters (cluster.cpp).
void begin_cluster();
void cluster_thread_exited(const Thread& thread);
// Of an access in or near the shared memory of another block.
void check_other_shared(const Thread& me, bool write, Code code, uintptr_t address, size_t bytes);
int live_threads();
void thread_exited(Thread& thread);
[[noreturn]] void report_deadlock();
void forget_memory();
std::map<std::string, uint64_t> counters();
std::map<std::string, uint64_t> last_launch();
void set_seed(int64_t seed);                              // negative: threads run in order
void yield(Thread& thread, Code code, const char* name);  // to all that are ready; `thread` is one of them
// Code addresses: of all that is __global__, and of what of it was launched since the module was loaded.
const std::set<Code>& kernels();
const std::set<Code>& launched();
// Their names, or addresses where there is no addr2line to tell them.
std::map<Code, std::string> names_of(const std::set<Code>& kernels);

// How many accesses a thread makes without a switch to another, and how often each thread of a block synchronises,
// before a kernel is taken for one that never ends.
struct Patience {
  uint64_t accesses = uint64_t{1} << 26, synchronisations = uint64_t{1} << 18;
  double seconds = 4;  // without any of the two
};
extern Patience patience;

// Wakes now and then while it lives, to see whether the kernel gets on.
class Watchdog {
 public:
  Watchdog();
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;
};

}  // namespace simt
