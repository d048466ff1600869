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
  bool write;
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
  Report finding{.kind = kind, .now = side(thread, access.mark.code, access.write ? "wrote" : "read")};
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

// Accesses that are not ordered before the end of the last of the block's threads.
void report_late(Block& block) {
  for (int i = 0; i < state.all_threads; ++i) {
    const Touched& access = block.accesses[i];
    if (access.mark.time > block.end->of[i]) report_not_running(state.threads[i], access, kEnded);
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
  if (--block.live == 0) report_late(block);
}

void check_other_shared(const Thread& me, bool write, Code code, uintptr_t address, size_t bytes) {
  const int rank = rank_of_shared(address);
  const uintptr_t begin = shared_of(rank);
  const Touched access{{me.time, code}, write, address, bytes};
  if (rank >= state.cluster || address < begin || address + bytes > begin + state.launch.shared_bytes) {
    stop(finding_of(Kind::out_of_bounds, me, access));
  }
  if (me.clock->of[rank * state.num_threads] < state.cluster_start) report_not_running(me, access, kNotBegun);
  if (blocks[rank].live == 0) {
    report_not_running(me, access, kEnded);
  } else {
    blocks[rank].accesses[me.index] = access;
  }
}

int cluster_rank() { return current->rank; }

void* of_block(void* shared, int rank) {
  const Code code = FASTFORMER_SIMT_CALLER;
  const uintptr_t offset = reinterpret_cast<uintptr_t>(shared) - shared_begin;
  if (offset > state.launch.shared_bytes) {
    bad_call(*current, code, "in of_block", "it does not lie in the shared memory of the block itself");
  }
  if (rank < 0 || rank >= state.cluster) {
    bad_call(*current, code, "in of_block",
             "there is no block " + std::to_string(rank) + " in a cluster of " + std::to_string(state.cluster));
  }
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
