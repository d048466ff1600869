// Every access of a kernel: is it inside what the launch may touch, aligned, initialised, and ordered with all others?
#include <sys/mman.h>

#include <cstring>
#include <limits>
#include <stdexcept>

#include "asynchronous.h"
#include "runtime.h"
#include "schedule.h"
#include "shadow.h"

namespace simt {

namespace {

struct Region {
  uintptr_t begin, end;
  Unit* units;  // of writable memory; the first is that of the 16 bytes around `begin`
  bool unwritten;
};
struct Range {
  uintptr_t begin, end;
};

constexpr size_t kArena = size_t{1} << 36;

std::vector<Region> writable, readable;
std::vector<Range> unwritten_ranges;
Time call = 1;

char* arena = nullptr;
size_t arena_used = 0;

Readers global_readers;

Unit* new_units(const Range& range) {
  if (arena == nullptr) arena = reserve(kArena);
  const size_t bytes = ((range.end - 1) / 16 - range.begin / 16 + 1) * sizeof(Unit);
  if (arena_used + bytes > kArena) throw std::runtime_error("simt: tensors too large for the shadow memory");
  Unit* units = reinterpret_cast<Unit*>(arena + arena_used);
  arena_used += bytes;
  return units;
}

Side before(int thread, Mark mark, const char* did) {
  const auto after = std::upper_bound(state.starts.begin(), state.starts.end(), mark.time);
  Side side;
  const int worker = worker_of(thread, mark.time);
  side.block = (after - state.starts.begin() - 1) * state.cluster + rank_of(worker);
  side.thread = number_of(worker);
  side.code = mark.code & ~kAtomic;
  side.did = (mark.code & kAtomic) != 0 ? past(Doing::atomic) : did;
  return side;
}

Report finding_at(Kind kind, const Thread& me, bool write, Code code, uintptr_t address, size_t bytes) {
  Report finding{.kind = kind, .now = side(me, code, write ? "wrote" : "read")};
  finding.address = address;
  finding.bytes = static_cast<int>(bytes);
  return finding;
}

const Region* find(const std::vector<Region>& regions, uintptr_t address, size_t bytes) {
  for (const Region& region : regions) {
    if (address >= region.begin && address + bytes <= region.end) return &region;
  }
  return nullptr;
}

bool reads_all_ones(uintptr_t address, int bytes) {
  const auto* data = reinterpret_cast<const unsigned char*>(address);
  return std::all_of(data, data + bytes, [](unsigned char byte) { return byte == 0xff; });
}

template <bool kShared>
inline void touch_all(const Touch& how, Unit* units, uintptr_t origin, uintptr_t address, size_t bytes,
                      bool check_written) {
  const Time stamp = kShared ? state.cluster_start : state.launch_start;
  const Time life = kShared ? state.cluster_start : call;
  const bool write = how.doing != Doing::read;
  size_t index = (address >> 4) - (origin >> 4);
  for (uintptr_t at = address; at < address + bytes; ++index) {
    const int offset = static_cast<int>(at & 15);
    const int count = static_cast<int>(std::min<size_t>(16 - offset, address + bytes - at));
    Unit& unit = units[index];
    touch_unit(how, unit, stamp, at - offset, offset, count);
    const unsigned mask = ((1u << count) - 1) << offset;
    if ((unit.in_flight & mask) != 0 || (write && unit.sources != 0)) {
      report_copy(how.me, write, how.code, at, count);
    }
    if (unit.life != life) {
      unit.life = life;
      unit.written = 0;
    }
    if (how.doing != Doing::write && check_written && (unit.written & mask) != mask &&
        (kShared || reads_all_ones(at, count))) {
      report(finding_at(Kind::uninitialised, how.me, false, how.code, at, count));
    }
    if (write) unit.written |= static_cast<uint16_t>(mask);
    at += count;
  }
}

const Region* last_writable = nullptr;
const Region* last_readable = nullptr;

inline bool inside(const Region* region, uintptr_t address, size_t bytes) {
  return region != nullptr && address >= region->begin && address + bytes <= region->end;
}

// Of another block.
[[gnu::noinline]] void access_other_shared(const Touch& how, uintptr_t address, size_t bytes) {
  check_other_shared(how.me, how.doing != Doing::read, how.code, address, bytes);
  touch_all<true>(how, area_units, shared_area, address, bytes, true);
}

template <Doing kDoing>
inline void access(Thread& me, uintptr_t address, size_t bytes, Code code) {
  constexpr bool kWrite = kDoing != Doing::read;
  if (++state.accesses > state.most_accesses) stop_endless(code, "it loops and waits for no other thread");
  if (address - (shared_begin - kAround) < kSharedPart) {
    if (address < shared_begin || address + bytes > shared_begin + state.launch.shared_bytes) {
      stop(finding_at(Kind::out_of_bounds, me, kWrite, code, address, bytes));
    }
    return touch_all<true>({me, kDoing, code, shared_readers}, shared_units, shared_begin, address, bytes, true);
  }
  if (is_free(address)) return;
  if (!inside(last_writable, address, bytes)) {
    if (!kWrite && inside(last_readable, address, bytes)) return;
    const Region* region = find(writable, address, bytes);
    if (region == nullptr) {
      if (address - shared_area < kSharedArea) {
        return access_other_shared({me, kDoing, code, shared_readers}, address, bytes);
      }
      const Region* read_only = find(readable, address, bytes);
      const bool of_host = address >= reinterpret_cast<uintptr_t>(&__ehdr_start) &&
                           address + bytes <= reinterpret_cast<uintptr_t>(&_end);
      if (kWrite) {
        stop(finding_at(read_only != nullptr ? Kind::read_only : Kind::out_of_bounds, me, true, code, address, bytes));
      }
      if (read_only != nullptr) {
        // Only one that nothing writable lies in: of a read there, nothing more is checked.
        const bool apart = std::none_of(writable.begin(), writable.end(), [&](const Region& region) {
          return region.begin < read_only->end && read_only->begin < region.end;
        });
        if (apart) last_readable = read_only;
      } else if (!of_host) {
        stop(finding_at(Kind::out_of_bounds, me, false, code, address, bytes));
      }
      return;
    }
    last_writable = region;
  }
  touch_all<false>({me, kDoing, code, global_readers}, last_writable->units, last_writable->begin, address, bytes,
                   last_writable->unwritten);
}

template <Doing kDoing>
inline void aligned_access(Thread& me, const void* pointer, size_t bytes, Code code) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if ((address & (bytes - 1)) != 0 && !is_free(address)) {
    stop(finding_at(Kind::misaligned, me, kDoing != Doing::read, code, address, bytes));
  }
  access<kDoing>(me, address, bytes, code);
}

}  // namespace

