// PTX's instructions, by the PTX ISA.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "shadow.h"
#include "simt_ptx.h"

namespace simt {
namespace {

// The fragments of one lane.
struct Product {
  float (*d)[4];
  const uint32_t (*a)[4];
  const uint32_t (*b)[2];
  bool bfloat16;
};

float element(uint32_t pair, int half, bool bfloat16) {
  const auto bits = static_cast<uint16_t>(pair >> (16 * half));
  return bfloat16 ? fastformer::cuda::to_float(fastformer::BFloat16{bits})
                  : fastformer::cuda::to_float(fastformer::Half{bits});
}

// "Matrix fragments for mma.m16n8k16 with floating point type": group = lane / 4, member = lane % 4.
void multiply(Thread* const* lanes, unsigned arrived) {
  float a[16][16], b[16][8];
  check_all_lanes(lanes, arrived, "in mma_m16n8k16");
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& mine = *static_cast<const Product*>(lanes[lane]->operand);
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = (i / 2) % 2 == 0 ? group : group + 8;
      const int column = member * 2 + i % 2 + (i < 4 ? 0 : 8);
      a[row][column] = element((*mine.a)[i / 2], i % 2, mine.bfloat16);
    }
    for (int i = 0; i < 4; ++i) {
      b[member * 2 + i % 2 + (i < 2 ? 0 : 8)][group] = element((*mine.b)[i / 2], i % 2, mine.bfloat16);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& mine = *static_cast<const Product*>(lanes[lane]->operand);
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? lane / 4 : lane / 4 + 8, column = lane % 4 * 2 + i % 2;
      double sum = (*mine.d)[i];
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      (*mine.d)[i] = static_cast<float>(sum);
    }
  }
}

struct Rows {
  const void* row;
  uint32_t* to;
  bool transposed;
};

void load_matrices(Thread* const* lanes, unsigned arrived) {
  check_all_lanes(lanes, arrived, "in ldmatrix_x4");
  uint16_t elements[4][8][8];
  // Every lane gets elements of rows that others named. Lanes with one clock see the same, but for what they wrote
  // themselves: two of them speak for all.
  int speakers[kWarp], count = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto same = [&](int other) { return lanes[other]->clock == lanes[lane]->clock; };
    if (std::count_if(speakers, speakers + count, same) < 2) speakers[count++] = lane;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& mine = *static_cast<const Rows*>(lanes[lane]->operand);
    if (!in_shared(mine.row))
      bad_call(*lanes[lane], lanes[lane]->code, "in ldmatrix_x4", "it reads shared memory only");
    access_as(*lanes[lane], mine.row, 16, false, lanes[lane]->code);
    for (int i = 0; i < count; ++i) check_sees_shared(*lanes[speakers[i]], mine.row, lanes[lane]->code);
    std::memcpy(elements[lane / 8][lane % 8], mine.row, 16);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& mine = *static_cast<const Rows*>(lanes[lane]->operand);
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint32_t low = mine.transposed ? elements[matrix][column][row] : elements[matrix][row][column];
      const uint32_t high = mine.transposed ? elements[matrix][column + 1][row] : elements[matrix][row][column + 1];
      mine.to[matrix] = low | high << 16;
    }
  }
}

}  // namespace

void cp_async(void* shared, const void* global, int bytes, bool valid) {
  if (!in_shared(shared) || (valid && in_any_shared(global))) {
    bad_call(*current, FASTFORMER_SIMT_CALLER, "in cp_async",
             "it copies from global memory to the shared memory of its block");
  }
  const Copy copy{static_cast<char*>(shared), static_cast<const char*>(global), bytes, valid, FASTFORMER_SIMT_CALLER};
  begin_copy(*current, copy);
  current->copies.push_back(copy);
}

void cp_async_commit() {
  size_t before = 0;
  for (size_t count : current->groups) before += count;
  current->groups.push_back(current->copies.size() - before);
}

void cp_async_wait(int groups) {
  Thread& me = *current;
  size_t copies = 0, done = 0;
  while (me.groups.size() - done > static_cast<size_t>(groups)) copies += me.groups[done++];
  for (size_t i = 0; i < copies; ++i) {
    const Copy copy = me.copies[i];
    end_copy(me, copy);
  }
  me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<int64_t>(copies));
  me.groups.erase(me.groups.begin(), me.groups.begin() + static_cast<int64_t>(done));
}

void ldmatrix_x4(uint32_t (&to)[4], const void* row, bool transposed) {
  Rows mine{row, to, transposed};
  warp_operation(~0u, &mine, FASTFORMER_SIMT_CALLER, "in ldmatrix_x4", load_matrices);
}

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16) {
  Product mine{&d, &a, &b, bfloat16};
  warp_operation(~0u, &mine, FASTFORMER_SIMT_CALLER, "in mma_m16n8k16", multiply);
}

namespace {
constexpr float kSmallest = 0x1p-126f;  // .ftz: what is smaller is 0
}

float ex2(float x) {
  if (std::fabs(x) < kSmallest) return 1.0f;
  const float y = std::exp2(x);
  return y < kSmallest ? 0.0f : y;
}

float rcp(float x) {
  const float y = 1.0f / (std::fabs(x) < kSmallest ? std::copysign(0.0f, x) : x);
  return std::fabs(y) < kSmallest ? std::copysign(0.0f, y) : y;
}

}  // namespace simt
