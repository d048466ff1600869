// What the launch needs of the other files.
#pragma once

#include <map>

#include "runtime.h"

namespace simt {

void begin_block_synchronisation();
int live_threads();
void thread_exited(Thread& thread);
[[noreturn]] void report_deadlock();
void forget_memory();
std::map<std::string, uint64_t> counters();
void set_seed(int64_t seed);  // negative: threads run in order
void yield(Thread& thread);   // to all that are ready; `thread` is one of them

}  // namespace simt