void report_race(const Thread& me, Doing doing, Code code, uintptr_t address, int bytes, int thread, Mark mark,
                 const char* did) {
  Report finding{.kind = Kind::race, .now = side(me, code, past(doing)), .before = before(thread, mark, did)};
  finding.address = address;
  finding.bytes = bytes;
  report(std::move(finding));
}

void begin_launch_memory() {
  begin_launch_shared();
  // Time starts again before it runs out; nothing of before may be left then.
  if (state.counter > std::numeric_limits<Time>::max() / 2) {
    state.counter = 0;
    forget_shared();
    if (arena != nullptr) madvise(arena, kArena, MADV_DONTNEED);
  }
  global_readers.clear();
  last_writable = last_readable = nullptr;
}

void forget_memory() {
  writable.clear();
  readable.clear();
  unwritten_ranges.clear();
  last_writable = last_readable = nullptr;
  constexpr size_t kKept = size_t{1} << 28;
  if (arena_used > kKept) madvise(arena + kKept, arena_used - kKept, MADV_DONTNEED);
  arena_used = 0;
  ++call;
}

void allow(const void* begin, int64_t bytes, Access access) {
  if (begin == nullptr || bytes <= 0) return;
  Range range{reinterpret_cast<uintptr_t>(begin), reinterpret_cast<uintptr_t>(begin) + bytes};
  if (access == Access::read) {
    if (find(readable, range.begin, bytes) == nullptr) readable.push_back({range.begin, range.end, nullptr, false});
    return;
  }
  if (find(writable, range.begin, bytes) != nullptr) return;
  bool unwritten = false;
  for (const Range& fresh : unwritten_ranges) unwritten |= range.begin >= fresh.begin && range.end <= fresh.end;
  // Views of one tensor may interleave: together they are one region.
  for (size_t i = 0; i < writable.size();) {
    const Region& region = writable[i];
    if (region.begin < range.end && range.begin < region.end) {
      range = {std::min(range.begin, region.begin), std::max(range.end, region.end)};
      unwritten = false;
      writable.erase(writable.begin() + static_cast<int64_t>(i));
      i = 0;
    } else {
      ++i;
    }
  }
  writable.push_back({range.begin, range.end, new_units(range), unwritten});
}

