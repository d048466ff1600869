#include "feed_forward.h"

#include "activation.h"
#include "lanes.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

// A part of a product: in scratch memory as floats, or where the results go.
template <typename S>
struct Part {
  const S* values;  // the first of them
  int64_t stride;   // from row to row
  int64_t row_begin, row_end, col_begin, col_end;

  // That of column 0.
  const S* row(int64_t row) const { return values + (row - row_begin) * stride - col_begin; }
};

Part<float> part_of(const GemmBlock& b) { return {b.sums, b.stride, b.row_begin, b.row_end, b.col_begin, b.col_end}; }

// P: the type of the products, T: the tensors', S: the part's.
template <typename P, typename T, typename S, typename Act, bool gated>
void forward_part(const FeedForwardForward& a, const Part<S>& part) {
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t row = part.row_begin; row < part.row_end; ++row) {
    const S* sums = part.row(row);
    P* up = static_cast<P*>(a.up) + row * a.cols;
    const P* gate = static_cast<const P*>(a.gate) + (gated ? row * a.cols : 0);
    T* hidden = a.hidden == nullptr ? nullptr : static_cast<T*>(a.hidden) + row * a.cols * (gated ? 2 : 1);
    for_lanes(part.col_begin, part.col_end, [&](int64_t i, int n) FASTFORMER_LAMBDA {
      Vec u = load_n(sums + i, n);
      if (bias != nullptr) u = u + load_n(bias + i, n);
      const Vec argument = gated ? load_n(gate + i, n) : u;
      if (hidden != nullptr) {
        store_n(hidden + i, argument, n);
        if (gated) store_n(hidden + a.cols + i, u, n);
      }
      const Vec value = Act::template value<T>(argument);
      store_n(up + i, gated ? value * u : value, n);
    });
  }
}

template <typename P, typename T, typename S, typename Act, bool gated>
void backward_part(const FeedForwardBackward& a, const Part<S>& part) {
  for (int64_t top = part.row_begin; top < part.row_end; top += kBiasRows) {
    float* grad_bias = a.grad_bias == nullptr ? nullptr : a.grad_bias + top / kBiasRows * a.cols;
    for (int64_t row = top; row < smaller(top + kBiasRows, part.row_end); ++row) {
      const S* grads = part.row(row);
      const T* hidden = static_cast<const T*>(a.hidden) + row * a.cols * (gated ? 2 : 1);
      P* grad = static_cast<P*>(a.grad) + row * a.cols;
      P* grad_gate = static_cast<P*>(a.grad_gate) + (gated ? row * a.cols : 0);
      P* activated = a.activated == nullptr ? nullptr : static_cast<P*>(a.activated) + row * a.cols;
      for_lanes(part.col_begin, part.col_end, [&](int64_t i, int n) FASTFORMER_LAMBDA {
        const Vec g = load_n(grads + i, n);
        const ValueAndSlope act = Act::template value_and_slope<T>(load_n(hidden + i, n));
        Vec by_up = g * act.slope, value = act.value;
        if (gated) {
          const Vec up = load_n(hidden + a.cols + i, n);
          store_n(grad_gate + i, by_up * up, n);
          by_up = g * act.value;
          value = act.value * up;
        }
        store_n(grad + i, by_up, n);
        if (activated != nullptr) store_n(activated + i, value, n);
        if (grad_bias != nullptr) store_n(grad_bias + i, row == top ? by_up : load_n(grad_bias + i, n) + by_up, n);
      });
    }
  }
}

// Calls f with the types and the form that `a` asks for: f is `[&]<typename P, typename T, typename Act, bool gated>`.
template <typename Args, typename F>
FASTFORMER_INLINE void visit_form(const Args& a, bool gated, F f) {
  visit(a.dtype, [&]<typename T>() {
    using P = typename ProductOf<T>::type;
    visit(a.activation, [&]<typename Act>() {
      if (gated) {
        f.template operator()<P, T, Act, true>();
      } else {
        f.template operator()<P, T, Act, false>();
      }
    });
  });
}

void forward(const FeedForwardForward& a, int64_t begin, int64_t end) {
  visit_form(a, a.gate != nullptr, [&]<typename P, typename T, typename Act, bool gated>() {
    const Part<P> part{static_cast<const P*>(a.up) + begin * a.cols, a.cols, begin, end, 0, a.cols};
    forward_part<P, T, P, Act, gated>(a, part);
  });
}

void forward_block(const void* args, const GemmBlock& block) {
  const FeedForwardForward& a = *static_cast<const FeedForwardForward*>(args);
  visit_form(a, a.gate != nullptr, [&]<typename P, typename T, typename Act, bool gated>() {
    forward_part<P, T, float, Act, gated>(a, part_of(block));
  });
}

void backward(const FeedForwardBackward& a, int64_t begin, int64_t end) {
  visit_form(a, a.grad_gate != nullptr, [&]<typename P, typename T, typename Act, bool gated>() {
    const Part<P> part{static_cast<const P*>(a.grad) + begin * a.cols, a.cols, begin, end, 0, a.cols};
    backward_part<P, T, P, Act, gated>(a, part);
  });
}

void backward_block(const void* args, const GemmBlock& block) {
  const FeedForwardBackward& a = *static_cast<const FeedForwardBackward*>(args);
  visit_form(a, a.grad_gate != nullptr, [&]<typename P, typename T, typename Act, bool gated>() {
    backward_part<P, T, float, Act, gated>(a, part_of(block));
  });
}

}  // namespace

const FeedForwardKernels feed_forward{forward, backward, forward_block, backward_block};

}  // namespace fastformer::FASTFORMER_LEVEL
