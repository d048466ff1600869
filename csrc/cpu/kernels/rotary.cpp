#include "rotary.h"

#include "lanes.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

// Lanes 0 and 1 exchanged, 2 and 3, and so on.
FASTFORMER_INLINE Vec swap_pairs(Vec v) {
#if defined(__AVX512F__)
  return _mm512_permute_ps(v, 0xb1);
#elif defined(__AVX2__)
  return _mm256_permute_ps(v, 0xb1);
#else
  return Vec{v[1], v[0], v[3], v[2]};
#endif
}

// One head at one position. Half-split: cos and sin hold `width` floats; interleaved: twice as many, with each cosine
// repeated and each sine once negative, once positive.
template <typename T, bool interleaved>
void rotate_head(const T* x, T* y, const float* cos, const float* sin, int64_t width, int64_t head_dim) {
  if (interleaved) {
    for_lanes(0, 2 * width, [&](int64_t i, int n) FASTFORMER_LAMBDA {
      const Vec v = load_n(x + i, n);
      store_n(y + i, fma(swap_pairs(v), load_n(sin + i, n), v * load_n(cos + i, n)), n);
    });
  } else {
    for_lanes(0, width, [&](int64_t i, int n) FASTFORMER_LAMBDA {
      const Vec first = load_n(x + i, n), second = load_n(x + width + i, n);
      const Vec c = load_n(cos + i, n), s = load_n(sin + i, n);
      store_n(y + i, fma(first, c, zero() - second * s), n);
      store_n(y + width + i, fma(second, c, first * s), n);
    });
  }
  memcpy(y + 2 * width, x + 2 * width, (head_dim - 2 * width) * sizeof(T));
}

template <typename T, bool interleaved>
void rotate_positions(const RotaryArgs& a, int64_t begin, int64_t end, float* scratch) {
  float* cos = scratch;
  float* sin = scratch + 2 * a.width;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t batch = index / a.seqlen, position = index % a.seqlen;
    const int64_t angles = batch * a.angle_batch_stride + position * a.width;
    for (int64_t i = 0; i < a.width; ++i) {
      const float c = a.cos[angles + i], s = a.inverse ? -a.sin[angles + i] : a.sin[angles + i];
      if (interleaved) {
        cos[2 * i] = cos[2 * i + 1] = c;
        sin[2 * i] = -s;
        sin[2 * i + 1] = s;
      } else {
        cos[i] = c;
        sin[i] = s;
      }
    }
    for (const RotaryTensor& t : a.tensors) {
      const T* x = static_cast<const T*>(t.input) + batch * t.strides[0] + position * t.strides[2];
      T* y = static_cast<T*>(t.output) + index * t.heads * a.head_dim;
      for (int64_t head = 0; head < t.heads; ++head) {
        rotate_head<T, interleaved>(x + head * t.strides[1], y + head * a.head_dim, cos, sin, a.width, a.head_dim);
      }
    }
  }
}

void rotate(const RotaryArgs& args, int64_t begin, int64_t end, float* scratch) {
  visit(args.dtype, [&]<typename T>() {
    if (args.interleaved) {
      rotate_positions<T, true>(args, begin, end, scratch);
    } else {
      rotate_positions<T, false>(args, begin, end, scratch);
    }
  });
}

}  // namespace

const RotaryKernels rotary{rotate};

}  // namespace fastformer::FASTFORMER_LEVEL
