#include "layer_norm.h"

#include "row_pipeline.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

// A vector's elements as floats, in the order in which load_pair<T> gives a row's. `room` holds cols floats.
template <typename T>
const float* in_row_order(const void* vector, DType dtype, int64_t cols, float* room) {
  if (vector == nullptr) return nullptr;
  visit(dtype, [&]<typename W>() {
    const W* const from = static_cast<const W*>(vector);
    for_pairs(0, cols, [&](int64_t i, int n) FASTFORMER_LAMBDA {
      const Pair v = n == kPair ? in_pair_order<T>({load(from + i), load(from + i + kLanes)}) : load_pair(from + i, n);
      store_pair(room + i, v, n);
    });
  });
  return room;
}

template <typename T>
FASTFORMER_INLINE const T* row_of(const void* matrix, int64_t row, int64_t cols) {
  return static_cast<const T*>(matrix) + row * cols;
}
template <typename T>
FASTFORMER_INLINE T* row_of(void* matrix, int64_t row, int64_t cols) {
  return static_cast<T*>(matrix) + row * cols;
}

// Step 0 sums a row, 1 its squares about the mean (sums of squares would cancel where the mean is large), 2 norms it.
// Step 1 also finds by how much the mean was rounded, which in a row of nearly equal values is more than they differ
// ("the corrected two-pass algorithm": Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983).
template <typename T, bool has_residual>
void forward_rows(const LayerNormForward& a, int64_t begin, int64_t end, float* scratch) {
  constexpr int kReadBytes = has_residual ? kReadAhead / 2 : kReadAhead;
  constexpr int kWriteBytes = has_residual ? kWriteAhead / 2 : kWriteAhead;
  const int64_t cols = a.cols;
  const float inverse = 1.0f / static_cast<float>(cols);
  const float* const weight = in_row_order<T>(a.weight, a.weight_dtype, cols, scratch);
  const float* const bias = in_row_order<T>(a.bias, a.bias_dtype, cols, scratch + cols);
  const bool overlap = cols * static_cast<int64_t>(sizeof(T)) <= kNormOverlap, stream = a.stream;
  // What is streamed to memory can't be read again soon: then sums are kept here, of a row at each step.
  T* const kept = reinterpret_cast<T*>(scratch + 2 * cols);
  const auto normed_row = [&](int64_t row) FASTFORMER_LAMBDA {
    if (has_residual && stream) return const_cast<const T*>(kept) + (row + 3) % 3 * cols;
    return row_of<T>(has_residual ? a.summed : a.input, row, cols);
  };
  float mean = 0.0f, normed_mean = 0.0f, rstd = 0.0f;  // of the rows of steps 1, 2 and 2
  pipeline_rows<3>(begin, end, overlap, [&]<int S>(int64_t row) FASTFORMER_LAMBDA {
    const T* const input = row_of<T>(a.input, row, cols);
    const T* const residual = row_of<T>(a.residual, row, cols);
    T* const summed = row_of<T>(a.summed, row, cols);
    T* const sums = stream ? kept + (row + 3) % 3 * cols : summed;
    const T* const centred = normed_row(row - 1);
    const T* const normed = normed_row(row - 2);
    T* const output = row_of<T>(a.output, row - 2, cols);
    const Pair centre = both(broadcast(mean)), normed_centre = both(broadcast(normed_mean));
    const Pair factor = both(broadcast(rstd));
    Pair sum = both(zero()), square = both(zero()), rest = both(zero());
    for (int64_t block = 0; block < cols; block += kSumBlock) {
      Pair block_sum = both(zero()), block_square = both(zero()), block_rest = both(zero());
      for_pairs(block, smaller(cols, block + kSumBlock), [&](int64_t i, int n) FASTFORMER_LAMBDA {
        if (S & 1) {
          fetch<kReadBytes>(input + i);
          Pair v = load_pair(input + i, n);
          if (has_residual) {
            fetch<kReadBytes>(residual + i);
            if (!stream) fetch<kWriteBytes>(summed + i);
            // What is normed is the sum as it was rounded for `summed`: what an unfused pair would
            // norm.
            store_pair(sums + i, v + load_pair(residual + i, n), n);
            v = load_pair(sums + i, n);
            if (stream) put_pair(summed + i, v, n, true);
          }
          block_sum = block_sum + v;
        }
        if (S & 2) {
          const Pair v = keep(load_pair(centred + i, n) - centre, n, zero());
          block_square = fma(v, v, block_square);
          block_rest = block_rest + v;
        }
        if (S & 4) {
          if (!stream) fetch<kWriteBytes>(output + i);
          // Each sum is said to be fused: left to the compiler it differs between the steps' combinations, and so
          // would rows by their place.
          const Pair distance = load_pair(normed + i, n) - normed_centre;
          Pair y = distance * factor;
          if (weight != nullptr && bias != nullptr) {
            y = fma(y, load_pair(weight + i, n), load_pair(bias + i, n));
          } else if (weight != nullptr) {
            y = y * load_pair(weight + i, n);
          } else if (bias != nullptr) {
            y = fma(distance, factor, load_pair(bias + i, n));
          }
          put_pair(output + i, y, n, stream);
        }
      });
      sum = sum + block_sum;
      square = square + block_square;
      rest = rest + block_rest;
    }
    if (S & 2) {
      float variance = inverse * reduce_add(square.first + square.second);
      if (a.mean != nullptr) {
        const float rounded = inverse * reduce_add(rest.first + rest.second);
        variance = fmaxf(0.0f, fmaf(-rounded, rounded, variance));
        normed_mean = mean + rounded;
        a.mean[row - 1] = normed_mean;
      }
      rstd = 1.0f / sqrtf(variance + a.eps);
      a.rstd[row - 1] = rstd;
    }
    if ((S & 1) && a.mean != nullptr) mean = inverse * reduce_add(sum.first + sum.second);
  });
  if (stream) end_of_stream();
}

