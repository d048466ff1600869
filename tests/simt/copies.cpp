// Copies by cp.async, and what touches the bytes of any copy that is under way.
#include <cstring>

#include "asynchronous.h"

namespace simt {

void report_copy(const Thread& me, bool write, Code code, uintptr_t address, size_t bytes) {
  Report finding{.kind = Kind::copy_under_way, .now = side(me, code, write ? "wrote" : "read")};
  finding.address = address;
  finding.bytes = static_cast<int>(bytes);
  if (state.actors && (find_load(address, bytes, write, finding) || find_store(address, bytes, write, finding))) {
    return report(std::move(finding));
  }
  if (state.actors && covers_mbarrier(address, bytes)) {
    finding.kind = Kind::bad_call;
    finding.text = "an mbarrier lies there";
    return report(std::move(finding));
  }
  for (int i = 0; i < state.all_threads; ++i) {
    for (const Copy& copy : state.threads[i].copies) {
      const auto to = reinterpret_cast<uintptr_t>(copy.to), from = reinterpret_cast<uintptr_t>(copy.from);
      if (to < address + bytes && address < to + copy.bytes) {
        finding.before = side(state.threads[i], copy.code, "began a cp.async to");
      } else if (write && copy.valid && from < address + bytes && address < from + copy.bytes) {
        finding.before = side(state.threads[i], copy.code, "began a cp.async from");
      } else {
        continue;
      }
      return report(std::move(finding));
    }
  }
}

void begin_copy(Thread& thread, const Copy& copy) {
  access_as(thread, copy.to, copy.bytes, true, copy.code);
  if (copy.valid) {
    access_as(thread, copy.from, copy.bytes, false, copy.code);
    each_unit(copy.from, copy.bytes, [](Unit& unit, unsigned) { ++unit.sources; });
  }
  each_unit(copy.to, copy.bytes, [](Unit& unit, unsigned mask) { unit.in_flight |= static_cast<uint16_t>(mask); });
}

void end_copy(Thread& thread, const Copy& copy) {
  each_unit(copy.to, copy.bytes, [](Unit& unit, unsigned mask) { unit.in_flight &= static_cast<uint16_t>(~mask); });
  if (copy.valid) {
    each_unit(copy.from, copy.bytes, [](Unit& unit, unsigned) { --unit.sources; });
    access_as(thread, copy.from, copy.bytes, false, copy.code);
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    std::memset(copy.to, 0, copy.bytes);
  }
  access_as(thread, copy.to, copy.bytes, true, copy.code);
}

}  // namespace simt
