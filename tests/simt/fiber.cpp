// Fibers, the schedule, and the launch.
#include <sys/mman.h>

#include <cstring>
#include <mutex>
#include <random>
#include <stdexcept>

#include "asynchronous.h"
#include "runtime.h"
#include "schedule.h"
#include "shadow.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

Device device;
State state;
Thread* current = nullptr;
std::array<Memory, 2> free_memory;
__thread bool in_kernel __attribute__((tls_model("initial-exec"))) = false;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kGuard = 4096;

char* stacks = nullptr;
int num_stacks = 0;    // with a guard
unsigned first_x = 0;  // of the cluster's blocks
void* host_stack_pointer = nullptr;
std::recursive_mutex one_at_a_time;
std::set<Code> launched_kernels;

// Threads that may run. In order of arrival, or at random.
class Ready {
 public:
  void clear() { count_ = first_ = 0; }
  bool empty() const { return count_ == 0; }
  void push(int thread) { threads_[(first_ + count_++) % kMostThreads] = thread; }
  int pop() {
    if (random != nullptr) std::swap(at(0), at((*random)() % count_));
    const int thread = at(0);
    first_ = (first_ + 1) % kMostThreads;
    --count_;
    return thread;
  }
  std::minstd_rand* random = nullptr;

 private:
  int& at(unsigned i) { return threads_[(first_ + i) % kMostThreads]; }
  int threads_[kMostThreads];
  unsigned first_ = 0, count_ = 0;
};
Ready ready;
std::minstd_rand generator;

#ifdef __x86_64__
// Saves what a call keeps (System V ABI) on the stack of the one, and goes on where the other did the same.
extern "C" void fastformer_simt_switch(void** save, void* load);
asm(R"(
.text
.hidden fastformer_simt_switch
.globl fastformer_simt_switch
.type fastformer_simt_switch, @function
fastformer_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastformer_simt_switch, .-fastformer_simt_switch
)");
void switch_to(void** save, void* load) { fastformer_simt_switch(save, load); }

void* new_fiber(char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack) - 2;  // so that entry() begins as if called
  *top = reinterpret_cast<void*>(entry);
  return top - 6;
}
#else
ucontext_t contexts[kMostThreads + 1];
void switch_to(void** save, void* load) {
  if (*save == nullptr) *save = &contexts[kMostThreads];
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(load));
}
void* new_fiber(char* stack, void (*entry)()) {
  ucontext_t* context = &contexts[(stack - stacks) / (kStack + kGuard)];
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStack;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}
#endif

char* stack_of(int thread) { return stacks + (kStack + kGuard) * thread + kGuard; }

void make_stacks(int count) {
  if (stacks == nullptr) stacks = reserve((kStack + kGuard) * kMostThreads);
  for (; num_stacks < count; ++num_stacks) mprotect(stacks + (kStack + kGuard) * num_stacks, kGuard, PROT_NONE);
}

void run(Thread& thread) {
  current = &thread;
  threadIdx = thread.at;
  blockIdx.x = first_x + thread.rank;
  enter_shared(thread.rank);
  free_memory[0] = {reinterpret_cast<uintptr_t>(stack_of(thread.index)), kStack};
  ++state.switches;
  state.most_accesses = state.accesses + patience.accesses;
}

// Leaves the fiber that runs for the next that can.
void run_next(void** save) {
  if (ready.empty()) {
    if (live_threads() == 0) {
      switch_to(save, host_stack_pointer);
    } else {
      report_deadlock();
    }
  }
  if (state.switches > state.most_switches && current->wait != Wait::exited) {
    stop_endless(current->code, "threads synchronise for ever");
  }
  const Thread* left = current;
  Thread& next = state.threads[ready.pop()];
  run(next);
  if (&next != left) switch_to(save, next.stack_pointer);
}

void enter() {
  state.body(state.context);
  current->wait = Wait::exited;
  current->waits_in = "";
  thread_exited(*current);
  run_next(&current->stack_pointer);
}

void run_cluster() {
  const dim3 block = state.launch.block;
  ready.clear();
  const Time start = advance();
  state.starts.push_back(start);
  state.cluster_start = start;
  state.actors = false;
  Clock* clock = new_clock(nullptr);
  std::fill_n(clock->of, state.all_threads, start - 1);  // others are ordered with nothing yet
  for (int i = 0; i < state.all_threads; ++i) {
    Thread& thread = state.threads[i];
    thread.index = i;
    thread.rank = rank_of(i);
    const unsigned number = i - thread.rank * state.num_threads;
    thread.at = {number % block.x, number / block.x % block.y, number / (block.x * block.y)};
    thread.time = start;
    set_clock(thread, clock);
    thread.wait = Wait::nothing;
    thread.copies.clear();
    thread.groups.clear();
    thread.stack_pointer = new_fiber(stack_of(i), enter);
    ready.push(i);
  }
  begin_cluster_memory();
  begin_cluster_synchronisation();
  begin_cluster();
  state.most_switches = state.switches + patience.synchronisations * state.all_threads;
  Thread& first = state.threads[ready.pop()];
  run(first);
  in_kernel = true;
  switch_to(&host_stack_pointer, first.stack_pointer);
  in_kernel = false;
}

