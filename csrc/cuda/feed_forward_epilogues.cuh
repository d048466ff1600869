// What follows the feed-forward layer's products: bias, activation and gate are applied to the sums in float32, which
// leave the registers as what the next product reads; the backward pass does the same with the activation's slope.
//
// Shapes: N rows, F hidden width.
#pragma once

#include "feed_forward.cuh"
#include "gemm_kernel.cuh"

namespace fastformer::cuda {

template <Activation kActivation>
FASTFORMER_DEVICE void activate_each(Activated (&at)[kChunk], const float (&x)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) at[i] = activate<kActivation, false>(x[i]);
}

// The activation is the same for all threads: to branch costs nothing beside the product, and saves a kernel for each.
FASTFORMER_DEVICE void activate(Activated (&at)[kChunk], const float (&x)[kChunk], Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return activate_each<Activation::gelu>(at, x);
    case Activation::gelu_tanh:
      return activate_each<Activation::gelu_tanh>(at, x);
    case Activation::relu:
      return activate_each<Activation::relu>(at, x);
    case Activation::silu:
      return activate_each<Activation::silu>(at, x);
  }
}

// The first product's sums -> activated, and `hidden` for the backward pass.
template <typename T, bool kGated>
struct Activate {
  static constexpr int kSums = kGated ? 2 : 1;
  static constexpr bool kSumsColumns = false;

  const T* bias1;  // [F], or null
  T* activated;    // [N, F]
  T* hidden;       // [N, F], or [N, 2F] = gate beside up; or null
  int64_t width;   // F
  Activation activation;

  FASTFORMER_DEVICE Chunk<T> load(int64_t, int64_t column) const { return load_bias(bias1, column); }
  FASTFORMER_DEVICE void operator()(int64_t row, int64_t column, float (&values)[kSums][kChunk], const Chunk<T>& bias,
                                    float (&)[kChunk]) const {
    float (&up)[kChunk] = values[kSums - 1];
    add(up, bias);
    if (hidden != nullptr) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        store_floats<true>(hidden + (row * kSums + i) * width + column, values[i]);
      }
    }
    Activated at[kChunk];
    activate(at, values[0], activation);
    float result[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) result[i] = kGated ? at[i].value * up[i] : at[i].value;
    store_floats<true>(activated + row * width + column, result);
  }
};

// The gradient by the activated values -> by hidden, and the activated values once more. Its column sums are the
// gradient by the first bias.
template <typename T, bool kGated>
struct Derive {
  static constexpr int kSums = 1;
  static constexpr bool kSumsColumns = true;

  const T* hidden;  // [N, F], or [N, 2F] = gate beside up
  T* grad_hidden;   // likewise
  T* activated;     // [N, F], or null
  int64_t width;    // F
  Activation activation;

  struct Loaded {
    Chunk<T> values[kGated ? 2 : 1];  // of the activation's argument, and of up
  };

  FASTFORMER_DEVICE int64_t place(int64_t row, int64_t column) const { return row * (kGated ? 2 : 1) * width + column; }
  FASTFORMER_DEVICE Loaded load(int64_t row, int64_t column) const {
    const T* from = hidden + place(row, column);
    Loaded loaded{{cuda::load<kChunk>(from)}};
    if constexpr (kGated) loaded.values[1] = cuda::load<kChunk>(from + width);
    return loaded;
  }
  FASTFORMER_DEVICE void operator()(int64_t row, int64_t column, float (&values)[kSums][kChunk], const Loaded& loaded,
                                    float (&column_sums)[kChunk]) const {
    float x[kChunk], by_gate[kChunk], by_up[kChunk], value[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = to_float(loaded.values[0].values[i]);
    Activated at[kChunk];
    activate(at, x, activation);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float incoming = values[0][i];
      value[i] = at[i].value;
      by_up[i] = incoming * at[i].slope;
      if constexpr (kGated) {
        const float up = to_float(loaded.values[1].values[i]);
        by_gate[i] = by_up[i] * up;
        by_up[i] = incoming * at[i].value;
        value[i] *= up;
      }
      column_sums[i] += by_up[i];
    }
    T* to = grad_hidden + place(row, column);
    if constexpr (kGated) store_floats<true>(to, by_gate);
    store_floats<true>(to + (kGated ? width : 0), by_up);
    if (activated != nullptr) store_floats<true>(activated + row * width + column, value);
  }
};

// A product as it is, or with a bias.
template <typename T>
struct Store {
  static constexpr int kSums = 1;
  static constexpr bool kSumsColumns = false;

  const T* bias;  // for every row; or null
  T* upper;       // contiguous, `width` columns
  T* lower;       // the rows from upper_rows on
  int64_t upper_rows, width;

  FASTFORMER_DEVICE Chunk<T> load(int64_t, int64_t column) const { return load_bias(bias, column); }
  FASTFORMER_DEVICE void operator()(int64_t row, int64_t column, float (&values)[kSums][kChunk], const Chunk<T>& added,
                                    float (&)[kChunk]) const {
    add(values[0], added);
    T* to = row < upper_rows ? upper + row * width : lower + (row - upper_rows) * width;
    store_floats<true>(to + column, values[0]);
  }
};

}  // namespace fastformer::cuda
