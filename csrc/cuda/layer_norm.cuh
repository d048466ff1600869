// What layer norm's two directions share: a thread's columns of a row, and which types the vectors along it have.
#pragma once

#include "rows.cuh"

namespace fastformer::cuda {

// Calls apply(first, column) for each pack of a thread's columns before `columns`: `first` is the place of its first
// element among the thread's own.
template <int kPack, int kCount, int kLanes, typename Apply>
FASTFORMER_DEVICE void for_packs(const Team<kLanes>& team, int columns, Apply apply) {
#pragma unroll
  for (int p = 0; p < kCount / kPack; ++p) {
    const int column = team.template column<kPack>(p);
    if (column < columns) apply(p * kPack, column);
  }
}

// 0 where a column doesn't exist.
template <int kPack, typename T, int kCount, int kLanes>
FASTFORMER_DEVICE void load_row(T (&values)[kCount], const T* row, int columns, const Team<kLanes>& team) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = T{};
  for_packs<kPack, kCount>(team, columns, [&](int first, int column) {
    const Pack<T, kPack> pack = load<kPack>(row + column);
#pragma unroll
    for (int i = 0; i < kPack; ++i) values[first + i] = pack.values[i];
  });
}

template <int kPack, typename T, int kCount, int kLanes>
FASTFORMER_DEVICE void store_row(T* row, const T (&values)[kCount], int columns, const Team<kLanes>& team) {
  for_packs<kPack, kCount>(team, columns, [&](int first, int column) {
    Pack<T, kPack> pack;
#pragma unroll
    for (int i = 0; i < kPack; ++i) pack.values[i] = values[first + i];
    store(row + column, pack);
  });
}

// kCount neighbours from `column` on as float, in accesses of 16 bytes at most; `otherwise` if there is no vector.
template <int kCount, typename W>
FASTFORMER_DEVICE void load_floats(float (&values)[kCount], const W* vector, int64_t column, float otherwise) {
  constexpr int kPiece = kCount < kWidest<W> ? kCount : kWidest<W>;
#pragma unroll
  for (int start = 0; start < kCount; start += kPiece) {
    Pack<W, kPiece> pack{};
    if (vector != nullptr) pack = load<kPiece>(vector + column + start);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) values[start + i] = vector != nullptr ? to_float(pack.values[i]) : otherwise;
  }
}

template <int kCount>
FASTFORMER_DEVICE void store_floats(float* to, const float* values) {
  constexpr int kPiece = kCount < kWidest<float> ? kCount : kWidest<float>;
#pragma unroll
  for (int start = 0; start < kCount; start += kPiece) {
    Pack<float, kPiece> pack;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) pack.values[i] = values[start + i];
    store(to + start, pack);
  }
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

// The kernels read weight and bias in one dtype, that of the rows or float32; a vector in another is copied first.
inline std::optional<Tensor> row_vector(const std::optional<Tensor>& vector, ScalarType dtype, const char* name) {
  if (!vector.has_value()) return std::nullopt;
  return vector->scalar_type() == dtype ? as_contiguous(*vector) : as_float(*vector, name);
}

template <typename W>
bool takes_widest(const W* vector) {
  return reinterpret_cast<uintptr_t>(vector) % 16 == 0;
}

// Calls body.operator()<T, W>() for rows of `rows` and vectors of `vectors`, the same or float32.
template <typename Body>
void for_dtypes(DType rows, DType vectors, Body&& body) {
  for_dtype(rows, [&]<typename T>() {
    rows == vectors ? body.template operator()<T, T>() : body.template operator()<T, float>();
  });
}

}  // namespace fastformer::cuda
