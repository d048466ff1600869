// How many registers the threads of each warp may have.
#include <algorithm>
#include <array>

#include "asynchronous.h"
#include "simt_hopper.h"

namespace simt {
namespace {

constexpr int kRegisters = 65536;  // of a block
constexpr int kMost = 256;         // of a thread
constexpr int kGroupWarps = 4;     // of a warpgroup

std::array<std::array<int, kMaxWarps>, kMaxCluster> of_blocks;  // of each warp

// As a kernel with __launch_bounds__ of the block's threads is compiled.
int at_launch() { return std::min(kMost, kRegisters / state.num_threads / 8 * 8); }

int warps() { return (state.num_threads + kWarp - 1) / kWarp; }

}  // namespace

void begin_registers() {
  for (int rank = 0; rank < state.cluster; ++rank) of_blocks[rank].fill(at_launch());
}

void end_block_registers(int rank) {
  const auto& of_warp = of_blocks[rank];
  int sum = 0;
  for (int warp = 0; warp < warps(); ++warp) {
    const Thread& first = state.threads[rank * state.num_threads + warp * kWarp];
    sum += of_warp[warp];
    if (of_warp[warp] != of_warp[warp / kGroupWarps * kGroupWarps]) {
      Report finding{.kind = Kind::divergence, .now = side(first, first.code, "ended")};
      finding.text = "warps of its warpgroup have other numbers of registers";
      report(std::move(finding));
    }
  }
  if (sum > at_launch() * warps()) {
    Report finding{.kind = Kind::bad_call, .now = side(*current, current->code, "ended")};
    finding.text = "the block's threads have " + std::to_string(sum * kWarp) + " registers, and began with " +
                   std::to_string(at_launch() * warps() * kWarp);
    report(std::move(finding));
  }
}

void set_registers(int registers, bool more) {
  struct Call {
    int registers;
    bool more;
  } call{registers, more};
  need_actors();
  warp_operation(~0u, &call, FASTFORMER_SIMT_CALLER, "in setmaxnreg", [](Thread* const* lanes, unsigned arrived) {
    check_all_lanes(lanes, arrived, "in setmaxnreg");
    const auto& wanted = *static_cast<const Call*>(lanes[0]->operand);
    int& has = of_blocks[lanes[0]->rank][number_of(lanes[0]->index) / kWarp];
    if (wanted.more ? wanted.registers < has : wanted.registers > has) {
      bad_call(*lanes[0], lanes[0]->code, "in setmaxnreg", "a thread has " + std::to_string(has) + " registers here");
    }
    has = wanted.registers;
  });
}

}  // namespace simt
