#include "feed_forward.h"

#include "activation.h"
#include "lanes.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

// P: the type of the products, T: the tensors'.
template <typename P, typename T, typename Act, bool gated>
void forward_rows(const FeedForwardForward& a, int64_t begin, int64_t end) {
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t row = begin; row < end; ++row) {
    P* up = static_cast<P*>(a.up) + row * a.cols;
    const P* gate = static_cast<const P*>(a.gate) + (gated ? row * a.cols : 0);
    T* hidden = a.hidden == nullptr ? nullptr : static_cast<T*>(a.hidden) + row * a.cols * (gated ? 2 : 1);
    for_lanes(0, a.cols, [&](int64_t i, int n) FASTFORMER_LAMBDA {
      Vec u = load_n(up + i, n);
      if (bias != nullptr) u = u + load_n(bias + i, n);
      const Vec argument = gated ? load_n(gate + i, n) : u;
      if (hidden != nullptr) {
        store_n(hidden + i, argument, n);
        if (gated) store_n(hidden + a.cols + i, u, n);
      }
      const Vec value = Act::value(argument);
      store_n(up + i, gated ? value * u : value, n);
    });
  }
}

// Columns are taken in stripes, and 32 rows summed at a time, then 32 of these sums: short runs keep the rounding error
// small.
constexpr int64_t kStripe = 512;
constexpr int64_t kRows = 32;
constexpr int64_t kBlock = kRows * kRows;

template <typename P, typename T, typename Act, bool gated>
void backward_columns(const FeedForwardBackward& a, int64_t begin, int64_t end) {
  float sums[kStripe], total[kStripe];
  for (int64_t left = begin; left < end; left += kStripe) {
    const int64_t right = left + kStripe < end ? left + kStripe : end;
    for (int64_t i = 0; i < kStripe; ++i) total[i] = 0.0f;
    for (int64_t top = 0; top < a.rows; top += kRows) {
      const int64_t bottom = top + kRows < a.rows ? top + kRows : a.rows;
      for (int64_t i = 0; i < kStripe; ++i) sums[i] = 0.0f;
      for (int64_t row = top; row < bottom; ++row) {
        const T* hidden = static_cast<const T*>(a.hidden) + row * a.cols * (gated ? 2 : 1);
        P* grad = static_cast<P*>(a.grad) + row * a.cols;
        P* grad_gate = static_cast<P*>(a.grad_gate) + (gated ? row * a.cols : 0);
        P* activated = a.activated == nullptr ? nullptr : static_cast<P*>(a.activated) + row * a.cols;
        for_lanes(left, right, [&](int64_t i, int n) FASTFORMER_LAMBDA {
          const Vec g = load_n(grad + i, n);
          const ValueAndSlope act = Act::value_and_slope(load_n(hidden + i, n));
          Vec by_up = g * act.slope, value = act.value;
          if (gated) {
            const Vec up = load_n(hidden + a.cols + i, n);
            store_n(grad_gate + i, by_up * up, n);
            by_up = g * act.value;
            value = act.value * up;
          }
          store_n(grad + i, by_up, n);
          if (activated != nullptr) store_n(activated + i, value, n);
          store_n(sums + (i - left), load_n(sums + (i - left), n) + by_up, n);
        });
      }
      for (int64_t i = 0; i < right - left; ++i) total[i] += sums[i];
      if (a.grad_bias == nullptr || (bottom % kBlock != 0 && bottom < a.rows)) continue;
      for (int64_t i = 0; i < right - left; ++i) {
        a.grad_bias[left + i] += total[i];
        total[i] = 0.0f;
      }
    }
  }
}

void forward(const FeedForwardForward& args, int64_t begin, int64_t end) {
  visit(args.dtype, [&]<typename T>() {
    using P = typename ProductOf<T>::type;
    visit(args.activation, [&]<typename Act>() {
      if (args.gate != nullptr) {
        forward_rows<P, T, Act, true>(args, begin, end);
      } else {
        forward_rows<P, T, Act, false>(args, begin, end);
      }
    });
  });
}

void backward(const FeedForwardBackward& args, int64_t begin, int64_t end) {
  visit(args.dtype, [&]<typename T>() {
    using P = typename ProductOf<T>::type;
    visit(args.activation, [&]<typename Act>() {
      if (args.grad_gate != nullptr) {
        backward_columns<P, T, Act, true>(args, begin, end);
      } else {
        backward_columns<P, T, Act, false>(args, begin, end);
      }
    });
  });
}

}  // namespace

const FeedForwardKernels feed_forward{forward, backward};

}  // namespace fastformer::FASTFORMER_LEVEL
