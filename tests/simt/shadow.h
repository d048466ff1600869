// What is remembered of every byte that kernels write: who wrote it last and who has read it since; and what an access
// makes of that.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>

#include "runtime.h"

namespace simt {

constexpr uint16_t kManyReaders = 0xffff;
constexpr Code kAtomic = 0x80000000u;  // in the code of an access

// The access of one thread; time 0: none.
struct Mark {
  Time time;
  Code code;
};

// Neighbouring bytes that were always accessed together.
struct Cell {
  Mark write, read;  // many readers: read.time is the number of their set
  uint16_t writer, reader;
};

// 16 bytes of memory as 1 to 16 cells.
struct Unit {
  Time stamp;          // the cluster (shared memory) or launch (global) that the cells are of
  Time life;           // the cluster or call that `written` is of
  uint16_t written;    // bytes, a bit each
  uint16_t in_flight;  // bytes that a cp.async under way will write
  uint8_t shift;       // log2 of a cell's bytes
  uint16_t sources;    // cp.async's under way that read here
  Cell cells[16];
};

// Sets of readers, and of atomic accesses, of a cell: a mark a thread or actor, and one of any thread of another
// cluster.
class Readers {
 public:
  void clear() {
    used_ = 0;
    free_.clear();
  }
  Time add() {
    Time set;
    if (free_.empty()) {
      set = used_++;
      if (marks_.size() < size_t{used_} * size()) marks_.resize(size_t{used_} * size() * 2);
      if (bounds_.size() < used_) bounds_.resize(size_t{used_} * 2);
    } else {
      set = free_.back();
      free_.pop_back();
    }
    bounds_[set] = {kMostThreads + kMaxCluster * kActors, -1, 0, false};
    marks_[size_t{set} * size() + foreign()] = {};
    return set;
  }
  Time copy(Time of) {
    const Time set = add();
    bounds_[set] = bounds_[of];
    std::copy_n(&marks_[size_t{of} * size()], size(), &marks_[size_t{set} * size()]);
    return set;
  }
  void drop(Time set) { free_.push_back(set); }

  void put(Time set, int thread, Mark mark) {
    Mark* marks = &marks_[size_t{set} * size()];
    Bounds& bounds = bounds_[set];
    if (bounds.last < 0) {
      marks[thread] = {};
      bounds.first = bounds.last = thread;
    }
    while (thread < bounds.first) marks[--bounds.first] = {};
    while (thread > bounds.last) marks[++bounds.last] = {};
    Mark& mine = marks[thread];
    if (mine.time != 0 && mine.time < state.cluster_start) put_foreign(set, thread, mine);
    bounds.atomics |= (mark.code & kAtomic) != 0;
    // An atomic access is harder to be ordered with than a read, so it stays.
    if (mine.time == mark.time && (mine.code & kAtomic) != 0) return;
    mine = mark;
  }
  // A mark of another cluster.
  void put_foreign(Time set, int thread, Mark mark) {
    marks_[size_t{set} * size() + foreign()] = mark;
    bounds_[set].foreign = thread;
    bounds_[set].atomics |= (mark.code & kAtomic) != 0;
  }
  bool atomics(Time set) const { return bounds_[set].atomics; }
  // Calls each(thread, mark).
  template <typename Each>
  void for_each(Time set, Each each) {
    const Bounds bounds = bounds_[set];
    const Mark* marks = &marks_[size_t{set} * size()];
    for (int i = bounds.first; i <= bounds.last; ++i) {
      if (marks[i].time != 0) each(i, marks[i]);
    }
    if (const Mark mark = marks[foreign()]; mark.time != 0) each(bounds.foreign, mark);
  }

 private:
  struct Bounds {
    int first, last;  // threads that have marks
    int foreign;      // the thread of the mark of another cluster
    bool atomics;
  };
  size_t size() const { return foreign() + 1; }
  size_t foreign() const { return state.all_threads + state.cluster * kActors; }
  std::vector<Mark> marks_;
  std::vector<Bounds> bounds_;
  std::vector<Time> free_;
  Time used_ = 0;
};

char* reserve(size_t bytes);  // address space, which is zeros

// Shared memory (shared.cpp): that of each block of the cluster in a part of its own, with some around it.
constexpr size_t kAround = 1 << 20;  // addresses on either side that are taken for mistakes about it
constexpr size_t kSharedPart = kAround + kMostShared + kAround;
constexpr size_t kSharedArea = kMaxCluster * kSharedPart;
extern uintptr_t shared_area;
extern Unit* area_units;        // of the 16 bytes there, and so on
extern uintptr_t shared_begin;  // of the block that runs
extern Unit* shared_units;      // of the 16 bytes there, and so on
extern Readers shared_readers;
inline uintptr_t shared_of(int rank) { return shared_area + rank * kSharedPart + kAround; }
inline int rank_of_shared(uintptr_t address) { return static_cast<int>((address - shared_area) / kSharedPart); }
inline Unit& shared_unit(uintptr_t address) { return area_units[(address - shared_area) >> 4]; }
inline void enter_shared(int rank) {
  shared_begin = shared_of(rank);
  shared_units = &shared_unit(shared_begin);
}
// Whether it lies in or near the shared memory of the block that runs, or of any.
inline bool in_shared(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) - (shared_begin - kAround) < kSharedPart;
}
inline bool in_any_shared(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) - shared_area < kSharedArea;
}
void begin_launch_shared();
void forget_shared();  // all that is remembered of it

