#include "softmax.h"

#include "exponentials.h"
#include "row_pipeline.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

// e^x for x <= 0: for float32 without exp's clamp from above, which took 4% of the whole.
template <typename T>
FASTFORMER_INLINE Vec exp_below_0(Vec x) {
  if constexpr (__is_same(T, float)) return exp_to_89(x);
  return exp_for<T>(x);
}

// What the three steps of a row hand on.
struct Progress {
  float peak = 0.0f;     // what has the greatest score in the row of step 1
  float inverse = 0.0f;  // 1 / the sum of exponentials of the row of step 2, 0 if there are none
};

// Step 0 takes the maximum of x0, step 1 the exponentials of scale x1 and their sum, step 2 writes them to y2.
// `exponentials` holds a row between steps 1 and 2. X is T, or float for scores that have a mask in them. scaled:
// whether the scale is not 1.
template <typename T, int S, bool scaled, typename X>
FASTFORMER_INLINE void softmax_steps(const X* x0, const X* x1, T* y2, int64_t cols, float scale, bool stream,
                                     float* exponentials, Progress& progress) {
  // The peak is taken of x, or of -x, and the scale multiplies distances to it: then it has an exponential of
  // exactly 1.
  const Pair sign = both(broadcast(scale < 0.0f ? -1.0f : 1.0f)), factor = both(broadcast(fabsf(scale)));
  const Pair centre = both(broadcast(progress.peak));
  const Pair inverse = both(broadcast(progress.inverse));
  const Vec least = broadcast(-INFINITY);
  Pair peak = both(least), sum = both(zero());
  for (int64_t block = 0; block < cols; block += kSumBlock) {
    Pair block_sum = both(zero());
    for_pairs(block, smaller(cols, block + kSumBlock), [&](int64_t i, int n) FASTFORMER_LAMBDA {
      if (S & 1) {
        fetch<kReadAhead>(x0 + i);
        peak = max(peak, keep(scaled ? load_pair(x0 + i, n) * sign : load_pair(x0 + i, n), n, least));
      }
      if (S & 4) {
        if (!stream) fetch<kWriteAhead>(y2 + i);
        Pair y = load_pair(exponentials + i, n) * inverse;
        if (sizeof(X) != sizeof(T) && n == kPair) y = in_pair_order<T>(y);  // they lie in the order of x1
        put_pair(y2 + i, y, n, stream);
      }
      if (S & 2) {
        const Pair x = load_pair(x1 + i, n);
        const Pair score = scaled ? (x * sign - centre) * factor : x - centre;
        const Pair exponential = {exp_below_0<T>(score.first), exp_below_0<T>(score.second)};
        store_pair(exponentials + i, exponential, n);
        block_sum = block_sum + keep(exponential, n, zero());
      }
    });
    sum = sum + block_sum;
  }
  if (S & 2) {
    const float total = reduce_add(sum.first + sum.second);
    progress.inverse = total == 0.0f ? 0.0f : 1.0f / total;  // 0: nothing to attend to
  }
  if (S & 1) {
    const float greatest = reduce_max(max(peak.first, peak.second));
    progress.peak = greatest == -INFINITY ? 0.0f : greatest;
  }
}

template <typename T, bool scaled>
void plain_rows(const SoftmaxForward& a, int64_t begin, int64_t end, float* exponentials) {
  const T* const input = static_cast<const T*>(a.input);
  T* const output = static_cast<T*>(a.output);
  Progress progress;
  const bool overlap = a.cols * static_cast<int64_t>(sizeof(T)) <= kSoftmaxOverlap;
  pipeline_rows<3>(begin, end, overlap, [&]<int S>(int64_t row) FASTFORMER_LAMBDA {
    softmax_steps<T, S, scaled>(input + row * a.cols, input + (row - 1) * a.cols, output + (row - 2) * a.cols, a.cols,
                                a.scale, a.stream, exponentials, progress);
  });
  if (a.stream) end_of_stream();
}

// scores = scale x.
template <typename T>
void scale_row(const T* x, float* scores, int64_t cols, float scale) {
  const Vec factor = broadcast(scale);
  for_lanes(0, cols, [&](int64_t i, int n) FASTFORMER_LAMBDA { store_n(scores + i, load_n(x + i, n) * factor, n); });
}

void drop_masked(const bool* keep, int64_t stride, float* scores, int64_t cols) {
  for (int64_t i = 0; i < cols; ++i) scores[i] = keep[i * stride] ? scores[i] : -INFINITY;
}

