// Products of warpgroups: each warp makes its own 16 rows. Where one begins, what it reads of shared memory is
// recorded; it is multiplied at the wgmma_wait that ends it. Until then its accumulators are NaN.
#include <algorithm>
#include <array>
#include <bit>
#include <deque>
#include <list>
#include <span>

#include "asynchronous.h"
#include "fenced.h"
#include "operands.h"
#include "simt_hopper.h"

namespace simt {
namespace {

constexpr int kGroupWarps = 4;            // of a warpgroup
constexpr int kRows = 16;                 // of a warp
constexpr uint32_t kPoison = 0x7f80dead;  // a signaling NaN, which arithmetic changes
constexpr const char* kFence = "in wgmma_fence";
constexpr const char* kBegin = "in wgmma";
constexpr const char* kWait = "in wgmma_wait";

struct Accumulator {
  RegisterRange at;
  float* of_lane[kWarp];
  int tiles;
  int under_way;  // products
  std::array<float, kRows * kMostColumns> values;
};

struct Product {
  Wgmma of;  // lane 0's
  std::list<Accumulator>::iterator sum;
  RegisterRange fragment;
  const uint32_t* registers[kWarp];
  uint32_t had[kWarp][4];  // in them when it began
  Time time;
  Code code;
};

struct WarpProducts {
  std::vector<Product> products;  // under way, oldest first
  std::vector<size_t> groups;     // how many each committed group has
  std::list<Accumulator> sums;
  FencedRegisters fenced;
  size_t begun;
};
std::array<WarpProducts, kMaxCluster * kMaxWarps> warps;

// What the warps of a warpgroup began, all the same, and the warp that was first; without what all four have begun.
struct Begun {
  uint64_t a, b;
  int tiles;
  bool transposed_a, transposed_b, has_registers;
  int warp;
  Code code;
};
struct WarpgroupProducts {
  std::deque<Begun> begun;
  size_t forgotten;
};
std::array<WarpgroupProducts, kMaxCluster * kMaxWarps / kGroupWarps> warpgroups;

// A warp's number in these arrays, which have as many for each block as it may have; and its first thread.
int warp_of(Thread* const* lanes) { return lanes[0]->rank * kMaxWarps + number_of(lanes[0]->index) / kWarp; }
const Thread& first_of(int warp) {
  return state.threads[warp / kMaxWarps * state.num_threads + warp % kMaxWarps * kWarp];
}

bool has(const std::vector<RegisterRange>& ranges, const RegisterRange& what) {
  return std::any_of(ranges.begin(), ranges.end(), [&](const RegisterRange& range) { return range.has(what); });
}

// --- where a product begins

struct OfLanes {
  Registers all[kWarp];
};
template <auto kMember>
OfLanes of_lanes(Thread* const* lanes, size_t bytes) {
  OfLanes result;
  for (int lane = 0; lane < kWarp; ++lane) {
    result.all[lane] = {static_cast<const Wgmma*>(lanes[lane]->operand)->*kMember, bytes};
  }
  return result;
}

void check_same_lanes(Thread* const* lanes) {
  const auto& first = *static_cast<const Wgmma*>(lanes[0]->operand);
  for (int lane = 1; lane < kWarp; ++lane) {
    const auto& mine = *static_cast<const Wgmma*>(lanes[lane]->operand);
    if (mine.a != first.a || mine.b != first.b || mine.add != first.add) {
      bad_call(*lanes[lane], lanes[lane]->code, kBegin, "lanes of its warp name other matrices");
    }
  }
}

void check_same_warps(int warp, const Thread& thread, const Wgmma& product) {
  WarpgroupProducts& group = warpgroups[warp / kGroupWarps];
  const size_t index = warps[warp].begun++ - group.forgotten;
  if (index == group.begun.size()) {
    group.begun.push_back({product.a, product.b, product.tiles, product.transposed_a, product.transposed_b,
                           product.registers != nullptr, warp, thread.code});
  }
  const Begun& other = group.begun[index];
  if (product.a != other.a || product.b != other.b || product.tiles != other.tiles ||
      product.transposed_a != other.transposed_a || product.transposed_b != other.transposed_b ||
      (product.registers != nullptr) != other.has_registers) {
    Report finding{.kind = Kind::divergence,
                   .now = side(thread, thread.code, kBegin),
                   .before = side(first_of(other.warp), other.code, kBegin)};
    finding.text = "warps of a warpgroup begin different products";
    stop(std::move(finding));
  }
  const auto all = warps.begin() + warp / kGroupWarps * kGroupWarps;
  while (!group.begun.empty() &&
         std::all_of(all, all + kGroupWarps, [&](const WarpProducts& its) { return its.begun > group.forgotten; })) {
    group.begun.pop_front();
    ++group.forgotten;
  }
}

void read_operand(Thread& actor, uint64_t bits, bool transposed, int first, int outers, int all, Code code) {
  const Descriptor matrix(bits);
  if (const char* mistake = matrix.mistake(transposed, all)) bad_call(actor, code, kBegin, mistake);
  for_chunks(matrix, transposed, first, outers, [&](int address, int, int) {
    if (static_cast<size_t>(address) + 16 > state.launch.shared_bytes) {
      Report finding{.kind = Kind::out_of_bounds, .now = side(actor, code, "read")};
      finding.address = shared_begin + address;
      finding.bytes = 16;
      stop(std::move(finding));
    }
    access_shared(actor, shared_begin + address, false, code);
  });
}

template <typename Each>
void for_values(const Accumulator& sum, Each each) {  // each(lane, its value's number, place in `values`)
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < sum.tiles * 4; ++i) {
      const int column = i / 4 * 8 + column_of_value(lane, i % 4);
      each(lane, i, row_of_value(lane, i % 4) * sum.tiles * 8 + column);
    }
  }
}

