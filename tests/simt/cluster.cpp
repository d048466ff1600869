// Clusters: what their blocks do to each other's shared memory, which must have begun then and not have ended, and
// their barrier.
#include <algorithm>
#include <array>

#include "asynchronous.h"
#include "schedule.h"
#include "simt_hopper.h"

namespace simt {
namespace {

// A thread's last access to the shared memory of another block.
struct Touched {
  Mark mark;
  const char* did;
  uintptr_t address;
  size_t bytes;
};
struct Block {
  int live;                       // threads
  Clock* end;                     // what those that have ended were ordered after
  std::vector<Touched> accesses;  // by the threads of other blocks
};
std::array<Block, kMaxCluster> blocks;

int num_waiting, first_waiting;
bool any_ended;
int last_ended;

[[noreturn]] void stop_divergent(const Thread& thread, Code code) {
  const Side ended = side(state.threads[last_ended], 0, "");
  Report finding{.kind = Kind::divergence, .now = side(thread, code, "in cluster_sync")};
  finding.text = "thread " + std::to_string(ended.thread) + " of block " + std::to_string(ended.block) +
                 " has ended while others wait for it";
  stop(std::move(finding));
}

Report finding_of(Kind kind, const Thread& thread, const Touched& access) {
  Report finding{.kind = kind, .now = side(thread, access.mark.code, access.did)};
  finding.address = access.address;
  finding.bytes = static_cast<int>(access.bytes);
  return finding;
}

void report_not_running(const Thread& thread, const Touched& access, const char* why) {
  Report finding = finding_of(Kind::not_running, thread, access);
  finding.text = why;
  report(std::move(finding));
}
constexpr const char* kNotBegun = "that block may not have begun yet: no cluster_sync comes before";
constexpr const char* kEnded = "that block may have ended by then: no cluster_sync comes after";

// Accesses, and arrivals that nobody has waited for, that are not ordered before the end of the last of the block's
// threads.
void report_late(int rank) {
  const Block& block = blocks[rank];
  const auto check = [&](int thread, const Touched& access) {
    if (access.mark.time > block.end->of[thread]) report_not_running(state.threads[thread], access, kEnded);
  };
  for (int i = 0; i < state.all_threads; ++i) check(i, block.accesses[i]);
  if (!state.actors) return;
  for (const Arrival& arrival : unseen_arrivals(rank)) {
    check(arrival.thread, {arrival.mark, kArrived, arrival.mbarrier, 8});
  }
}

void touch(const Thread& me, int rank, Lasts lasts, const Touched& access) {
  if (me.clock->of[rank * state.num_threads] < state.cluster_start) report_not_running(me, access, kNotBegun);
  if (blocks[rank].live == 0) {
    report_not_running(me, access, kEnded);
  } else if (lasts == Lasts::until_ordered) {
    blocks[rank].accesses[me.index] = access;
  }
}

}  // namespace

void begin_cluster() {
  num_waiting = 0;
  any_ended = false;
  if (state.cluster == 1) return;
  for (int rank = 0; rank < state.cluster; ++rank) {
    Block& block = blocks[rank];
    block.live = state.num_threads;
    release(block.end);
    block.end = nullptr;
    block.accesses.assign(state.all_threads, {});
  }
}

void cluster_thread_exited(const Thread& thread) {
  any_ended = true;
  last_ended = thread.index;
  if (num_waiting > 0) stop_divergent(state.threads[first_waiting], state.threads[first_waiting].code);
  if (state.cluster == 1) return;
  Block& block = blocks[thread.rank];
  if (block.end == nullptr) {
    block.end = new_clock(thread.clock);
    block.end->references = 1;
  } else {
    join(block.end, thread.clock);
  }
  if (--block.live == 0) report_late(thread.rank);
}

void check_other_shared(const Thread& me, bool write, Code code, uintptr_t address, size_t bytes) {
  const int rank = rank_of_shared(address);
  const uintptr_t begin = shared_of(rank);
  const Touched access{{me.time, code}, write ? "wrote" : "read", address, bytes};
  if (rank >= state.cluster || address < begin || address + bytes > begin + state.launch.shared_bytes) {
    stop(finding_of(Kind::out_of_bounds, me, access));
  }
  touch(me, rank, Lasts::until_ordered, access);
}

void begin_cluster_actors() {
  if (state.cluster == 1) return;
  for (int rank = 0; rank < state.cluster; ++rank) forget_actors(blocks[rank].end);
}

void check_block(const Thread& me, int rank, Code code, const char* did) {
  if (rank >= 0 && rank < state.cluster) return;
  bad_call(me, code, did,
           "there is no block " + std::to_string(rank) + " in a cluster of " + std::to_string(state.cluster));
}

void touch_block(const Thread& me, int rank, Lasts lasts, Code code, const char* did, uintptr_t address, size_t bytes) {
  if (rank != me.rank) touch(me, rank, lasts, {{me.time, code}, did, address, bytes});
}

int cluster_rank() { return current->rank; }

void* of_block(void* shared, int rank) {
  const Code code = FASTFORMER_SIMT_CALLER;
  const uintptr_t offset = reinterpret_cast<uintptr_t>(shared) - shared_begin;
  if (offset > state.launch.shared_bytes) {
    bad_call(*current, code, "in of_block", "it does not lie in the shared memory of the block itself");
  }
  check_block(*current, rank, code, "in of_block");
  return reinterpret_cast<void*>(shared_of(rank) + offset);
}

void cluster_sync() {
  const Code code = FASTFORMER_SIMT_CALLER;
  Thread& me = *current;
  if (any_ended) stop_divergent(me, code);
  if (num_waiting == 0) first_waiting = me.index;
  const int warp = me.index / kWarp * kWarp;
  for (int i = warp; i < std::min(warp + kWarp, state.all_threads); ++i) {
    const Thread& other = state.threads[i];
    if (other.wait != Wait::cluster || other.code == code) continue;
    report_different_places(me, code, other, other.code, "in cluster_sync");
    break;
  }
  if (++num_waiting < state.all_threads) return wait(me, Wait::cluster, code, "in cluster_sync");
  num_waiting = 0;
  all_meet(state.threads.data(), state.all_threads);
  yield(me, code, "in cluster_sync");
}

}  // namespace simt