template <typename M>
void add_mask(const M* mask, int64_t stride, float* scores, int64_t cols) {
  for (int64_t i = 0; i < cols; ++i) scores[i] += to_float(mask[i * stride]);
}

template <typename T>
void masked_rows(const SoftmaxForward& a, int64_t begin, int64_t end, float* scores) {
  for (int64_t index = begin; index < end; ++index) {
    const int64_t row = index % a.rows, head = index / a.rows % a.heads, outer = index / a.rows / a.heads;
    const int64_t visible = a.is_causal ? smaller(row + 1, a.cols) : a.cols;
    const T* const x = static_cast<const T*>(a.input) + index * a.cols;
    T* const y = static_cast<T*>(a.output) + index * a.cols;
    const auto steps = [&](const auto* from, float scale) FASTFORMER_LAMBDA {
      Progress progress;
      softmax_steps<T, 1, true>(from, from, y, visible, scale, false, scores, progress);
      softmax_steps<T, 2, true>(from, from, y, visible, scale, false, scores, progress);
      softmax_steps<T, 4, true>(from, from, y, visible, scale, false, scores, progress);
    };
    const int64_t offset = outer * a.mask_strides[0] + head * a.mask_strides[1] + row * a.mask_strides[2];
    if (a.mask_kind == MaskKind::none) {
      steps(x, a.scale);
    } else {
      scale_row(x, scores, visible, a.scale);
      if (a.mask_kind == MaskKind::boolean) {
        drop_masked(static_cast<const bool*>(a.mask) + offset, a.mask_strides[3], scores, visible);
      } else {
        visit(a.mask_dtype, [&]<typename M>() {
          add_mask(static_cast<const M*>(a.mask) + offset, a.mask_strides[3], scores, visible);
        });
      }
      steps(scores, 1.0f);
    }
    memset(static_cast<void*>(y + visible), 0, (a.cols - visible) * sizeof(T));
  }
}

// grad_input = scale y (grad - sum(grad y)): step 0 takes the sum, step 1 the rest.
template <typename T>
void backward_rows(const SoftmaxBackward& a, int64_t begin, int64_t end) {
  const int64_t cols = a.cols;
  const Pair scale = both(broadcast(a.scale));
  float dot = 0.0f;  // of the row of step 1
  const bool overlap = kOverlapBackward<T> && cols * static_cast<int64_t>(sizeof(T)) <= kSoftmaxOverlap;
  pipeline_rows<2>(begin, end, overlap, [&]<int S>(int64_t row) FASTFORMER_LAMBDA {
    const T* const grad = static_cast<const T*>(a.grad_output) + row * cols;
    const T* const y = static_cast<const T*>(a.output) + row * cols;
    T* const result = static_cast<T*>(a.grad_input) + (row - 1) * cols;
    const Pair shift = both(broadcast(dot));
    Pair sum = both(zero());
    for (int64_t block = 0; block < cols; block += kSumBlock) {
      Pair block_sum = both(zero());
      for_pairs(block, smaller(cols, block + kSumBlock), [&](int64_t i, int n) FASTFORMER_LAMBDA {
        if (S & 1) {
          if (kOverlapBackward<T>) {
            fetch<kReadAhead / 2>(grad + i);
            fetch<kReadAhead / 2>(y + i);
          }
          block_sum = fma(load_pair(grad + i, n), load_pair(y + i, n), block_sum);
        }
        if (S & 2) {
          if (kOverlapBackward<T> && !a.stream) fetch<kWriteAhead>(result + i);
          const Pair centred = load_pair(grad - cols + i, n) - shift;
          put_pair(result + i, scale * load_pair(y - cols + i, n) * centred, n, a.stream);
        }
      });
      sum = sum + block_sum;
    }
    if (S & 1) dot = reduce_add(sum.first + sum.second);
  });
  if (a.stream) end_of_stream();
}

void forward(const SoftmaxForward& args, int64_t begin, int64_t end, float* scratch) {
  visit(args.dtype, [&]<typename T>() {
    if (args.mask_kind == MaskKind::none && !args.is_causal) {
      if (args.scale == 1.0f) {
        plain_rows<T, false>(args, begin, end, scratch);
      } else {
        plain_rows<T, true>(args, begin, end, scratch);
      }
    } else {
      masked_rows<T>(args, begin, end, scratch);
    }
  });
}

void backward(const SoftmaxBackward& args, int64_t begin, int64_t end) {
  visit(args.dtype, [&]<typename T>() { backward_rows<T>(args, begin, end); });
}

}  // namespace

const SoftmaxKernels softmax{forward, backward};

}  // namespace fastformer::FASTFORMER_LEVEL
