// Registers that a warp's wgmma_fence named.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>

#include "runtime.h"
#include "simt_hopper.h"

namespace simt {

// Registers of a warp, by where its lane 0 has them.
struct RegisterRange {
  uintptr_t begin, end;
  bool has(const RegisterRange& other) const { return begin <= other.begin && other.end <= end; }
  bool meets(const RegisterRange& other) const { return begin < other.end && other.begin < end; }
};

inline RegisterRange range_of(const void* begin, size_t bytes) {
  return {reinterpret_cast<uintptr_t>(begin), reinterpret_cast<uintptr_t>(begin) + bytes};
}

class FencedRegisters {
 public:
  void clear() { all_.clear(); }
  // `of` are the same registers of each lane.
  void add(const Registers (&of)[kWarp]) {
    const RegisterRange at = range_of(of[0].begin, of[0].bytes);
    remove(at);
    Fenced fenced{at, at.begin, of[0].bytes, std::make_shared<std::vector<char>>(kWarp * of[0].bytes)};
    for (int lane = 0; lane < kWarp; ++lane) {
      std::memcpy(fenced.had->data() + lane * fenced.bytes, of[lane].begin, fenced.bytes);
    }
    all_.push_back(std::move(fenced));
  }
  void remove(const RegisterRange& what) {
    std::vector<Fenced> left;
    for (const Fenced& fenced : all_) {
      if (!fenced.at.meets(what)) {
        left.push_back(fenced);
        continue;
      }
      for (const RegisterRange rest : {RegisterRange{fenced.at.begin, what.begin}, {what.end, fenced.at.end}}) {
        if (rest.begin >= rest.end) continue;
        left.push_back(fenced);
        left.back().at = rest;
      }
    }
    all_ = std::move(left);
  }
  // Stops unless these registers of the lanes are fenced, and are as they were then.
  void check(Thread* const* lanes, const Registers (&of)[kWarp], const char* did, const char* name) const {
    const RegisterRange what = range_of(of[0].begin, of[0].bytes);
    const auto found =
        std::find_if(all_.begin(), all_.end(), [&](const Fenced& fenced) { return fenced.at.has(what); });
    if (found == all_.end()) bad_call(*lanes[0], lanes[0]->code, did, std::string("no wgmma_fence of ") + name);
    for (int lane = 0; lane < kWarp; ++lane) {
      const char* had = found->had->data() + lane * found->bytes + (what.begin - found->begin);
      if (std::memcmp(had, of[lane].begin, of[lane].bytes) == 0) continue;
      bad_call(*lanes[lane], lanes[lane]->code, did,
               std::string(name) + " changed since the wgmma_fence that names it");
    }
  }

 private:
  struct Fenced {
    RegisterRange at;
    uintptr_t begin;                         // of all that was named together
    size_t bytes;                            // of a lane
    std::shared_ptr<std::vector<char>> had;  // by lane
  };
  std::vector<Fenced> all_;
};

}  // namespace simt
