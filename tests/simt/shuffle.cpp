// What the lanes of a warp tell each other in registers.
#include "runtime.h"

namespace simt {
namespace {

struct Shuffled {
  Shuffle kind;
  uint64_t value, result;
  int lane, width;
};

}  // namespace

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int lane, int width) {
  const Code code = FASTFORMER_SIMT_CALLER;
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0) {
    bad_call(*current, code, "in a shuffle", "the width must be a power of two up to 32");
  }
  Shuffled mine{kind, value, value, lane, width};
  warp_operation(mask, &mine, code, "in a shuffle", [](Thread* const* lanes, unsigned arrived) {
    for (int i = 0; i < kWarp; ++i) {
      if ((arrived >> i & 1) == 0) continue;
      auto& mine = *static_cast<Shuffled*>(lanes[i]->operand);
      const int first = i & ~(mine.width - 1);
      int from = i;
      switch (mine.kind) {
        case Shuffle::index:
          from = first + (mine.lane & (mine.width - 1));
          break;
        case Shuffle::up:
          from = i - mine.lane < first ? i : i - mine.lane;
          break;
        case Shuffle::down:
          from = i + mine.lane >= first + mine.width ? i : i + mine.lane;
          break;
        case Shuffle::xor_:
          from = (i ^ mine.lane) >= first + mine.width || (i ^ mine.lane) < 0 ? i : i ^ mine.lane;
          break;
      }
      if ((arrived >> from & 1) == 0) {
        Report finding{.kind = Kind::divergence, .now = side(*lanes[i], lanes[i]->code, "in a shuffle")};
        finding.text = "it asks lane " + std::to_string(from) + ", which has ended or is not in the mask";
        report(std::move(finding));
        continue;
      }
      mine.result = static_cast<const Shuffled*>(lanes[from]->operand)->value;
    }
  });
  return mine.result;
}

unsigned ballot(unsigned mask, bool vote) {
  struct Vote {
    bool vote;
    unsigned result;
  } mine{vote, 0};
  warp_operation(mask, &mine, FASTFORMER_SIMT_CALLER, "in a vote", [](Thread* const* lanes, unsigned arrived) {
    unsigned votes = 0;
    for (int i = 0; i < kWarp; ++i) {
      if ((arrived >> i & 1) != 0 && static_cast<Vote*>(lanes[i]->operand)->vote) votes |= 1u << i;
    }
    for (int i = 0; i < kWarp; ++i) {
      if (arrived >> i & 1) static_cast<Vote*>(lanes[i]->operand)->result = votes;
    }
  });
  return mine.result;
}

}  // namespace simt
