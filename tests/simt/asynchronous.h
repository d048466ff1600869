// What runs beside the threads: copies by TMA, and products of warpgroups. Each of these is an actor, with an entry in
// every clock behind those of the threads: an actor's access is ordered before what a thread does once the thread, or
// one it is ordered after, has waited for it. Their accesses are recorded as of where they begin, so whatever comes in
// between is unordered; the data move at the last moment that the waits allow.
//
// A cluster has actors from its first such operation on (state.actors), each block as many.
#pragma once

#include <string>
#include <vector>

#include "runtime.h"
#include "shadow.h"

namespace simt {

constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kMaxMbarriers = 64;  // of a block

// Actors by their entry in clocks: for a thread, the products of its warp, what TMA reads for its warp's stores, and
// what it writes to global memory.
inline int actors_of(int rank) { return state.all_threads + rank * kActors; }
inline int product_actor(const Thread& thread) { return actors_of(thread.rank) + number_of(thread.index) / kWarp; }
inline int store_actor(const Thread& thread) { return product_actor(thread) + kMaxWarps; }
inline int write_actor(const Thread& thread) { return actors_of(thread.rank) + 2 * kMaxWarps + kMaxMbarriers; }
// And the copies that count for an mbarrier, whoever begins them.
inline int load_actor(int mbarrier) {
  return actors_of(mbarrier / kMaxMbarriers) + 2 * kMaxWarps + mbarrier % kMaxMbarriers;
}
static_assert(kActors == 2 * kMaxWarps + kMaxMbarriers + 2);
// The thread, by its index, that an actor worked for at `time`; or the thread itself.
int worker_of(int index, Time time);

void begin_actors();
inline void need_actors() {
  if (!state.actors) begin_actors();
}
void stop_in_clusters(Code code, const char* did);  // of more than one block
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

// mbarriers (mbarrier.cpp), numbered through the cluster: each block has kMaxMbarriers of these numbers.
void begin_mbarriers();
void end_block_mbarriers(int rank);
// The number of the mbarrier that block `rank` has at `address`, which `thread` uses to count a copy.
int mbarrier_for_copy(Thread& thread, int rank, uintptr_t address, Code code, const char* did);
void add_load(int mbarrier, const BoxCopy& load, const char* did);
std::string state_of_mbarrier(int mbarrier);
struct Arrival {
  int thread;
  Mark mark;
  uintptr_t mbarrier;
};
// Those of other blocks at block `rank` that none of its threads has seen by waiting for a phase's end.
std::vector<Arrival> unseen_arrivals(int rank);
int issuer_of(int mbarrier, Time time);  // the thread, by its index, of the copies of that time
bool covers_mbarrier(uintptr_t address, size_t bytes);

// TMA (tma.cpp).
void begin_stores();
void store_thread_exited(Thread& thread);
int last_to_store(int rank);  // the thread, by its index
// Where the thread began a bulk_add that it has not waited for yet; 0: nowhere.
Code unfinished_add(int thread);

// Counters of blocks, and additions (counter.cpp).
void begin_launch_counters();
void note_addition(const Thread& thread, const void* to, size_t bytes, Code code);
void begin_counters();

// Products (wgmma.cpp).
void begin_products();
void end_block_products(int rank);

// setmaxnreg (setmaxnreg.cpp).
void begin_registers();
void end_block_registers(int rank);

// Clusters (cluster.cpp).
void begin_cluster_actors();
// Stops unless the cluster has such a block.
void check_block(const Thread& me, int rank, Code code, const char* did);
// What `me` does to shared memory or an mbarrier of block `rank`, which is reported unless the block must have begun
// and can't have ended: either that is ordered, or it is a copy or an arrival, which the block awaits.
enum class Lasts : uint8_t { until_ordered, until_awaited };
void touch_block(const Thread& me, int rank, Lasts lasts, Code code, const char* did, uintptr_t address, size_t bytes);
constexpr const char* kArrived = "arrived at an mbarrier of";

}  // namespace simt