void unwritten(void* begin, int64_t bytes) {
  if (begin == nullptr || bytes <= 0) return;
  std::memset(begin, 0xff, bytes);
  unwritten_ranges.push_back({reinterpret_cast<uintptr_t>(begin), reinterpret_cast<uintptr_t>(begin) + bytes});
}

std::string name_of_address(uintptr_t address) {
  const auto offset = [](uintptr_t at, uintptr_t from) {
    return at >= from ? " + " + std::to_string(at - from) : " - " + std::to_string(from - at);
  };
  if (address - shared_area < kSharedArea) {
    const int rank = std::min(rank_of_shared(address), state.cluster - 1);
    const std::string name =
        "shared" + offset(address, shared_of(rank)) + " (of " + std::to_string(state.launch.shared_bytes) + " bytes)";
    return state.cluster == 1 ? name : name + " of block " + std::to_string(rank) + " of its cluster";
  }
  if (std::string stack = name_of_stack(address); !stack.empty()) return stack;
  // Of the arguments that lie before the address, or else of all, the nearest.
  std::string name = "an address that is nobody's";
  uintptr_t nearest = UINTPTR_MAX;
  for (int i = 0; i < state.launch.num_arguments; ++i) {
    const auto argument = reinterpret_cast<uintptr_t>(state.launch.pointers[i]);
    if (argument == 0) continue;
    const uintptr_t distance = address >= argument ? address - argument : argument - address;
    if (distance >= nearest || distance > (uintptr_t{1} << 40)) continue;
    nearest = distance;
    name = "argument " + std::to_string(i) + offset(address, argument);
    for (const auto* regions : {&writable, &readable}) {
      for (const Region& region : *regions) {
        if (argument < region.begin || argument >= region.end) continue;
        name = "argument " + std::to_string(i) + offset(address, argument) + " (of " +
               std::to_string(region.end - argument) + " bytes)";
      }
    }
  }
  if (nearest == UINTPTR_MAX) {  // the tensors of structs
    for (size_t i = 0; i + sizeof(uintptr_t) <= state.launch.arguments_bytes; i += sizeof(uintptr_t)) {
      uintptr_t pointer;
      std::memcpy(&pointer, static_cast<const char*>(state.launch.arguments) + i, sizeof(pointer));
      const Region* region = find(writable, pointer, 1);
      if (region == nullptr) region = find(readable, pointer, 1);
      const uintptr_t distance = address >= pointer ? address - pointer : pointer - address;
      if (region == nullptr || distance >= nearest || distance > (uintptr_t{1} << 40)) continue;
      nearest = distance;
      name =
          "a struct's pointer" + offset(address, pointer) + " (of " + std::to_string(region->end - pointer) + " bytes)";
    }
  }
  return name;
}

void access_as(Thread& thread, const void* address, size_t bytes, bool write, Code code) {
  if (write) {
    aligned_access<Doing::write>(thread, address, bytes, code);
  } else {
    aligned_access<Doing::read>(thread, address, bytes, code);
  }
}

void access_range(Thread& thread, const void* pointer, size_t bytes, Doing doing, Code code) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  switch (doing) {
    case Doing::read:
      return access<Doing::read>(thread, address, bytes, code);
    case Doing::write:
      return access<Doing::write>(thread, address, bytes, code);
    case Doing::atomic:
      return access<Doing::atomic>(thread, address, bytes, code);
  }
}

Unit* unit_of(const void* address, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  if (in_any_shared(address)) return &shared_unit(begin);
  const Region* region = find(writable, begin, bytes);
  return region == nullptr ? nullptr : region->units + ((begin >> 4) - (region->begin >> 4));
}

