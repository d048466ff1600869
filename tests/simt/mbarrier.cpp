// mbarriers: arrivals release, waits acquire, and copies count bytes. What is under way to one is carried out when a
// thread waits for it and nothing else is missing. mbarrier_arrive_at is relaxed: of what its thread is ordered after
// it passes on what actors did.
#include <algorithm>
#include <array>
#include <utility>

#include "asynchronous.h"
#include "schedule.h"
#include "simt_hopper.h"

namespace simt {
namespace {

constexpr int kMostCount = (1 << 20) - 1;  // of arrivals, and of bytes

struct Mbarrier {
  uintptr_t address;
  int expected, missing;        // arrivals
  int bytes;                    // expected yet
  int parity;                   // of the phase that goes on
  Clock* arrived;               // what those that came pass on
  Clock* ended;                 // the same of the phase before
  Clock *from, *to;             // the last clock that learnt of `ended`, and what became of it
  std::vector<int> waiting;     // threads
  int woken;                    // of them, by the end of the phase before, that have not run since
  std::vector<Arrival> unseen;  // of other blocks
  size_t unseen_of_ended;       // of them, those of phases that have ended
  std::vector<BoxCopy> loads;
  std::vector<std::pair<Time, int>> issuers;  // from when on which thread began copies
  int maker;
  Mark made, fenced;  // by mbarrier_init and fence_mbarrier_init
};
std::array<Mbarrier, kMaxCluster * kMaxMbarriers> mbarriers;
std::array<int, kMaxCluster> counts;  // of each block

void drop(Clock*& clock) {
  release(clock);
  clock = nullptr;
}
void keep(Clock*& where, Clock* clock) {
  ++clock->references;
  release(where);
  where = clock;
}

int rank_of_mbarrier(int number) { return number / kMaxMbarriers; }

template <typename Each>
void for_all(int rank, Each each) {
  const int begin = rank * kMaxMbarriers;
  for (int i = begin; i < begin + counts[rank]; ++i) each(mbarriers[i]);
}
template <typename Each>
bool any_of_cluster(Each each) {
  for (int rank = 0; rank < state.cluster; ++rank) {
    const auto begin = mbarriers.begin() + rank * kMaxMbarriers;
    if (std::any_of(begin, begin + counts[rank], each)) return true;
  }
  return false;
}

int find_mbarrier(int rank, uintptr_t address) {
  const int begin = rank * kMaxMbarriers;
  for (int i = begin; i < begin + counts[rank]; ++i) {
    if (mbarriers[i].address == address) return i;
  }
  return -1;
}

std::string place(const Mbarrier& mbarrier) { return name_of_address(mbarrier.address); }

void report_unordered(const Thread& me, Code code, const Mbarrier& mbarrier) {
  Report finding{.kind = Kind::race, .now = side(me, code, "used an mbarrier of")};
  finding.before = side(state.threads[mbarrier.maker], mbarrier.made.code, "made");
  finding.address = mbarrier.address;
  finding.bytes = 8;
  report(std::move(finding));
}

// The number of one that is used.
int used(const Thread& me, int rank, uintptr_t address, Code code, const char* did) {
  need_actors();
  const int number = find_mbarrier(rank, address);
  if (number < 0) bad_call(me, code, did, "there is no mbarrier at " + name_of_address(address));
  const Mbarrier& mbarrier = mbarriers[number];
  if (!ordered(me, mbarrier.maker, mbarrier.made)) report_unordered(me, code, mbarrier);
  return number;
}

void check_fenced(const Thread& me, const Mbarrier& mbarrier, Code code, const char* did) {
  if (mbarrier.fenced.time != 0 && ordered(me, mbarrier.maker, mbarrier.fenced)) return;
  bad_call(me, code, did, "no fence_mbarrier_init since mbarrier_init of " + place(mbarrier));
}

// What this thread did, and is ordered after, is now part of `arrivals`.
void release_to(Clock* arrivals, Thread& thread) {
  join(arrivals, thread.clock);
  Time& known = arrivals->of[thread.index];
  known = std::max(known, thread.time);
  thread.time = advance();
}

// Of the phase that ended.
void acquire(Thread& thread, Mbarrier& mbarrier) {
  auto& unseen = mbarrier.unseen;
  unseen.erase(unseen.begin(), unseen.begin() + static_cast<int64_t>(std::exchange(mbarrier.unseen_of_ended, 0)));
  if (mbarrier.ended == nullptr) return;
  if (mbarrier.from != thread.clock) {
    Clock* clock = new_clock(thread.clock);
    join(clock, mbarrier.ended);
    keep(mbarrier.from, thread.clock);
    keep(mbarrier.to, clock);
  }
  set_clock(thread, mbarrier.to);
}

void end_phase(int number, Code code) {
  Mbarrier& mbarrier = mbarriers[number];
  for (const BoxCopy& load : mbarrier.loads) {
    carry_out(load);
    Time& known = mbarrier.arrived->of[load_actor(number)];
    known = std::max(known, load.time);
  }
  mbarrier.loads.clear();
  if (mbarrier.woken > 0) {
    Report finding{.kind = Kind::bad_call, .now = side(*current, code, "ended a phase of an mbarrier")};
    finding.text = "threads that wait for the phase before may not have seen that one end, at " + place(mbarrier);
    report(std::move(finding));
  }
  drop(mbarrier.from);
  drop(mbarrier.to);
  drop(mbarrier.ended);
  std::swap(mbarrier.ended, mbarrier.arrived);
  mbarrier.unseen_of_ended = mbarrier.unseen.size();
  mbarrier.parity ^= 1;
  mbarrier.missing = mbarrier.expected;
  mbarrier.bytes = 0;
  mbarrier.woken += static_cast<int>(mbarrier.waiting.size());
  for (int i : mbarrier.waiting) {
    acquire(state.threads[i], mbarrier);
    wake(state.threads[i]);
  }
  mbarrier.waiting.clear();
}

int bytes_under_way(const Mbarrier& mbarrier) {
  int bytes = 0;
  for (const BoxCopy& load : mbarrier.loads) bytes += load.bytes;
  return bytes;
}

// Ends the phase if it is time to.
void settle(int number, Code code, const char* did) {
  Mbarrier& mbarrier = mbarriers[number];
  if (mbarrier.missing > 0) return;
  const int coming = bytes_under_way(mbarrier);
  if (coming > mbarrier.bytes) {
    bad_call(*current, code, did,
             "copies of " + std::to_string(coming) + " bytes count for " + place(mbarrier) + ", which expects " +
                 std::to_string(mbarrier.bytes));
  }
  if (coming == mbarrier.bytes && (coming == 0 || !mbarrier.waiting.empty())) end_phase(number, code);
}

void arrive(int number, int bytes, bool relaxed, Code code, const char* did) {
  Thread& me = *current;
  Mbarrier& mbarrier = mbarriers[number];
  if (mbarrier.missing == 0) {
    bad_call(
        me, code, did,
        "more arrive than the " + std::to_string(mbarrier.expected) + " that " + place(mbarrier) + " was made for");
  }
  if (bytes < 0 || bytes > kMostCount - mbarrier.bytes) {
    bad_call(me, code, did, "an mbarrier counts up to 2^20 - 1 bytes");
  }
  mbarrier.bytes += bytes;
  if (mbarrier.arrived == nullptr) keep(mbarrier.arrived, blank_clock());
  if (relaxed) {
    join_actors(mbarrier.arrived, me.clock);
  } else {
    release_to(mbarrier.arrived, me);
  }
  if (me.rank != rank_of_mbarrier(number)) mbarrier.unseen.push_back({me.index, {me.time, code}, mbarrier.address});
  --mbarrier.missing;
  settle(number, code, did);
}

void arrive_here(const void* pointer, int bytes, Code code, const char* did) {
  arrive(used(*current, current->rank, reinterpret_cast<uintptr_t>(pointer), code, did), bytes, false, code, did);
}

}  // namespace

void begin_mbarriers() {
  for (int rank = 0; rank < kMaxCluster; ++rank) {
    for_all(rank, [](Mbarrier& mbarrier) {
      for (Clock** clock : {&mbarrier.arrived, &mbarrier.ended, &mbarrier.from, &mbarrier.to}) drop(*clock);
      mbarrier.waiting.clear();
      mbarrier.unseen.clear();
      mbarrier.loads.clear();
      mbarrier.issuers.clear();
    });
  }
  counts.fill(0);
}

void end_block_mbarriers(int rank) {
  for_all(rank, [&](const Mbarrier& mbarrier) {
    for (const BoxCopy& load : mbarrier.loads) {
      Report finding{.kind = Kind::copy_under_way};
      finding.now = side(state.threads[load.thread], load.code, "began a tma_load to");
      finding.address = load.shared;
      finding.bytes = load.bytes;
      finding.text = "the block ends, and nobody has waited for it";
      report(std::move(finding));
    }
  });
}

std::vector<Arrival> unseen_arrivals(int rank) {
  std::vector<Arrival> all;
  for_all(rank,
          [&](const Mbarrier& mbarrier) { all.insert(all.end(), mbarrier.unseen.begin(), mbarrier.unseen.end()); });
  return all;
}

int issuer_of(int number, Time time) {
  const auto& issuers = mbarriers[number].issuers;
  const auto after = std::upper_bound(issuers.begin(), issuers.end(), std::pair(time, state.all_threads));
  if (after != issuers.begin()) return std::prev(after)->second;
  return rank_of_mbarrier(number) * state.num_threads;
}

bool covers_mbarrier(uintptr_t address, size_t bytes) {
  return any_of_cluster(
      [&](const Mbarrier& mbarrier) { return mbarrier.address < address + bytes && address < mbarrier.address + 8; });
}

std::string state_of_mbarrier(int number) {
  const Mbarrier& mbarrier = mbarriers[number];
  return place(mbarrier) + ": its phase of parity " + std::to_string(mbarrier.parity) + " lacks " +
         std::to_string(mbarrier.missing) + " of " + std::to_string(mbarrier.expected) + " arrivals and expects " +
         std::to_string(mbarrier.bytes) + " bytes, with " + std::to_string(bytes_under_way(mbarrier)) + " under way";
}

bool find_load(uintptr_t address, size_t bytes, bool write, Report& report) {
  return any_of_cluster([&](const Mbarrier& mbarrier) {
    return std::any_of(mbarrier.loads.begin(), mbarrier.loads.end(),
                       [&](const BoxCopy& load) { return find_box_copy(load, address, bytes, write, report); });
  });
}

int mbarrier_for_copy(Thread& thread, int rank, uintptr_t address, Code code, const char* did) {
  const int number = used(thread, rank, address, code, did);
  check_fenced(thread, mbarriers[number], code, did);
  auto& issuers = mbarriers[number].issuers;
  if (issuers.empty() || issuers.back().second != thread.index) issuers.emplace_back(state.counter, thread.index);
  return number;
}

void add_load(int number, const BoxCopy& load, const char* did) {
  mbarriers[number].loads.push_back(load);
  settle(number, load.code, did);
}

void mbarrier_init(void* pointer, int arrivals) {
  const Code code = FASTFORMER_SIMT_CALLER;
  Thread& me = *current;
  const char* did = "in mbarrier_init";
  need_actors();
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (!in_shared(pointer)) bad_call(me, code, did, "an mbarrier lies in shared memory");
  if (arrivals < 1 || arrivals > kMostCount) bad_call(me, code, did, "an mbarrier counts 1 to 2^20 - 1 arrivals");
  if (find_mbarrier(me.rank, address) >= 0) bad_call(me, code, did, "it is one already: " + name_of_address(address));
  int& count = counts[me.rank];
  if (count == kMaxMbarriers) bad_call(me, code, did, "the emulator has no more than 64 in a block");
  access_as(me, pointer, 8, true, code);
  each_unit(pointer, 8, [](Unit& unit, unsigned mask) { unit.in_flight |= static_cast<uint16_t>(mask); });
  Mbarrier& mbarrier = mbarriers[me.rank * kMaxMbarriers + count++];
  mbarrier.address = address;
  mbarrier.expected = mbarrier.missing = arrivals;
  mbarrier.bytes = mbarrier.parity = mbarrier.woken = 0;
  mbarrier.unseen_of_ended = 0;
  mbarrier.maker = me.index;
  mbarrier.made = {me.time, code};
  mbarrier.fenced = {};
}

void fence_mbarrier_init() {
  need_actors();
  for_all(current->rank, [](Mbarrier& mbarrier) {
    if (mbarrier.maker == current->index && mbarrier.fenced.time == 0) mbarrier.fenced = {current->time, 0};
  });
}

void mbarrier_arrive(void* barrier) { arrive_here(barrier, 0, FASTFORMER_SIMT_CALLER, "in mbarrier_arrive"); }

void mbarrier_arrive_expect(void* barrier, int bytes) {
  arrive_here(barrier, bytes, FASTFORMER_SIMT_CALLER, "in mbarrier_arrive_expect");
}

void mbarrier_arrive_at(void* barrier, int rank) {
  const Code code = FASTFORMER_SIMT_CALLER;
  const char* did = "in mbarrier_arrive_at";
  const Thread& me = *current;
  check_block(me, rank, code, did);
  if (!in_shared(barrier)) bad_call(me, code, did, "it does not lie in the shared memory of the block itself");
  const uintptr_t address = reinterpret_cast<uintptr_t>(barrier) - shared_begin + shared_of(rank);
  touch_block(me, rank, Lasts::until_awaited, code, kArrived, address, 8);
  const int number = used(me, rank, address, code, did);
  if (rank != me.rank) check_fenced(me, mbarriers[number], code, did);
  arrive(number, 0, true, code, did);
}

void mbarrier_wait(void* barrier, int parity) {
  const Code code = FASTFORMER_SIMT_CALLER;
  const char* did = "in mbarrier_wait";
  Thread& me = *current;
  const int number = used(me, me.rank, reinterpret_cast<uintptr_t>(barrier), code, did);
  Mbarrier& mbarrier = mbarriers[number];
  if (parity != 0 && parity != 1) bad_call(me, code, did, "a parity is 0 or 1");
  if (mbarrier.parity != parity) {
    acquire(me, mbarrier);
    wake(me);
    return yield(me, code, did);
  }
  mbarrier.waiting.push_back(me.index);
  settle(number, code, did);
  if (mbarrier.parity == parity) {
    me.barrier = number;
    wait(me, Wait::mbarrier, code, did);
  } else {
    yield(me, code, did);
  }
  --mbarrier.woken;
}

}  // namespace simt
