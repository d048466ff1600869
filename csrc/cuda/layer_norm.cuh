// What layer norm's two directions share: the vectors along a row, weight and bias, and how much of a row is kept.
#pragma once

#include "rows.cuh"

namespace fastformer::cuda {

// A pack of weights or biases [C] from `column` on; `otherwise` if there are none.
template <int kPack, typename W>
FASTFORMER_DEVICE void load_vector(float (&to)[kPack], const W* vector, int64_t column, float otherwise) {
#pragma unroll
  for (int i = 0; i < kPack; ++i) to[i] = otherwise;
  if (vector != nullptr) load_floats<true>(to, vector + column);
}

// Of a row that shared memory doesn't hold, what it has room for: the columns of whole steps of a loop.
inline int64_t kept_steps(int64_t column_bytes, int64_t step, const OnDevice& device) {
  return (device.shared_memory_limit() - Team<kBlock>::kSharedBytes) / column_bytes / step * step;
}

inline Tensor zeros(const Tensor& like, int64_t count, ScalarType dtype) {
  return torch::stable::new_zeros(like, {count}, dtype);
}

inline void check_row_vector(const std::optional<Tensor>& vector, const char* name, const Tensor& input,
                             const char* input_name) {
  if (!vector.has_value()) return;
  check_device(*vector, name, input, input_name);
  dtype_of(*vector, name);
  STD_TORCH_CHECK(vector->dim() == 1 && vector->size(0) == input.size(input.dim() - 1), name,
                  " must be a vector as long as a row of ", input_name);
}

// The kernels read weight and bias in one dtype, that of the rows or float32, and in accesses as wide as the rows'. A
// vector that is not so is copied first: that is C elements, and narrow accesses would be all N rows'.
inline std::optional<Tensor> row_vector(const std::optional<Tensor>& vector, ScalarType dtype, bool widest,
                                        const char* name) {
  if (!vector.has_value()) return std::nullopt;
  const Tensor same = vector->scalar_type() == dtype ? as_contiguous(*vector) : as_float(*vector, name);
  return widest && !is_aligned(same) ? torch::stable::clone(same) : same;
}

// Calls body.operator()<T, W>() for rows of `rows` and vectors of `vectors`, the same or float32.
template <typename Body>
void for_dtypes(DType rows, DType vectors, Body&& body) {
  for_dtype(rows, [&]<typename T>() {
    rows == vectors ? body.template operator()<T, T>() : body.template operator()<T, float>();
  });
}

// Calls what it is given with each type of the rows and of the weights, and with the elements of an access.
#define FASTFORMER_FOR_NORMS(instance)                \
  FASTFORMER_NORM_PACKS(instance, float, float)       \
  FASTFORMER_NORM_PACKS(instance, BFloat16, BFloat16) \
  FASTFORMER_NORM_PACKS(instance, BFloat16, float)    \
  FASTFORMER_NORM_PACKS(instance, Half, Half)         \
  FASTFORMER_NORM_PACKS(instance, Half, float)
#define FASTFORMER_NORM_PACKS(instance, T, W) instance(T, W, 1) instance(T, W, kWidest<T>)

}  // namespace fastformer::cuda
