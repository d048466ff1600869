// Barriers, operations of a warp, and what happens when they don't fit together.
#include <algorithm>
#include <bit>
#include <map>
#include <span>
#include <tuple>

#include "asynchronous.h"
#include "runtime.h"
#include "schedule.h"
#include "simt_ptx.h"

namespace simt {
namespace {

struct Group {
  unsigned mask, arrived;
  Finish finish;
  Code code;
  int first;  // thread
  const char* name;
};
struct Warp {
  unsigned live;
  int num_groups;
  Group groups[kWarp];  // of different masks; a lane waits in one
};
struct Barrier {
  int expected, arrived;
  Clock* clock;   // what all that came were ordered after
  Clock* joined;  // the last that went into it; kept, so that no other takes its address
  std::vector<int> waiting;
};

struct Block {
  int exited, waiting;  // threads
  int last_exited, first_waiting;
  Barrier barriers[16];
};

constexpr unsigned kEveryLane = ~0u;

Warp warps[kMostThreads / kWarp];
Block blocks[kMaxCluster];
int num_live;

[[noreturn]] void stop_thread(const Thread& thread, Kind kind, Code code, const char* did, std::string text) {
  Report finding{.kind = kind, .now = side(thread, code, did)};
  finding.text = std::move(text);
  stop(std::move(finding));
}
[[noreturn]] void stop_at(Kind kind, Code code, const char* did, std::string text) {
  stop_thread(*current, kind, code, did, std::move(text));
}

std::string has_ended(const Thread& thread) {
  return "thread " + std::to_string(number_of(thread.index)) + " has ended while others wait for it";
}

void run_group(Warp& warp, int index, Thread* lanes) {
  const Group group = warp.groups[index];
  warp.groups[index] = warp.groups[--warp.num_groups];
  Thread* of_lane[kWarp];
  for (int i = 0; i < kWarp; ++i) of_lane[i] = lanes + i;
  group.finish(of_lane, group.arrived);
  for (int i = 0; i < kWarp; ++i) {
    if (group.arrived >> i & 1) wake(lanes[i]);
  }
}

bool complete(const Warp& warp, const Group& group) { return group.arrived == (group.mask & warp.live); }

Thread* lanes_of(const Thread& thread) { return &state.threads[thread.index / kWarp * kWarp]; }

struct BarrierCall {
  int number, threads;
};

// barrier.aligned: the lanes of a warp come together, to the same barrier, and all of them count.
void meet(BarrierCall mine, Code code, const char* name) {
  warp_operation(kEveryLane, &mine, code, name, [](Thread* const* lanes, unsigned arrived) {
    const Thread& first = *lanes[std::countr_zero(arrived)];
    const int begin = number_of(first.index) / kWarp * kWarp;
    for (int i = 0; i < kWarp && begin + i < state.num_threads; ++i) {
      if ((arrived >> i & 1) == 0) {
        stop_thread(first, Kind::divergence, first.code, first.waits_in,
                    "thread " + std::to_string(begin + i) + " has ended: barriers count whole warps");
      }
      const auto& call = *static_cast<const BarrierCall*>(lanes[i]->operand);
      const auto& other = *static_cast<const BarrierCall*>(first.operand);
      if (call.number != other.number || call.threads != other.threads) {
        stop_thread(*lanes[i], Kind::bad_call, lanes[i]->code, lanes[i]->waits_in,
                    "thread " + std::to_string(number_of(first.index)) + " of its warp names another barrier or count");
      }
    }
  });
}

// Returns whether `thread` was the last.
bool arrive(Barrier& barrier, Thread& thread, int number, int threads, Code code, const char* name) {
  if (number < 1 || number > 15) stop_at(Kind::bad_call, code, name, "barriers are numbered 1 to 15");
  if (threads <= 0 || threads % kWarp != 0 || threads > state.num_threads) {
    stop_at(Kind::bad_call, code, name, "the number of threads must be a multiple of 32, at most the block's");
  }
  if (barrier.arrived == 0) {
    barrier.expected = threads;
    barrier.clock = new_clock(thread.clock);
    barrier.clock->references = 1;
  } else if (barrier.expected != threads) {
    stop_at(Kind::bad_call, code, name,
            "barrier " + std::to_string(number) + " was for " + std::to_string(barrier.expected) +
                " threads to those that came before, and is for " + std::to_string(threads) + " here");
  }
  if (barrier.joined != thread.clock) {
    join(barrier.clock, thread.clock);
    release(barrier.joined);
    barrier.joined = thread.clock;
    ++thread.clock->references;
  }
  barrier.clock->of[thread.index] = std::max(barrier.clock->of[thread.index], thread.time);
  return ++barrier.arrived == barrier.expected;
}

void open(Barrier& barrier) {
  const Time now = advance();
  std::sort(barrier.waiting.begin(), barrier.waiting.end());
  for (int i : barrier.waiting) {
    Thread& thread = state.threads[i];
    set_clock(thread, barrier.clock);
    thread.time = now;
    wake(thread);
  }
  barrier.waiting.clear();
  barrier.arrived = 0;
  release(barrier.joined);
  barrier.joined = nullptr;
  release(barrier.clock);
  barrier.clock = nullptr;
}

}  // namespace

void report_different_places(const Thread& me, Code code, const Thread& other, Code other_code, const char* name) {
  Report finding{.kind = Kind::divergence, .now = side(me, code, name), .before = side(other, other_code, name)};
  finding.text = "threads that should meet wait at different places";
  finding.unless_same_line = true;
  report(std::move(finding));
}

void begin_actors() {
  state.actors = true;
  for (int i = 0; i < state.all_threads; ++i) forget_actors(state.threads[i].clock);
  for (Block& block : std::span(blocks, state.cluster)) {
    for (Barrier& barrier : block.barriers) forget_actors(barrier.clock);
  }
  begin_cluster_actors();
  begin_mbarriers();
  begin_stores();
  begin_products();
  begin_counters();
  begin_registers();
}

void stop_in_clusters(Code code, const char* did) {
  if (state.cluster > 1) stop_at(Kind::bad_call, code, did, "the emulator does not know it in clusters yet");
}

void begin_cluster_synchronisation() {
  num_live = state.all_threads;
  for (int i = 0; i * kWarp < state.all_threads; ++i) {
    const int lanes = std::min(kWarp, state.all_threads - i * kWarp);
    warps[i].live = lanes == kWarp ? ~0u : (1u << lanes) - 1;
    warps[i].num_groups = 0;
  }
  for (Block& block : std::span(blocks, state.cluster)) {
    block.exited = block.waiting = 0;
    for (Barrier& barrier : block.barriers) {
      release(barrier.clock);
      barrier.clock = nullptr;
      release(barrier.joined);
      barrier.joined = nullptr;
      barrier.arrived = 0;
      barrier.waiting.clear();
    }
  }
}

int live_threads() { return num_live; }

void thread_exited(Thread& thread) {
  Block& block = blocks[thread.rank];
  ++block.exited;
  --num_live;
  if (state.actors) {
    store_thread_exited(thread);
    if (block.exited == state.num_threads) {
      end_block_mbarriers(thread.rank);
      end_block_products(thread.rank);
      end_block_registers(thread.rank);
    }
  }
  block.last_exited = thread.index;
  Warp& warp = warps[thread.index / kWarp];
  const unsigned bit = 1u << thread.index % kWarp;
  warp.live &= ~bit;
  if (block.waiting > 0) {
    const Thread& other = state.threads[block.first_waiting];
    stop_thread(other, Kind::divergence, other.code, "in __syncthreads", has_ended(thread));
  }
  cluster_thread_exited(thread);
  for (int i = warp.num_groups; i-- > 0;) {  // run_group puts the last, already seen, in the place of what it removes
    const Group& group = warp.groups[i];
    if ((group.mask & bit) != 0 && complete(warp, group)) run_group(warp, i, lanes_of(thread));
  }
}

void report_deadlock() {
  std::map<std::tuple<Code, std::string, int>, std::vector<int>> waiting;  // by where, for what, and the block's rank
  for (int i = 0; i < state.all_threads; ++i) {
    const Thread& thread = state.threads[i];
    if (thread.wait == Wait::exited) continue;
    std::string what = thread.waits_in;
    if (thread.wait == Wait::barrier) what += " of barrier " + std::to_string(thread.barrier);
    if (thread.wait == Wait::counter) what += " of one that is at " + std::to_string(thread.barrier);
    if (thread.wait == Wait::mbarrier) what += " of " + state_of_mbarrier(thread.barrier);
    waiting[{thread.code, what, thread.rank}].push_back(number_of(i));
  }
  Report finding{.kind = Kind::deadlock, .now = side(*current, current->code, current->waits_in)};
  finding.text =
      std::to_string(num_live) + " threads wait, " + std::to_string(state.all_threads - num_live) + " have ended";
  for (const auto& [key, threads] : waiting) {
    const auto& [code, what, rank] = key;
    std::string who;
    for (size_t i = 0; i < threads.size();) {
      size_t end = i + 1;
      while (end < threads.size() && threads[end] == threads[end - 1] + 1) ++end;
      if (!who.empty()) who += ", ";
      who += std::to_string(threads[i]);
      if (end > i + 1) who += "-" + std::to_string(threads[end - 1]);
      i = end;
    }
    if (state.cluster > 1) who += " of block " + std::to_string(state.block + rank);
    finding.notes.emplace_back("threads " + who + " wait " + what, code);
  }
  if (current->wait == Wait::exited && !waiting.empty()) {
    const auto& [key, threads] = *waiting.begin();
    const Thread& first = state.threads[std::get<int>(key) * state.num_threads + threads[0]];
    finding.now = side(first, first.code, first.waits_in);
  }
  stop(std::move(finding));
}

void warp_operation(unsigned mask, void* operand, Code code, const char* name, Finish finish) {
  Thread& me = *current;
  Warp& warp = warps[me.index / kWarp];
  const unsigned bit = 1u << me.index % kWarp;
  Thread* lanes = lanes_of(me);
  if ((mask & bit) == 0) stop_at(Kind::bad_call, code, name, "the lane is not in its own mask");
  me.operand = operand;
  me.code = code;
  me.waits_in = name;
  int index = 0;
  while (index < warp.num_groups && warp.groups[index].mask != mask) ++index;
  if (index == warp.num_groups) {
    warp.groups[warp.num_groups++] = {mask, bit, finish, code, me.index, name};
  } else {
    Group& group = warp.groups[index];
    const Thread& first = state.threads[group.first];
    if (group.finish != finish) {
      Report finding{
          .kind = Kind::divergence, .now = side(me, code, name), .before = side(first, group.code, group.name)};
      finding.text = "lanes of a warp that should meet call different functions";
      stop(std::move(finding));
    }
    if (group.code != code) report_different_places(me, code, first, group.code, name);
    group.arrived |= bit;
  }
  if (complete(warp, warp.groups[index])) {
    run_group(warp, index, lanes);
    yield(me, code, name);
  } else {
    wait(me, Wait::warp, code, name);
  }
}

void check_all_lanes(Thread* const* lanes, unsigned arrived, const char* did) {
  const Thread& any = *lanes[std::countr_zero(arrived)];
  if (arrived != kEveryLane) bad_call(any, any.code, did, "it wants all 32 lanes");
}

void sync_threads() {
  Thread& me = *current;
  const Code code = FASTFORMER_SIMT_CALLER;
  Block& block = blocks[me.rank];
  if (block.exited > 0) {
    stop_at(Kind::divergence, code, "in __syncthreads", has_ended(state.threads[block.last_exited]));
  }
  if (block.waiting == 0) {
    block.first_waiting = me.index;
  } else if (const Thread& first = state.threads[block.first_waiting]; first.code != code) {
    report_different_places(me, code, first, first.code, "in __syncthreads");
  }
  if (++block.waiting < state.num_threads) return wait(me, Wait::block, code, "in __syncthreads");
  block.waiting = 0;
  all_meet(&state.threads[me.rank * state.num_threads], state.num_threads);
  yield(me, code, "in __syncthreads");
}

void sync_warp(unsigned mask) {
  warp_operation(mask, nullptr, FASTFORMER_SIMT_CALLER, "in __syncwarp", [](Thread* const* lanes, unsigned arrived) {
    Clock* clock = nullptr;
    const Clock* last = nullptr;
    for (int i = 0; i < kWarp; ++i) {
      if ((arrived >> i & 1) == 0) continue;
      if (clock == nullptr) {
        clock = new_clock(lanes[i]->clock);
      } else if (lanes[i]->clock != last) {
        join(clock, lanes[i]->clock);
      }
      last = lanes[i]->clock;
    }
    const Time now = advance();
    for (int i = 0; i < kWarp; ++i) {
      if ((arrived >> i & 1) == 0) continue;
      clock->of[lanes[i]->index] = lanes[i]->time;
      lanes[i]->time = now;
    }
    for (int i = 0; i < kWarp; ++i) {
      if (arrived >> i & 1) set_clock(*lanes[i], clock);
    }
  });
}

unsigned active_mask() { return warps[current->index / kWarp].live; }

void trap() { stop_at(Kind::trap, FASTFORMER_SIMT_CALLER, "in __trap", "the kernel gave up"); }

void barrier_sync(int number, int threads) {
  const Code code = FASTFORMER_SIMT_CALLER;
  Thread& me = *current;
  Barrier& barrier = blocks[me.rank].barriers[number & 15];
  meet({number, threads}, code, "in barrier_sync");
  me.barrier = number;
  const bool last = arrive(barrier, me, number, threads, code, "in barrier_sync");
  barrier.waiting.push_back(me.index);
  if (!last) return wait(me, Wait::barrier, code, "in barrier_sync");
  open(barrier);
  yield(me, code, "in barrier_sync");
}

void barrier_arrive(int number, int threads) {
  Thread& me = *current;
  Barrier& barrier = blocks[me.rank].barriers[number & 15];
  const Code code = FASTFORMER_SIMT_CALLER;
  meet({number, threads}, code, "in barrier_arrive");
  const bool last = arrive(barrier, me, number, threads, code, "in barrier_arrive");
  me.time = advance();
  if (last) open(barrier);
}

}  // namespace simt