std::list<Accumulator>::iterator begin_sum(WarpProducts& mine, Thread* const* lanes, const Wgmma& product) {
  const RegisterRange at = range_of(product.d, product.tiles * 16);
  for (auto sum = mine.sums.begin(); sum != mine.sums.end(); ++sum) {
    if (!sum->at.meets(at)) continue;
    if (sum->at.begin != at.begin || sum->tiles != product.tiles) {
      bad_call(*lanes[0], lanes[0]->code, kBegin, "its accumulator is part of another that is under way");
    }
    return sum;
  }
  Accumulator& sum = mine.sums.emplace_back();
  sum.at = at;
  sum.tiles = product.tiles;
  sum.under_way = 0;
  for (int lane = 0; lane < kWarp; ++lane) sum.of_lane[lane] = static_cast<const Wgmma*>(lanes[lane]->operand)->d;
  for_values(sum, [&](int lane, int i, int at) {
    sum.values[at] = sum.of_lane[lane][i];
    sum.of_lane[lane][i] = std::bit_cast<float>(kPoison);
  });
  return std::prev(mine.sums.end());
}

void begin_product(Thread* const* lanes, unsigned arrived) {
  check_all_lanes(lanes, arrived, kBegin);
  const Thread& first = *lanes[0];
  const int warp = warp_of(lanes);
  const auto& of = *static_cast<const Wgmma*>(first.operand);
  WarpProducts& mine = warps[warp];
  if ((warp % kMaxWarps / kGroupWarps + 1) * kGroupWarps * kWarp > state.num_threads) {
    bad_call(first, first.code, kBegin, "its warpgroup has fewer than 128 threads");
  }
  check_same_lanes(lanes);
  check_same_warps(warp, first, of);
  const RegisterRange sum = range_of(of.d, of.tiles * 16);
  const bool under_way =
      std::any_of(mine.sums.begin(), mine.sums.end(), [&](const Accumulator& other) { return other.at.has(sum); });
  if (!under_way) mine.fenced.check(lanes, of_lanes<&Wgmma::d>(lanes, of.tiles * 16).all, kBegin, "its accumulator");
  Product product{};
  product.of = of;
  product.code = first.code;
  if (of.registers != nullptr) {
    product.fragment = range_of(of.registers, 16);
    mine.fenced.check(lanes, of_lanes<&Wgmma::registers>(lanes, 16).all, kBegin, "registers of a");
    for (int lane = 0; lane < kWarp; ++lane) {
      product.registers[lane] = static_cast<const Wgmma*>(lanes[lane]->operand)->registers;
      std::copy_n(product.registers[lane], 4, product.had[lane]);
    }
  }
  Thread& actor = act_for(lanes, product_actor(first));
  product.time = actor.time;
  if (of.registers == nullptr) {
    const int row = warp % kGroupWarps * kRows;
    read_operand(actor, of.a, of.transposed_a, row, kRows, kGroupWarps * kRows, first.code);
  }
  read_operand(actor, of.b, of.transposed_b, 0, of.tiles * 8, of.tiles * 8, first.code);
  product.sum = begin_sum(mine, lanes, of);
  ++product.sum->under_way;
  mine.products.push_back(product);
}