void check_launch(const Launch& launch) {
  const auto refuse = [](const char* what) { throw std::runtime_error(std::string("simt: a launch with ") + what); };
  const dim3 &grid = launch.grid, &block = launch.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) refuse("a block of 0 or more than 1024 threads");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) refuse("a grid beyond (2^31 - 1, 65535, 65535)");
  if (launch.shared_bytes > device.shared_bytes) refuse("more shared memory than a block can have");
  if (launch.cluster == 0 || launch.cluster > kMaxCluster) refuse("a cluster of 0 or more than 8 blocks");
  if (launch.cluster > 1 && device.compute_capability < 90) refuse("a cluster on a device that has none");
  if (launch.cluster > 1 && threads % kWarp != 0) refuse("a cluster, and blocks that are not of whole warps");
  if (grid.x % launch.cluster != 0) refuse("a grid that is not of whole clusters");
  if (kernels().count(code_of(launch.kernel)) == 0) refuse("a function that is not __global__");
}

}  // namespace

void wait(Thread& thread, Wait kind, Code code, const char* name) {
  thread.wait = kind;
  thread.code = code;
  thread.waits_in = name;
  run_next(&thread.stack_pointer);
}

void wake(Thread& thread) {
  thread.wait = Wait::nothing;
  ready.push(thread.index);
}

void yield(Thread& thread, Code code, const char* name) {
  thread.code = code;
  thread.waits_in = name;
  run_next(&thread.stack_pointer);
}

std::string name_of_stack(uintptr_t address) {
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(stacks);
  if (offset >= (kStack + kGuard) * kMostThreads) return "";
  const auto index = static_cast<int>(offset / (kStack + kGuard));
  if (state.cluster == 1) return "local memory of thread " + std::to_string(index);
  return "local memory of thread " + std::to_string(index % state.num_threads) + " of block " +
         std::to_string(rank_of(index)) + " of its cluster";
}

void stop(Report finding) {
  state.aborted = true;
  report(std::move(finding));
  void* abandoned = nullptr;
#ifndef __x86_64__
  static ucontext_t nowhere;
  abandoned = &nowhere;
#endif
  switch_to(&abandoned, host_stack_pointer);
  __builtin_unreachable();
}

void set_seed(int64_t seed) {
  generator.seed(static_cast<uint32_t>(seed) + 1);
  ready.random = seed < 0 ? nullptr : &generator;
}

std::map<std::string, uint64_t> counters() {
  return {{"launches", state.launches}, {"switches", state.switches}, {"accesses", state.accesses}};
}

std::map<std::string, uint64_t> last_launch() {
  const dim3& grid = state.launch.grid;
  return {{"blocks", uint64_t{grid.x} * grid.y * grid.z}, {"cluster", state.launch.cluster}};
}

const std::set<Code>& kernels() {
  static const std::set<Code> all = [] {
    std::set<Code> codes;
    for (auto at = __start___patchable_function_entries; at != __stop___patchable_function_entries; ++at) {
      codes.insert(code_of(*at));
    }
    return codes;
  }();
  return all;
}
const std::set<Code>& launched() { return launched_kernels; }

Call::Call() {
  one_at_a_time.lock();
  forget_memory();
}
Call::~Call() {
  forget_memory();
  one_at_a_time.unlock();
}

void launch(const Launch& what, void (*body)(void*), void* context) {
  const std::lock_guard lock(one_at_a_time);
  check_launch(what);
  free_memory[1] = {reinterpret_cast<uintptr_t>(what.arguments), what.arguments_bytes};
  reports.clear();
  state.launch = what;
  state.body = body;
  state.context = context;
  state.num_threads = static_cast<int>(what.block.x * what.block.y * what.block.z);
  state.cluster = static_cast<int>(what.cluster);
  state.all_threads = state.cluster * state.num_threads;
  state.threads.resize(kMostThreads);
  make_stacks(std::max(state.all_threads, kMaxThreads));
  state.starts.clear();
  state.aborted = false;
  blockDim = {what.block.x, what.block.y, what.block.z};
  gridDim = {what.grid.x, what.grid.y, what.grid.z};
  begin_launch_memory();
  begin_launch_counters();
  state.launch_start = state.counter + 1;
  ++state.launches;
  launched_kernels.insert(code_of(what.kernel));
  const Watchdog watchdog;
  for (unsigned z = 0; z < what.grid.z; ++z) {
    for (unsigned y = 0; y < what.grid.y; ++y) {
      for (unsigned x = 0; x < what.grid.x && !state.aborted; x += what.cluster) {
        first_x = x;
        blockIdx = {x, y, z};
        state.block = (int64_t{z} * what.grid.y + y) * what.grid.x + x;
        run_cluster();
      }
    }
  }
  in_kernel = false;
  findings = explain(reports);
  if (state.aborted && findings.empty()) throw std::logic_error("simt: a kernel was stopped without a finding");
  if (!findings.empty()) throw std::runtime_error(describe(findings));
}

}  // namespace simt