// That of the first of these bytes; nullptr if they are not watched.
Unit* unit_of(const void* address, size_t bytes);
// Calls each(unit, which of its bytes) for memory that is watched.
template <typename Each>
inline void each_unit(const void* address, size_t bytes, Each each) {
  Unit* unit = unit_of(address, bytes);
  if (unit == nullptr) return;
  const auto begin = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t at = begin; at < begin + bytes; ++unit) {
    const size_t count = std::min<size_t>(16 - (at & 15), begin + bytes - at);
    each(*unit, ((1u << count) - 1) << (at & 15));
    at += count;
  }
}
// Reports an access of bytes that are in flight, or a write of those that a copy under way reads.
void report_copy(const Thread& me, bool write, Code code, uintptr_t address, size_t bytes);

enum class Doing { read, write, atomic };

// An access of any bytes.
void access_range(Thread& thread, const void* address, size_t bytes, Doing doing, Code code);

inline const char* past(Doing doing) {
  return doing == Doing::read ? "read" : doing == Doing::write ? "wrote" : "changed atomically";
}

void report_race(const Thread& me, Doing doing, Code code, uintptr_t address, int bytes, int thread, Mark mark,
                 const char* did);

// Whether what `mark` says is ordered before what `me` does now.
inline bool ordered(const Thread& me, int thread, Mark mark) {
  if (mark.time == 0) return true;
  return mark.time >= state.cluster_start && (thread == me.index || mark.time <= me.clock->of[thread]);
}

// How memory is accessed, and by whom.
struct Touch {
  Thread& me;
  Doing doing;
  Code code;
  Readers& readers;
};

inline void touch(const Touch& how, Cell& cell, uintptr_t address, int bytes) {
  Thread& me = how.me;
  const Mark mine{me.time, how.doing == Doing::atomic ? how.code | kAtomic : how.code};
  if (how.doing == Doing::read && cell.reader == me.index && cell.read.time == me.time) return;
  const auto against = [&](int thread, Mark mark, const char* did) {
    if (!ordered(me, thread, mark)) {
      report_race(me, how.doing, how.code, address, bytes, thread, mark, did);
    }
  };
  against(cell.writer, cell.write, "wrote");
  const bool many = cell.reader == kManyReaders && cell.read.time != 0;
  const Time set = cell.read.time - 1;
  if (how.doing == Doing::write) {
    if (many) {
      how.readers.for_each(set, [&](int thread, Mark mark) { against(thread, mark, "read"); });
      how.readers.drop(set);
    } else {
      against(cell.reader, cell.read, "read");
    }
    cell.write = mine;
    cell.writer = static_cast<uint16_t>(me.index);
    cell.read = {};
    cell.reader = 0;
    return;
  }
  if (many) {
    if (how.doing == Doing::atomic || how.readers.atomics(set)) {
      how.readers.for_each(set, [&](int thread, Mark mark) {
        if (((mark.code & kAtomic) != 0) != (how.doing == Doing::atomic)) against(thread, mark, "read");
      });
    }
    how.readers.put(set, me.index, mine);
    return;
  }
  if (how.doing == Doing::read && (cell.read.time == 0 || ordered(me, cell.reader, cell.read))) {
    cell.read = mine;
    cell.reader = static_cast<uint16_t>(me.index);
    return;
  }
  // What another cluster has read no later one may write: of who else reads it nothing need be remembered.
  if (how.doing == Doing::read && cell.read.time < state.cluster_start) return;
  if (how.doing == Doing::atomic) against(cell.reader, cell.read, "read");
  const Time added = how.readers.add();
  if (cell.read.time >= state.cluster_start) {
    how.readers.put(added, cell.reader, cell.read);
  } else if (cell.read.time != 0) {
    how.readers.put_foreign(added, cell.reader, cell.read);
  }
  how.readers.put(added, me.index, mine);
  cell.read = {added + 1, 0};
  cell.reader = kManyReaders;
}

// Makes every cell of `unit` as small as 1 << shift bytes.
[[gnu::noinline]] inline void split(Unit& unit, int shift, Readers& readers) {
  const int factor = 1 << (unit.shift - shift);
  for (int i = (16 >> unit.shift) - 1; i >= 0; --i) {
    const Cell cell = unit.cells[i];
    for (int k = factor - 1; k >= 0; --k) {
      Cell& part = unit.cells[i * factor + k];
      part = cell;
      if (k > 0 && cell.reader == kManyReaders && cell.read.time != 0) {
        part.read.time = readers.copy(cell.read.time - 1) + 1;
      }
    }
  }
  unit.shift = static_cast<uint8_t>(shift);
}

// `count` bytes from byte `offset` of the unit, which lies at `base`.
inline void touch_unit(const Touch& how, Unit& unit, Time stamp, uintptr_t base, int offset, int count) {
  const int shift = std::countr_zero(static_cast<unsigned>(offset | count));
  if (unit.stamp != stamp) {
    unit.stamp = stamp;
    unit.shift = static_cast<uint8_t>(shift);
    unit.in_flight = 0;
    unit.sources = 0;
    std::memset(unit.cells, 0, sizeof(Cell) * (16 >> shift));
  } else if (unit.shift > shift) {
    split(unit, shift, how.readers);
  }
  const int last = (offset + count - 1) >> unit.shift;
  for (int i = offset >> unit.shift; i <= last; ++i) {
    touch(how, unit.cells[i], base + (i << unit.shift), 1 << unit.shift);
  }
  if (count == 16 && how.doing == Doing::write) unit.shift = 4;  // all its cells are the same now
}

}  // namespace simt
