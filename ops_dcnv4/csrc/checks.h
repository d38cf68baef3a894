// Argument checks shared by the operators.
#pragma once

#include <cstdint>
#include <limits>

#include "tensor.h"

namespace ops_dcnv4 {

// Largest height and width of an image. Coordinates are computed in float32, which represents all
// integers up to this limit. A larger size could be rounded up, so that a pixel beyond the border
// would be read.
constexpr int64_t largest_side = 1 << 24;

inline bool is_side(int64_t number) { return number > 0 && number <= largest_side; }

// Largest size, which leaves room for small multiples and sums in an int.
constexpr int64_t largest_count = std::numeric_limits<int>::max() / 4;

inline int to_int(int64_t number, const char* name, int64_t minimum = 0,
                  int64_t maximum = largest_count) {
  OPS_DCNV4_CHECK(number >= minimum && number <= maximum, name, " must be from ", minimum, " to ",
                  maximum, ", got ", number);
  return static_cast<int>(number);
}

template <typename T>
void check_equal(const char* what, const T& actual, const T& expected) {
  OPS_DCNV4_CHECK(actual == expected, what, " must be ", expected, ", got ", actual);
}

inline void check_shape(const char* what, IntArrayRef actual, IntArrayRef expected) {
  OPS_DCNV4_CHECK(actual.equals(expected), what, " must be ", expected, ", got ", actual);
}

inline bool is_16_bit(ScalarType dtype) {
  return dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

// Returns the dtype in which tensors of a dtype are computed and accumulated.
inline ScalarType accumulated(ScalarType dtype) {
  return dtype == ScalarType::Double ? dtype : ScalarType::Float;
}

inline void check_dtype(const Tensor& value) {
  const ScalarType dtype = value.scalar_type();
  OPS_DCNV4_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || is_16_bit(dtype),
                  "value must be a floating-point tensor of 16, 32 or 64 bits, got ", dtype);
}

inline void check_grad_output(IntArrayRef shape, const Tensor& grad_output, const Tensor& value) {
  OPS_DCNV4_CHECK(
      grad_output.sizes().equals(shape) && grad_output.scalar_type() == value.scalar_type() &&
          grad_output.device() == value.device(),
      "grad_output must have the shape, dtype and device of the output, got shape ",
      grad_output.sizes(), ", ", grad_output.scalar_type(), " on ", grad_output.device());
}

// Returns a contiguous tensor that is aligned to its element type; external memory may not be.
inline Tensor dense(const Tensor& tensor) {
  const Tensor contiguous = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  const auto address = reinterpret_cast<std::uintptr_t>(contiguous.const_data_ptr());
  return address % contiguous.element_size() == 0 ? contiguous : torch::stable::clone(contiguous);
}

}  // namespace ops_dcnv4
