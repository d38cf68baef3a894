// Argument checks shared by the operators.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>

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
  TORCH_CHECK_VALUE(number >= minimum && number <= maximum, name, " must be from ", minimum, " to ",
                    maximum, ", got ", number);
  return static_cast<int>(number);
}

template <typename T>
void check_equal(const char* what, const T& actual, const T& expected) {
  TORCH_CHECK_VALUE(actual == expected, what, " must be ", expected, ", got ", actual);
}

inline void check_dtype(const at::Tensor& value) {
  const at::ScalarType dtype = value.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
      "value must be a floating-point tensor of 16, 32 or 64 bits, got ", dtype);
}

inline void check_grad_output(at::IntArrayRef shape, const at::Tensor& grad_output,
                              const at::Tensor& value) {
  TORCH_CHECK_VALUE(
      grad_output.sizes() == shape && grad_output.scalar_type() == value.scalar_type() &&
          grad_output.device() == value.device(),
      "grad_output must have the shape, dtype and device of the output, got shape ",
      grad_output.sizes(), ", ", grad_output.scalar_type(), " on ", grad_output.device());
}

// Returns a contiguous tensor that is aligned to its element type; external memory may not be.
inline at::Tensor dense(const at::Tensor& tensor) {
  const at::Tensor contiguous = tensor.contiguous();
  const auto address = reinterpret_cast<std::uintptr_t>(contiguous.const_data_ptr());
  return address % contiguous.element_size() == 0 ? contiguous : contiguous.clone();
}

}  // namespace ops_dcnv4
