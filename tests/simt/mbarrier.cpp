// mbarriers: arrivals release, waits acquire, and copies count bytes. What is under way to one is carried out when a
// thread waits for it and nothing else is missing.
#include <algorithm>
#include <array>

#include "asynchronous.h"
#include "schedule.h"
#include "simt_hopper.h"

namespace simt {
namespace {

constexpr int kMostCount = (1 << 20) - 1;  // of arrivals, and of bytes

struct Mbarrier {
  uintptr_t address;
  int expected, missing;     // arrivals
  int bytes;                 // expected yet
  int parity;                // of the phase that goes on
  Clock* arrived;            // what those that came are ordered after
  Clock* ended;              // the same of the phase before
  Clock *from, *to;          // the last clock that learnt of `ended`, and what became of it
  std::vector<int> waiting;  // threads
  int woken;                 // of them, by the end of the phase before, that have not run since
  std::vector<BoxCopy> loads;
  int issuer;
  int maker;
  Mark made, fenced;  // by mbarrier_init and fence_mbarrier_init
};
std::array<Mbarrier, kMaxMbarriers> mbarriers;
int count;

void drop(Clock*& clock) {
  release(clock);
  clock = nullptr;
}
void keep(Clock*& where, Clock* clock) {
  ++clock->references;
  release(where);
  where = clock;
}

int number_of(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  for (int i = 0; i < count; ++i) {
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
int used(Thread& me, const void* pointer, Code code, const char* did) {
  need_actors(code, did);
  const int number = number_of(pointer);
  if (number < 0) {
    bad_call(me, code, did, "there is no mbarrier at " + name_of_address(reinterpret_cast<uintptr_t>(pointer)));
  }
  const Mbarrier& mbarrier = mbarriers[number];
  if (!ordered(me, mbarrier.maker, mbarrier.made)) report_unordered(me, code, mbarrier);
  return number;
}

void acquire(Thread& thread, Mbarrier& mbarrier) {
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

void arrive(const void* pointer, int bytes, Code code, const char* did) {
  Thread& me = *current;
  const int number = used(me, pointer, code, did);
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
  if (mbarrier.arrived == nullptr) {
    mbarrier.arrived = new_clock(me.clock);
    mbarrier.arrived->references = 1;
  } else {
    join(mbarrier.arrived, me.clock);
  }
  Time& known = mbarrier.arrived->of[me.index];
  known = std::max(known, me.time);
  me.time = advance();
  --mbarrier.missing;
  settle(number, code, did);
}

}  // namespace

void begin_block_mbarriers() {
  for (int i = 0; i < count; ++i) {
    Mbarrier& mbarrier = mbarriers[i];
    for (Clock** clock : {&mbarrier.arrived, &mbarrier.ended, &mbarrier.from, &mbarrier.to}) drop(*clock);
    mbarrier.waiting.clear();
    mbarrier.loads.clear();
  }
  count = 0;
}

void end_block_mbarriers() {
  for (int i = 0; i < count; ++i) {
    for (const BoxCopy& load : mbarriers[i].loads) {
      Report finding{.kind = Kind::copy_under_way};
      finding.now = side(state.threads[load.thread], load.code, "began a tma_load");
      finding.text = "the block ends, and nobody has waited for it";
      report(std::move(finding));
    }
  }
}

int issuer_of(int mbarrier) { return mbarriers[mbarrier].issuer; }

bool covers_mbarrier(uintptr_t address, size_t bytes) {
  for (int i = 0; i < count; ++i) {
    if (mbarriers[i].address < address + bytes && address < mbarriers[i].address + 8) return true;
  }
  return false;
}

std::string state_of_mbarrier(int number) {
  const Mbarrier& mbarrier = mbarriers[number];
  return place(mbarrier) + ": its phase of parity " + std::to_string(mbarrier.parity) + " lacks " +
         std::to_string(mbarrier.missing) + " of " + std::to_string(mbarrier.expected) + " arrivals and expects " +
         std::to_string(mbarrier.bytes) + " bytes, with " + std::to_string(bytes_under_way(mbarrier)) + " under way";
}

bool find_load(uintptr_t address, size_t bytes, bool write, Report& report) {
  for (int i = 0; i < count; ++i) {
    for (const BoxCopy& load : mbarriers[i].loads) {
      if (find_box_copy(load, address, bytes, write, report)) return true;
    }
  }
  return false;
}

int mbarrier_for_copy(Thread& thread, const void* pointer, Code code, const char* did) {
  const int number = used(thread, pointer, code, did);
  Mbarrier& mbarrier = mbarriers[number];
  if (mbarrier.fenced.time == 0 || !ordered(thread, mbarrier.maker, mbarrier.fenced)) {
    bad_call(thread, code, did, "no fence_mbarrier_init since mbarrier_init of " + place(mbarrier));
  }
  mbarrier.issuer = thread.index;
  return number;
}

void add_load(int number, const BoxCopy& load) {
  mbarriers[number].loads.push_back(load);
  settle(number, load.code, "in tma_load");
}

void mbarrier_init(void* pointer, int arrivals) {
  const Code code = FASTFORMER_SIMT_CALLER;
  Thread& me = *current;
  const char* did = "in mbarrier_init";
  need_actors(code, did);
  if (!in_shared(pointer)) bad_call(me, code, did, "an mbarrier lies in shared memory");
  if (arrivals < 1 || arrivals > kMostCount) bad_call(me, code, did, "an mbarrier counts 1 to 2^20 - 1 arrivals");
  if (number_of(pointer) >= 0) bad_call(me, code, did, "it is one already: " + place(mbarriers[number_of(pointer)]));
  if (count == kMaxMbarriers) bad_call(me, code, did, "the emulator has no more than 64 in a block");
  access_as(me, pointer, 8, true, code);
  each_unit(pointer, 8, [](Unit& unit, unsigned mask) { unit.in_flight |= static_cast<uint16_t>(mask); });
  Mbarrier& mbarrier = mbarriers[count++];
  mbarrier.address = reinterpret_cast<uintptr_t>(pointer);
  mbarrier.expected = mbarrier.missing = arrivals;
  mbarrier.bytes = mbarrier.parity = mbarrier.woken = 0;
  mbarrier.maker = mbarrier.issuer = me.index;
  mbarrier.made = {me.time, code};
  mbarrier.fenced = {};
}

void fence_mbarrier_init() {
  need_actors(FASTFORMER_SIMT_CALLER, "in fence_mbarrier_init");
  for (int i = 0; i < count; ++i) {
    if (mbarriers[i].maker == current->index && mbarriers[i].fenced.time == 0) mbarriers[i].fenced = {current->time, 0};
  }
}

void mbarrier_arrive(void* barrier) { arrive(barrier, 0, FASTFORMER_SIMT_CALLER, "in mbarrier_arrive"); }

void mbarrier_arrive_expect(void* barrier, int bytes) {
  arrive(barrier, bytes, FASTFORMER_SIMT_CALLER, "in mbarrier_arrive_expect");
}

void mbarrier_wait(void* pointer, int parity) {
  const Code code = FASTFORMER_SIMT_CALLER;
  const char* did = "in mbarrier_wait";
  Thread& me = *current;
  const int number = used(me, pointer, code, did);
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
