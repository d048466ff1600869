// Sums over rows, shares of grad_weight and of grad_bias: a thread's own, and those of a block's teams together.
#pragma once

#include "rows.cuh"

namespace fastformer::cuda {

// A thread's, of kCount columns: in registers, or in shared memory, where no other thread touches them. There the first
// `used` columns have room, 2 floats each, in `shared` of a block of kLargeBlock threads, and only they may be touched.
template <int kCount, bool kInShared>
class Sums {
 public:
  FASTFORMER_DEVICE explicit Sums(float* shared = nullptr, int used = kCount) {
    if constexpr (kInShared) shared_ = shared + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < used) weight(i) = bias(i) = 0.0f;
    }
  }
  FASTFORMER_DEVICE float& weight(int i) { return kInShared ? shared_[2 * i * kLargeBlock] : weight_[i]; }
  FASTFORMER_DEVICE float& bias(int i) { return kInShared ? shared_[(2 * i + 1) * kLargeBlock] : bias_[i]; }

 private:
  float weight_[kInShared ? 1 : kCount], bias_[kInShared ? 1 : kCount];
  float* shared_ = nullptr;
};

// The sums of the block's teams, which all have the same columns, for the first one. Each step adds the upper half of
// the teams that are left to the lower.
template <int kLanes, int kCount>
FASTFORMER_DEVICE void add_teams(Sums<kCount, false>& sums) {
  float* scratch = shared_memory<float>();
  const int thread = threadIdx.x;
  for (int half = blockDim.x / 2; half >= kLanes; half /= 2) {
    if (thread >= half && thread < 2 * half) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        scratch[2 * i * half + thread - half] = sums.weight(i);
        scratch[(2 * i + 1) * half + thread - half] = sums.bias(i);
      }
    }
    __syncthreads();
    if (thread < half) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        sums.weight(i) += scratch[2 * i * half + thread];
        sums.bias(i) += scratch[(2 * i + 1) * half + thread];
      }
    }
    __syncthreads();
  }
}
constexpr int64_t add_teams_bytes(int64_t threads, int64_t count) { return threads / 2 * count * 2 * sizeof(float); }

}  // namespace fastformer::cuda
