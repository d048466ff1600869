// Actors, and what their accesses of memory are checked for.
#include "asynchronous.h"

#include <algorithm>

#include "simt_hopper.h"

namespace simt {
namespace {

Thread acting;  // whose clock is kept until the next one acts

void begin_acting(int actor) {
  acting.index = actor;
  acting.time = advance();
}

// Threads write memory by the generic proxy. The asynchronous one has what they wrote until they fenced it: in global
// memory, never.
[[gnu::noinline]] void report_proxy(const Thread& actor, bool write, Code code, uintptr_t address, int bytes,
                                    const Cell& cell) {
  Report finding{.kind = Kind::proxy, .now = side(actor, code, write ? "wrote" : "read")};
  finding.before = side(state.threads[cell.writer], cell.write.code & ~kAtomic, "wrote");
  finding.address = address;
  finding.bytes = bytes;
  if (!in_any_shared(reinterpret_cast<const void*>(address))) {
    finding.text = "TMA may not see what threads of the same launch write to global memory";
  } else if (rank_of(cell.writer) != rank_of_shared(address)) {
    finding.text = "the emulator knows no fence of what other blocks write";
  } else {
    finding.text = "no fence_proxy_async in between";
  }
  report(std::move(finding));
}

inline void check_fenced(const Thread& actor, const Unit& unit, bool write, uintptr_t base, bool shared, Code code) {
  for (int i = 0; i < 16 >> unit.shift; ++i) {
    const Cell& cell = unit.cells[i];
    if (cell.write.time == 0 || cell.writer >= state.all_threads) continue;
    if (shared && cell.write.time <= actor.clock->fenced[cell.writer] && rank_of(cell.writer) == rank_of_shared(base)) {
      continue;
    }
    if (!ordered(actor, cell.writer, cell.write)) continue;  // a race, which is reported as such
    report_proxy(actor, write, code, base + (i << unit.shift), 1 << unit.shift, cell);
  }
}

}  // namespace

int worker_of(int index, Time time) {
  if (index < state.all_threads) return index;
  const int rank = (index - state.all_threads) / kActors, actor = index - actors_of(rank);
  if (actor < kMaxWarps) return rank * state.num_threads + actor * kWarp;
  if (actor < 2 * kMaxWarps || actor >= 2 * kMaxWarps + kMaxMbarriers) return last_to_store(rank);
  return issuer_of(rank * kMaxMbarriers + actor - 2 * kMaxWarps, time);
}

Thread& act_for(const Thread& thread, int actor) {
  Clock* clock = new_clock(thread.clock);
  clock->of[thread.index] = thread.time;
  set_clock(acting, clock);
  begin_acting(actor);
  return acting;
}

Thread& act_for(Thread* const* lanes, int actor) {
  Clock* common = lanes[0]->clock;
  bool own = false;
  for (int lane = 1; lane < kWarp; ++lane) {
    const Clock* other = lanes[lane]->clock;
    if (other == lanes[lane - 1]->clock) continue;
    if (!own) common = new_clock(common);
    own = true;
    for (int i = 0; i < num_known(); ++i) common->of[i] = std::min(common->of[i], other->of[i]);
    for (int i = 0; i < num_fenced(); ++i) common->fenced[i] = std::min(common->fenced[i], other->fenced[i]);
  }
  set_clock(acting, common);
  begin_acting(actor);
  return acting;
}

void has_waited(Thread& thread, int actor, Time time) {
  if (thread.clock->of[actor] >= time) return;
  Clock* clock = new_clock(thread.clock);
  clock->of[actor] = time;
  set_clock(thread, clock);
}

void access_shared(Thread& actor, uintptr_t address, bool write, Code code) {
  const Time block = state.cluster_start;
  Unit& unit = shared_unit(address);
  if (unit.stamp == block) check_fenced(actor, unit, write, address, true, code);
  touch_unit({actor, write ? Doing::write : Doing::read, code, shared_readers}, unit, block, address, 0, 16);
  if (unit.in_flight != 0 || (write && unit.sources != 0)) report_copy(actor, write, code, address, 16);
  if (unit.life != block) {
    unit.life = block;
    unit.written = 0;
  }
  if (write) {
    unit.written = 0xffff;
  } else if (unit.written != 0xffff) {
    Report finding{.kind = Kind::uninitialised, .now = side(actor, code, "read")};
    finding.address = address;
    finding.bytes = 16;
    report(std::move(finding));
  }
}

void access_global(Thread& actor, const void* address, size_t bytes, Doing doing, Code code) {
  uintptr_t base = reinterpret_cast<uintptr_t>(address) & ~uintptr_t{15};
  each_unit(address, bytes, [&](Unit& unit, unsigned) {
    if (unit.stamp == state.launch_start) check_fenced(actor, unit, doing != Doing::read, base, false, code);
    base += 16;
  });
  access_range(actor, address, bytes, doing, code);
  if (doing != Doing::write) return;
  // What TMA wrote in this launch nobody may touch again, not even TMA.
  each_unit(address, bytes, [&](Unit& unit, unsigned) {
    for (int i = 0; i < 16 >> unit.shift; ++i) {
      if (unit.cells[i].writer == actor.index) ++unit.cells[i].writer;
    }
  });
}

void set_in_flight(uintptr_t address, size_t bytes, bool under_way) {
  for (uintptr_t at = address; at < address + bytes; at += 16) {
    shared_unit(at).in_flight = under_way ? 0xffff : 0;
  }
}

void set_read(const void* address, size_t bytes, bool under_way) {
  if (under_way) {
    each_unit(address, bytes, [](Unit& unit, unsigned) { ++unit.sources; });
  } else {
    each_unit(address, bytes, [](Unit& unit, unsigned) { --unit.sources; });
  }
}

uint32_t shared_address(const void* pointer) {
  const auto offset = reinterpret_cast<uintptr_t>(pointer) - shared_begin;
  if (in_kernel && !in_shared(pointer)) {
    bad_call(*current, FASTFORMER_SIMT_CALLER, "in shared_address", "it does not lie in shared memory");
  }
  return static_cast<uint32_t>(offset);
}

void fence_proxy_async() {
  need_actors();
  Thread& me = *current;
  Clock* clock = new_clock(me.clock);
  // It is of the block's own shared memory, and `fenced` of what a block's threads write to their own.
  const int begin = me.rank * state.num_threads;
  for (int i = begin; i < begin + state.num_threads; ++i) clock->fenced[i] = std::max(clock->fenced[i], clock->of[i]);
  clock->fenced[me.index] = me.time;
  set_clock(me, clock);
  me.time = advance();
}

}  // namespace simt
