// Counters in global memory, which put blocks in order, and additions to global memory, whose order must be fixed for
// their sum to be. Blocks run in theirs: what an earlier one has not counted, no later one can.
#include <algorithm>
#include <map>

#include "asynchronous.h"
#include "schedule.h"
#include "simt_hopper.h"

namespace simt {
namespace {

struct Waiting {
  const int* counter;
  int count, thread;
};
std::vector<Waiting> waiting;

// Of every block, the latest time that is over.
using Past = std::map<int64_t, Time>;
std::map<const int*, Past> counted;  // what came before the counts of a counter
std::map<int, Past> known;           // to threads of this block, by what they waited for

// The last addition to some bytes.
struct Added {
  uintptr_t end;
  Side by;
  Time time;
};
std::map<uintptr_t, Added> additions;  // by where the bytes begin

void learn(Past& past, const Past& from) {
  for (const auto& [block, time] : from) past[block] = std::max(past[block], time);
}

bool comes_after(const Thread& me, const Added& added) {
  if (added.by.block == state.block) {
    return added.by.thread == me.index || added.time <= me.clock->of[added.by.thread];
  }
  const Past& past = known[me.index];
  const auto found = past.find(added.by.block);
  return found != past.end() && added.time <= found->second;
}

}  // namespace

void begin_launch_counters() {
  counted.clear();
  additions.clear();
}

void begin_counters() {
  waiting.clear();
  known.clear();
}

void note_addition(const Thread& me, const void* to, size_t bytes, Code code) {
  const auto begin = reinterpret_cast<uintptr_t>(to), end = begin + bytes;
  auto at = additions.lower_bound(begin);
  while (at != additions.begin() && std::prev(at)->second.end > begin) --at;
  while (at != additions.end() && at->first < end) {
    if (!comes_after(me, at->second)) {
      Report finding{.kind = Kind::race, .now = side(me, code, "added to"), .before = at->second.by};
      finding.address = begin;
      finding.bytes = static_cast<int>(bytes);
      finding.text = "the sum depends on who comes first";
      report(std::move(finding));
    }
    at = additions.erase(at);
  }
  additions[begin] = {end, side(me, code, "added to"), me.time};
}

void count_up(int* counter) {
  const Code code = FASTFORMER_SIMT_CALLER;
  Thread& me = *current;
  need_actors();
  stop_in_clusters(code, "in count_up");
  access_range(me, counter, sizeof(int), Doing::atomic, code);
  if (const Code began = unfinished_add(me.index); began != 0) {
    Report finding{.kind = Kind::copy_under_way, .now = side(me, code, "in count_up")};
    finding.before = side(me, began, "began a bulk_add");
    report(std::move(finding));
  }
  Past& past = counted[counter];
  learn(past, known[me.index]);
  past[state.block] = me.time;
  ++*counter;
  me.time = advance();
  const auto reached = [&](const Waiting& other) { return other.counter == counter && other.count == *counter; };
  for (const Waiting& other : waiting) {
    if (!reached(other)) continue;
    learn(known[other.thread], past);
    wake(state.threads[other.thread]);
  }
  std::erase_if(waiting, reached);
}

void wait_for_count(const int* counter, int count) {
  const Code code = FASTFORMER_SIMT_CALLER;
  Thread& me = *current;
  need_actors();
  stop_in_clusters(code, "in wait_for_count");
  access_range(me, counter, sizeof(int), Doing::atomic, code);
  if (*counter == count) {
    learn(known[me.index], counted[counter]);
    wake(me);
    return yield(me, code, "in wait_for_count");
  }
  waiting.push_back({counter, count, me.index});
  me.barrier = *counter;
  wait(me, Wait::counter, code, "in wait_for_count");
}

}  // namespace simt
