// How the emulator works, and what its files share.
//
// A launch runs its clusters one after the other; most launches have clusters of one block. Every thread of a cluster
// is a fiber, which runs until it waits. The kernels' files are compiled with -fsanitize=thread but linked without its
// library: the hooks it calls at each access (memory.cpp) are ours. They find races by happens-before (FastTrack,
// Flanagan and Freund, PLDI 2009), so a race is found on whatever schedule runs, as long as both accesses do. Likewise
// -fsanitize=alignment,bounds-strict calls undefined.cpp's where a pointer or an index is wrong by its type. Kernels
// that never end are stopped (watchdog.cpp).
//
// Time: one counter that every synchronisation advances. A thread's `time` is the counter's value when it last
// synchronised; its `clock` has of every thread the latest time it is ordered after. An access at `time` of thread u is
// ordered before what thread t does now if t's clock[u] >= time. Clocks are shared and never changed: a barrier makes
// one new clock for all that waited there. Copies by TMA and wgmma have entries in it as well (asynchronous.h).
#pragma once

#include <array>
#include <string>
#include <vector>

#define FASTFORMER_SIMT_RUNTIME
#include "simt.h"

namespace simt {

constexpr int kMaxThreads = 1024;  // of a block
constexpr int kMaxCluster = 8;     // blocks
constexpr int kMostThreads = kMaxCluster * kMaxThreads;
constexpr int kWarp = 32;
constexpr size_t kMostShared = 256 * 1024;  // bytes a block can have on any device
constexpr int kActors = 130;                // of a block: see asynchronous.h

using Time = uint32_t;
using Code = uint32_t;  // a code address, as an offset into this library

struct Clock {
  int references;
  // With `actors`: until when each thread's writes to its block's shared memory are there for the asynchronous proxy.
  Time fenced[kMostThreads];
  // As many as the cluster has threads, and with `actors` theirs behind.
  Time of[kMostThreads + kMaxCluster * kActors];
};

enum class Kind : uint8_t {
  race,
  proxy,
  out_of_bounds,
  read_only,
  misaligned,
  uninitialised,
  copy_under_way,
  not_running,
  deadlock,
  divergence,
  bad_call,
  endless,
  trap,
};

// What a report says of one of the two sides.
struct Side {
  int64_t block = -1;  // -1: there is no such side
  int thread = -1;
  Code code = 0;
  const char* did = "";
};
struct Report {
  Kind kind;
  Side now = {}, before = {};
  uintptr_t address = 0;
  int bytes = 0;
  std::string text = {};
  bool unless_same_line = false;  // no finding if both sides are at one line: it may lie at several addresses
  std::vector<std::pair<std::string, Code>> notes = {};  // lines below it, each with a place in the source
};

enum class Wait : uint8_t { nothing, block, cluster, warp, barrier, mbarrier, counter, exited };

struct Copy {
  char* to;
  const char* from;
  int bytes;
  bool valid;
  Code code;
};

struct Thread {
  void* stack_pointer;
  Clock* clock;
  Time time;
  int index;  // in the cluster
  int rank;   // its block's, in the cluster
  uint3 at;
  Wait wait;
  Code code;                   // where it waits
  const char* waits_in;        // "in " a function
  int barrier;                 // the number of the one it waits in, or a counter's value
  void* operand;               // of a warp's operation
  std::vector<Copy> copies;    // cp.async's under way, oldest first
  std::vector<size_t> groups;  // how many copies each committed group has
};

// What runs. Only the thread of the host that launches sees it.
struct State {
  Launch launch;
  void (*body)(void*);
  void* context;
  int num_threads = 0;  // of a block
  int cluster = 1;      // blocks
  int all_threads = 0;  // of a cluster
  bool actors = false;  // whether this cluster has done anything asynchronous but cp.async
  int64_t block = 0;    // the number in the grid of the cluster's first block
  Time counter = 0;
  Time launch_start = 0, cluster_start = 0;
  std::vector<Thread> threads;  // block by block
  std::vector<Time> starts;     // of each cluster
  bool aborted = false;
  uint64_t launches = 0, accesses = 0, switches = 0;
  uint64_t most_accesses = 0,
           most_switches = 0;  // of the thread that runs and of the cluster: what is beyond never ends
};
extern State state;
extern Thread* current;
// Of a thread by its index: the rank of its block, and its number there.
inline int rank_of(int index) { return state.cluster == 1 ? 0 : index / state.num_threads; }
inline int number_of(int index) { return state.cluster == 1 ? index : index % state.num_threads; }
// How many entries of a clock count.
inline int num_known() { return state.all_threads + (state.actors ? state.cluster * kActors : 0); }
inline int num_fenced() { return state.actors ? state.all_threads : 0; }

// What the thread that runs may touch unwatched: its stack, and the kernel's arguments.
struct Memory {
  uintptr_t begin;
  size_t bytes;
};
extern std::array<Memory, 2> free_memory;
inline bool is_free(uintptr_t address) {
  return address - free_memory[0].begin < free_memory[0].bytes || address - free_memory[1].begin < free_memory[1].bytes;
}

// Whether this thread of the host is inside a kernel.
extern __thread bool in_kernel __attribute__((tls_model("initial-exec")));

extern "C" char __ehdr_start __attribute__((visibility("hidden")));  // of this library: the linker's
extern "C" char _end __attribute__((visibility("hidden")));
// Addresses of what is declared __global__, the compiler's list.
extern "C" const void* const __start___patchable_function_entries[] __attribute__((visibility("hidden")));
extern "C" const void* const __stop___patchable_function_entries[] __attribute__((visibility("hidden")));

inline Code code_of(const void* return_address) {
  return static_cast<Code>(static_cast<const char*>(return_address) - &__ehdr_start);
}
#define FASTFORMER_SIMT_CALLER ::simt::code_of(__builtin_return_address(0))

extern std::vector<Report> reports;  // of the launch that runs
// A finding; the kernel goes on. Only the first of its kind at a pair of places is kept.
void report(Report report);
// A finding after which the kernel can't go on. Threads are left where they are: they own nothing.
[[noreturn]] void stop(Report report);
[[noreturn]] void bad_call(const Thread& thread, Code code, const char* did, std::string text);
Side side(const Thread& thread, Code code, const char* did);

// What the world sees of a report.
struct Finding {
  std::string kind, kernel, text = {}, address = {};
  int64_t block, thread, other_block, other_thread;
  std::vector<std::string> lines, other_lines;  // "file:line", the innermost of inlined functions first
};
// Reports as findings, and those as one text.
std::vector<Finding> explain(const std::vector<Report>& reports);
std::string describe(const std::vector<Finding>& findings);
extern std::vector<Finding> findings;  // of the last launch

// Fibers (fiber.cpp).
void wait(Thread& thread, Wait kind, Code code, const char* name);  // until `wake`
void wake(Thread& thread);
[[noreturn]] void stop_endless(Code code, std::string text);
// "" of an address in no stack.
std::string name_of_stack(uintptr_t address);

// Clocks.
Clock* new_clock(const Clock* copy_of);
Clock* blank_clock();              // that is ordered after nothing
void forget_actors(Clock* clock);  // nullptr: nothing
void set_clock(Thread& thread, Clock* clock);
// What any of these threads has done comes before what any of them does from here on. They have waited.
void all_meet(Thread* threads, int count);
void release(Clock* clock);
void join(Clock* into, const Clock* other);
void join_actors(Clock* into, const Clock* other);  // what it has of them alone
inline Time advance() { return ++state.counter; }

// Operations of a warp: waits until all lanes of `mask` that have not exited are here; the last one calls
// `finish(lanes, arrived)`.
using Finish = void (*)(Thread* const* lanes, unsigned arrived);
void warp_operation(unsigned mask, void* operand, Code code, const char* name, Finish finish);
// Stops unless all 32 came.
void check_all_lanes(Thread* const* lanes, unsigned arrived, const char* did);
void report_different_places(const Thread& me, Code code, const Thread& other, Code other_code, const char* name);

// Memory (memory.cpp).
void begin_launch_memory();
void begin_cluster_memory();
// An aligned access of 1, 2, 4, 8 or 16 bytes.
void access_as(Thread& thread, const void* address, size_t bytes, bool write, Code code);
// Reports if the 16 bytes of shared memory at `pointer` hold a write that `thread` can't rely on to see.
void check_sees_shared(Thread& thread, const void* pointer, Code code);
void begin_copy(Thread& thread, const Copy& copy);
void end_copy(Thread& thread, const Copy& copy);
std::string name_of_address(uintptr_t address);

}  // namespace simt