// --- where it ends

#ifdef __x86_64__
[[gnu::target_clones("arch=haswell", "default")]]
#endif
[[gnu::optimize("O3")]] void multiply(float* sum, const float (&a)[kRows][kDepth],
                                      const float (&b)[kDepth][kMostColumns], int columns) {
  for (int i = 0; i < kRows; ++i) {
    float* __restrict row = sum + i * columns;
    for (int k = 0; k < kDepth; k += 4) {
      for (int j = 0; j < columns; ++j) {
        row[j] +=
            a[i][k] * b[k][j] + a[i][k + 1] * b[k + 1][j] + (a[i][k + 2] * b[k + 2][j] + a[i][k + 3] * b[k + 3][j]);
      }
    }
  }
}

void end_product(Product& product, int warp) {
  const Wgmma& of = product.of;
  float a[kRows][kDepth], b[kDepth][kMostColumns], chunk[8];
  if (of.registers != nullptr) {
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const uint32_t pair = product.registers[lane][i];
        float* to = &a[row_of_register(lane, i)][depth_of_register(lane, i)];
        to[0] = element_of(static_cast<uint16_t>(pair), of.bfloat16);
        to[1] = element_of(static_cast<uint16_t>(pair >> 16), of.bfloat16);
      }
    }
  } else {
    const int first = warp % kGroupWarps * kRows;
    for_chunks(Descriptor(of.a), of.transposed_a, first, kRows, [&](int address, int row, int depth) {
      load_chunk(chunk, shared_begin + address, of.bfloat16);
      for (int i = 0; i < 8; ++i) {
        a[row - first + (of.transposed_a ? i : 0)][depth + (of.transposed_a ? 0 : i)] = chunk[i];
      }
    });
  }
  for_chunks(Descriptor(of.b), of.transposed_b, 0, of.tiles * 8, [&](int address, int column, int depth) {
    load_chunk(chunk, shared_begin + address, of.bfloat16);
    for (int i = 0; i < 8; ++i) b[depth + (of.transposed_b ? 0 : i)][column + (of.transposed_b ? i : 0)] = chunk[i];
  });
  auto& values = product.sum->values;
  if (!of.add) std::fill_n(values.begin(), kRows * of.tiles * 8, 0.0f);
  multiply(values.data(), a, b, of.tiles * 8);
}

void report_touched(const Thread& thread, const Product& product, const char* what) {
  Report finding{.kind = Kind::bad_call,
                 .now = side(thread, thread.code, kWait),
                 .before = side(thread, product.code, "began a product")};
  finding.text = what;
  report(std::move(finding));
}

void give_back(WarpProducts& mine, Thread* const* lanes, const Product& product) {
  const Accumulator& sum = *product.sum;
  bool touched = false;
  for_values(sum, [&](int lane, int i, int at) {
    if (std::bit_cast<uint32_t>(sum.of_lane[lane][i]) != kPoison && !touched) {
      touched = true;
      report_touched(*lanes[lane], product, "its accumulator was changed while the product was under way");
    }
    sum.of_lane[lane][i] = sum.values[at];
  });
  mine.fenced.remove(sum.at);
  mine.sums.erase(product.sum);
}

struct RegistersCall {
  int groups;
  const Registers* registers;
  int count;
};

