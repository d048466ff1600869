// What runs beside the threads: copies by TMA, and products of warpgroups. Each of these is an actor, with an entry in
// every clock behind those of the threads: an actor's access is ordered before what a thread does once the thread, or
// one it is ordered after, has waited for it. Their accesses are recorded as of where they begin, so whatever comes in
// between is unordered; the data move at the last moment that the waits allow.
//
// A block has actors from its first such operation on (state.actors). One of a larger cluster can't have any yet.
#pragma once

#include <string>
#include <vector>

#include "runtime.h"
#include "shadow.h"

namespace simt {

constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kMaxMbarriers = 64;  // of a block

// Actors by their entry in clocks.
inline int product_actor(int warp) { return state.num_threads + warp; }            // products of a warp
inline int store_actor(int warp) { return state.num_threads + kMaxWarps + warp; }  // TMA's reads for a warp's stores
inline int load_actor(int mbarrier) { return state.num_threads + 2 * kMaxWarps + mbarrier; }  // copies that count there
inline int write_actor() { return state.num_threads + 2 * kMaxWarps + kMaxMbarriers; }  // its writes of global memory
static_assert(kActors == 2 * kMaxWarps + kMaxMbarriers + 2);
// The number in its block of the thread an actor works for, or of the thread itself.
int thread_of(int index);

void begin_actors(Code code, const char* did);
inline void need_actors(Code code, const char* did) {
  if (!state.actors) begin_actors(code, did);
}
// `actor` as it is at an operation that `thread` begins now: ordered after all that the thread is. Until the next call.
Thread& act_for(const Thread& thread, int actor);
// The same for the lanes of a warp, ordered after what all of them are.
Thread& act_for(Thread* const* lanes, int actor);
// `thread` knows now what `actor` did until `time`.
void has_waited(Thread& thread, int actor, Time time);

// 16 bytes of shared memory at a time. They are in range.
void access_shared(Thread& actor, uintptr_t address, bool write, Code code);
// Any bytes of global memory.
void access_global(Thread& actor, const void* address, size_t bytes, Doing doing, Code code);
// While these bytes of shared memory, multiples of 16, are written in the background, or read.
void set_in_flight(uintptr_t address, size_t bytes, bool under_way);
void set_read(const void* address, size_t bytes, bool under_way);

// A box on its way, to or from shared memory at `shared`.
enum class Moves : uint8_t { load, store, add };
struct BoxCopy {
  Moves what;
  TensorMap map;
  int at[5];
  uintptr_t shared;
  int bytes;
  int thread;
  Time time;
  Code code;
};
// What accesses these bytes in the background, for a report.
bool find_box_copy(const BoxCopy& copy, uintptr_t address, size_t bytes, bool write, Report& report);
bool find_load(uintptr_t address, size_t bytes, bool write, Report& report);
bool find_store(uintptr_t address, size_t bytes, bool write, Report& report);
void carry_out(const BoxCopy& copy);

// mbarriers (mbarrier.cpp).
void begin_block_mbarriers();
void end_block_mbarriers();
// The number of the mbarrier at `pointer` that `thread` uses to count a copy.
int mbarrier_for_copy(Thread& thread, const void* pointer, Code code, const char* did);
void add_load(int mbarrier, const BoxCopy& load);
std::string state_of_mbarrier(int mbarrier);
int issuer_of(int mbarrier);
bool covers_mbarrier(uintptr_t address, size_t bytes);

// TMA (tma.cpp).
void begin_block_stores();
void store_thread_exited(Thread& thread);
int last_to_store();  // the thread
// Where the thread began a bulk_add that it has not waited for yet; 0: nowhere.
Code unfinished_add(int thread);

// Counters of blocks, and additions (counter.cpp).
void begin_launch_counters();
void note_addition(const Thread& thread, const void* to, size_t bytes, Code code);
void begin_block_counters();

// Products (wgmma.cpp).
void begin_block_products();
void end_block_products();

// setmaxnreg (setmaxnreg.cpp).
void begin_block_registers();
void end_block_registers();

}  // namespace simt