void check_sees_shared(Thread& thread, const void* pointer, Code code) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const Unit& unit = shared_unit(address);
  for (int i = 0; i < 16 >> unit.shift; ++i) {
    const Cell& cell = unit.cells[i];
    if (ordered(thread, cell.writer, cell.write)) continue;
    report_race(thread, Doing::read, code, address + (i << unit.shift), 1 << unit.shift, cell.writer, cell.write,
                past(Doing::write));
  }
}

#define FASTFORMER_SIMT_LOAD(bytes, type)                                                      \
  type load##bytes(const void* from) {                                                         \
    if (in_kernel) aligned_access<Doing::read>(*current, from, bytes, FASTFORMER_SIMT_CALLER); \
    return *static_cast<const type*>(from);                                                    \
  }                                                                                            \
  void store##bytes(void* to, type value) {                                                    \
    if (in_kernel) aligned_access<Doing::write>(*current, to, bytes, FASTFORMER_SIMT_CALLER);  \
    *static_cast<type*>(to) = value;                                                           \
  }
FASTFORMER_SIMT_LOAD(1, uint8_t)
FASTFORMER_SIMT_LOAD(2, uint16_t)
FASTFORMER_SIMT_LOAD(4, uint32_t)
FASTFORMER_SIMT_LOAD(8, uint64_t)
FASTFORMER_SIMT_LOAD(16, unsigned __int128)

void atomic_access(const void* address, size_t bytes) {
  aligned_access<Doing::atomic>(*current, address, bytes, FASTFORMER_SIMT_CALLER);
}

}  // namespace simt

// What -fsanitize=thread makes of the kernels' code.
#define FASTFORMER_SIMT_HOOK(bytes)                                                                \
  void __tsan_read##bytes(void* address) {                                                         \
    using namespace simt;                                                                          \
    if (in_kernel) aligned_access<Doing::read>(*current, address, bytes, FASTFORMER_SIMT_CALLER);  \
  }                                                                                                \
  void __tsan_write##bytes(void* address) {                                                        \
    using namespace simt;                                                                          \
    if (in_kernel) aligned_access<Doing::write>(*current, address, bytes, FASTFORMER_SIMT_CALLER); \
  }

extern "C" {
// What simt.h calls these in the kernels' files.
#define FASTFORMER_SIMT_COPY(name)                                                                     \
  void* fastformer_simt_##name(void* to, const void* from, size_t bytes) {                             \
    using namespace simt;                                                                              \
    if (in_kernel && bytes != 0) {                                                                     \
      access<Doing::read>(*current, reinterpret_cast<uintptr_t>(from), bytes, FASTFORMER_SIMT_CALLER); \
      access<Doing::write>(*current, reinterpret_cast<uintptr_t>(to), bytes, FASTFORMER_SIMT_CALLER);  \
    }                                                                                                  \
    return std::name(to, from, bytes);                                                                 \
  }
FASTFORMER_SIMT_COPY(memcpy)
FASTFORMER_SIMT_COPY(memmove)
void* fastformer_simt_memset(void* to, int value, size_t bytes) {
  using namespace simt;
  if (in_kernel && bytes != 0) {
    access<Doing::write>(*current, reinterpret_cast<uintptr_t>(to), bytes, FASTFORMER_SIMT_CALLER);
  }
  return std::memset(to, value, bytes);
}
FASTFORMER_SIMT_HOOK(1)
FASTFORMER_SIMT_HOOK(2)
FASTFORMER_SIMT_HOOK(4)
FASTFORMER_SIMT_HOOK(8)
FASTFORMER_SIMT_HOOK(16)
void __tsan_read_range(void* address, size_t bytes) {
  using namespace simt;
  if (!in_kernel || bytes == 0) return;
  access<Doing::read>(*current, reinterpret_cast<uintptr_t>(address), bytes, FASTFORMER_SIMT_CALLER);
}
void __tsan_write_range(void* address, size_t bytes) {
  using namespace simt;
  if (!in_kernel || bytes == 0) return;
  access<Doing::write>(*current, reinterpret_cast<uintptr_t>(address), bytes, FASTFORMER_SIMT_CALLER);
}
}