void end_products(Thread* const* lanes, unsigned arrived) {
  check_all_lanes(lanes, arrived, kWait);
  const int warp = warp_of(lanes);
  WarpProducts& mine = warps[warp];
  const auto& call = *static_cast<const RegistersCall*>(lanes[0]->operand);
  std::vector<RegisterRange> named;
  for (int i = 0; i < call.count; ++i) named.push_back(range_of(call.registers[i].begin, call.registers[i].bytes));
  size_t ended = 0, groups = 0;
  while (mine.groups.size() - groups > static_cast<size_t>(call.groups)) ended += mine.groups[groups++];
  if (ended == 0) return;
  const Time time = mine.products[ended - 1].time;
  for (size_t i = 0; i < ended; ++i) {
    Product& product = mine.products[i];
    end_product(product, warp);
    if (product.of.registers != nullptr) {
      for (int lane = 0; lane < kWarp; ++lane) {
        if (!std::equal(product.had[lane], product.had[lane] + 4, product.registers[lane])) {
          report_touched(*lanes[lane], product, "registers of a were changed while the product was under way");
        }
      }
      const bool used = std::any_of(mine.products.begin() + static_cast<int64_t>(i) + 1, mine.products.end(),
                                    [&](const Product& other) { return other.fragment.meets(product.fragment); });
      if (!used) {
        if (!has(named, product.fragment)) report_touched(*lanes[0], product, "it does not name registers of a");
        mine.fenced.remove(product.fragment);
      }
    }
    if (--product.sum->under_way == 0) {
      if (!has(named, product.sum->at)) report_touched(*lanes[0], product, "it does not name the accumulator");
      give_back(mine, lanes, product);
    }
  }
  mine.products.erase(mine.products.begin(), mine.products.begin() + static_cast<int64_t>(ended));
  mine.groups.erase(mine.groups.begin(), mine.groups.begin() + static_cast<int64_t>(groups));
  Clock *from = nullptr, *to = nullptr;
  for (int lane = 0; lane < kWarp; ++lane) {
    Clock* had = lanes[lane]->clock;
    if (had == from) {
      set_clock(*lanes[lane], to);
      continue;
    }
    release(from);
    from = had;
    ++from->references;  // so that it stays another than those to come
    has_waited(*lanes[lane], product_actor(*lanes[lane]), time);
    to = lanes[lane]->clock;
  }
  release(from);
}

}  // namespace

void begin_products() {
  const int count = state.cluster * kMaxWarps;
  for (WarpProducts& warp : std::span(warps).first(count)) {
    warp.products.clear();
    warp.groups.clear();
    warp.sums.clear();
    warp.fenced.clear();
    warp.begun = 0;
  }
  std::fill_n(warpgroups.begin(), count / kGroupWarps, WarpgroupProducts{});
}

void end_block_products(int rank) {
  const int begin = rank * kMaxWarps, count = (state.num_threads + kWarp - 1) / kWarp;
  for (int warp = begin; warp < begin + count; ++warp) {
    const Thread& first = first_of(warp);
    if (!warps[warp].products.empty()) {
      Report finding{.kind = Kind::bad_call, .now = side(first, warps[warp].products[0].code, "began a product")};
      finding.text = "the block ends, and it has not committed it and waited for it";
      report(std::move(finding));
    }
    const WarpgroupProducts& group = warpgroups[warp / kGroupWarps];
    if (const size_t begun = warps[warp].begun - group.forgotten; begun < group.begun.size()) {
      const Begun& other = group.begun[begun];
      Report finding{.kind = Kind::divergence, .now = side(first_of(other.warp), other.code, "began a product")};
      finding.text = "warp " + std::to_string(warp - begin) + " of its warpgroup did not";
      report(std::move(finding));
    }
  }
}

void wgmma_fence(const Registers* registers, int count) {
  RegistersCall call{0, registers, count};
  need_actors();
  warp_operation(~0u, &call, FASTFORMER_SIMT_CALLER, kFence, [](Thread* const* lanes, unsigned arrived) {
    check_all_lanes(lanes, arrived, kFence);
    const auto& call = *static_cast<const RegistersCall*>(lanes[0]->operand);
    WarpProducts& mine = warps[warp_of(lanes)];
    for (int i = 0; i < call.count; ++i) {
      Registers of[kWarp];
      for (int lane = 0; lane < kWarp; ++lane) {
        of[lane] = static_cast<const RegistersCall*>(lanes[lane]->operand)->registers[i];
      }
      mine.fenced.add(of);
    }
  });
}

void wgmma(const Wgmma& product) {
  Wgmma mine = product;
  need_actors();
  warp_operation(~0u, &mine, FASTFORMER_SIMT_CALLER, kBegin, begin_product);
}

void wgmma_commit() {
  need_actors();
  warp_operation(~0u, nullptr, FASTFORMER_SIMT_CALLER, "in wgmma_commit", [](Thread* const* lanes, unsigned arrived) {
    check_all_lanes(lanes, arrived, "in wgmma_commit");
    WarpProducts& mine = warps[warp_of(lanes)];
    size_t before = 0;
    for (const size_t count : mine.groups) before += count;
    mine.groups.push_back(mine.products.size() - before);
  });
}

void wgmma_wait(int groups, const Registers* registers, int count) {
  RegistersCall call{groups, registers, count};
  need_actors();
  warp_operation(~0u, &call, FASTFORMER_SIMT_CALLER, kWait, end_products);
}

}  // namespace simt