// With g = grad_output * weight and xhat = (summed - mean) rstd:
//   grad_input = rstd (g - mean(g) - xhat mean(g xhat)) + grad_summed        (RMS norm: without mean(g))
// Step 0 takes the sums over a row and adds it to the gradients of weight and bias, 1 is the line above.
template <typename T>
void backward_rows(const LayerNormBackward& a, int64_t begin, int64_t end, float* grad_weight, float* grad_bias,
                   float* scratch) {
  const int64_t cols = a.cols;
  const float inverse = 1.0f / static_cast<float>(cols);
  const float* const weight = in_row_order<float>(a.weight, a.weight_dtype, cols, scratch);
  float mean_g = 0.0f, mean_gx = 0.0f;  // of the row of step 1
  const bool overlap = kOverlapBackward<T> && cols * static_cast<int64_t>(sizeof(T)) <= kNormOverlap;
  pipeline_rows<2>(begin, end, overlap, [&]<int S>(int64_t row) FASTFORMER_LAMBDA {
    const T* const grad = row_of<T>(a.grad_output, row, cols);
    const T* const summed = row_of<T>(a.summed, row, cols);
    T* const grad_input = row_of<T>(a.grad_input, row - 1, cols);
    const auto statistic = [&](const float* of_rows, int step) FASTFORMER_LAMBDA {
      return broadcast(of_rows != nullptr && (S & (1 << step)) ? of_rows[row - step] : 0.0f);
    };
    const Vec mean[] = {statistic(a.mean, 0), statistic(a.mean, 1)};
    const Vec rstd[] = {statistic(a.rstd, 0), statistic(a.rstd, 1)};
    const Vec m_g = broadcast(mean_g), m_gx = broadcast(mean_gx);
    Vec sum_g = zero(), sum_gx = zero();
    for (int64_t block = 0; block < cols; block += kSumBlock) {
      Vec block_g = zero(), block_gx = zero();
      for_lanes(block, smaller(cols, block + kSumBlock), [&](int64_t i, int n) FASTFORMER_LAMBDA {
        const Vec w = weight == nullptr ? broadcast(1.0f) : load_n(weight + i, n);
        if (S & 1) {
          if (kOverlapBackward<T>) {
            fetch<kReadAhead / 2, kLanes>(grad + i);
            fetch<kReadAhead / 2, kLanes>(summed + i);
          }
          const Vec dy = load_n(grad + i, n), g = dy * w;
          const Vec xhat = (load_n(summed + i, n) - mean[0]) * rstd[0];
          block_g = block_g + g;
          block_gx = fma(g, xhat, block_gx);
          if (grad_weight != nullptr) store_n(grad_weight + i, fma(dy, xhat, load_n(grad_weight + i, n)), n);
          if (grad_bias != nullptr) store_n(grad_bias + i, load_n(grad_bias + i, n) + dy, n);
        }
        if (S & 2) {
          if (kOverlapBackward<T>) fetch<kWriteAhead, kLanes>(grad_input + i);
          const Vec g = load_n(grad - cols + i, n) * w;
          const Vec xhat = (load_n(summed - cols + i, n) - mean[1]) * rstd[1];
          const Vec centred = fma(xhat, zero() - m_gx, g - m_g);
          const Vec dx = a.grad_summed == nullptr
                             ? centred * rstd[1]
                             : fma(centred, rstd[1], load_n(row_of<T>(a.grad_summed, row - 1, cols) + i, n));
          store_n(grad_input + i, dx, n);
        }
      });
      sum_g = sum_g + block_g;
      sum_gx = sum_gx + block_gx;
    }
    if (S & 1) {
      if (a.mean != nullptr) mean_g = inverse * reduce_add(sum_g);
      mean_gx = inverse * reduce_add(sum_gx);
    }
  });
}

void forward(const LayerNormForward& args, int64_t begin, int64_t end, float* scratch) {
  visit(args.dtype, [&]<typename T>() {
    if (args.residual != nullptr) {
      forward_rows<T, true>(args, begin, end, scratch);
    } else {
      forward_rows<T, false>(args, begin, end, scratch);
    }
  });
}

void backward(const LayerNormBackward& args, int64_t begin, int64_t end, float* grad_weight, float* grad_bias,
              float* scratch) {
  visit(args.dtype, [&]<typename T>() { backward_rows<T>(args, begin, end, grad_weight, grad_bias, scratch); });
}

}  // namespace

const LayerNormKernels layer_norm{forward, backward};

}  // namespace fastformer::FASTFORMER_LEVEL
