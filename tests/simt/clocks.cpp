// Clocks: see runtime.h.
#include <algorithm>

#include "runtime.h"

namespace simt {
namespace {

std::vector<Clock*> free_clocks;

// A clock of what these threads know of all, themselves too.
Clock* learn(const Thread* threads, int count) {
  Clock* clock = blank_clock();
  const Clock* last = nullptr;
  for (int i = 0; i < count; ++i) {
    if (threads[i].clock != last) join(clock, threads[i].clock);
    last = threads[i].clock;
  }
  return clock;
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
    std::copy_n(copy_of->of, num_known(), clock->of);
    std::copy_n(copy_of->fenced, num_fenced(), clock->fenced);
  }
  return clock;
}

Clock* blank_clock() {
  Clock* clock = new_clock(nullptr);
  std::fill_n(clock->of, num_known(), Time{0});
  std::fill_n(clock->fenced, num_fenced(), Time{0});
  return clock;
}

void forget_actors(Clock* clock) {
  if (clock == nullptr) return;
  std::fill_n(clock->of + state.all_threads, state.cluster * kActors, Time{0});
  std::fill_n(clock->fenced, state.all_threads, Time{0});
}

void release(Clock* clock) {
  if (clock != nullptr && --clock->references == 0) free_clocks.push_back(clock);
}

void join(Clock* into, const Clock* other) {
  const int known = num_known(), fenced = num_fenced();
  for (int i = 0; i < known; ++i) into->of[i] = std::max(into->of[i], other->of[i]);
  for (int i = 0; i < fenced; ++i) into->fenced[i] = std::max(into->fenced[i], other->fenced[i]);
}

void join_actors(Clock* into, const Clock* other) {
  for (int i = state.all_threads; i < num_known(); ++i) into->of[i] = std::max(into->of[i], other->of[i]);
}

void set_clock(Thread& thread, Clock* clock) {
  ++clock->references;
  release(thread.clock);
  thread.clock = clock;
}

void all_meet(Thread* threads, int count) {
  const Time now = advance();
  // Where there is nothing but these threads, none knows of others.
  const bool others = state.actors || count < state.all_threads;
  Clock* clock = others ? learn(threads, count) : new_clock(nullptr);
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
