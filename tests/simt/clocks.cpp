// Clocks: see runtime.h.
#include <algorithm>

#include "runtime.h"

namespace simt {
namespace {

std::vector<Clock*> free_clocks;

// A clock of what these threads know of all, themselves too.
void learn(Clock* clock, const Thread* threads, int count) {
  std::fill_n(clock->of, state.all_threads + (state.actors ? kActors : 0), Time{0});
  if (state.actors) std::fill_n(clock->fenced, state.num_threads, Time{0});
  const Clock* last = nullptr;
  for (int i = 0; i < count; ++i) {
    if (threads[i].clock != last) join(clock, threads[i].clock);
    last = threads[i].clock;
  }
}

}  // namespace

Clock* new_clock(const Clock* copy_of) {
  Clock* clock;
  if (free_clocks.empty()) {
    clock = new Clock;
  } else {
    clock = free_clocks.back();
    free_clocks.pop_back();
  }
  clock->references = 0;
  if (copy_of != nullptr) {
    std::copy_n(copy_of->of, state.all_threads + (state.actors ? kActors : 0), clock->of);
    if (state.actors) std::copy_n(copy_of->fenced, state.num_threads, clock->fenced);
  }
  return clock;
}

void release(Clock* clock) {
  if (clock != nullptr && --clock->references == 0) free_clocks.push_back(clock);
}

void join(Clock* into, const Clock* other) {
  const int known = state.all_threads + (state.actors ? kActors : 0);
  for (int i = 0; i < known; ++i) into->of[i] = std::max(into->of[i], other->of[i]);
  if (!state.actors) return;
  for (int i = 0; i < state.num_threads; ++i) into->fenced[i] = std::max(into->fenced[i], other->fenced[i]);
}

void set_clock(Thread& thread, Clock* clock) {
  ++clock->references;
  release(thread.clock);
  thread.clock = clock;
}

void all_meet(Thread* threads, int count) {
  const Time now = advance();
  Clock* clock = new_clock(nullptr);
  // Else there is nothing but these threads.
  if (state.actors || count < state.all_threads) learn(clock, threads, count);
  for (int i = 0; i < count; ++i) {
    clock->of[threads[i].index] = threads[i].time;
    threads[i].time = now;
  }
  for (int i = 0; i < count; ++i) {
    set_clock(threads[i], clock);
    wake(threads[i]);
  }
}

}  // namespace simt
