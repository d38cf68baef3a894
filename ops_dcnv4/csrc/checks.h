// Checks that the operators share.
#pragma once

#include <ATen/core/Tensor.h>

#include <limits>

namespace ops_dcnv4 {

inline int to_int(int64_t number, const char* what) {
  TORCH_CHECK_VALUE(number <= std::numeric_limits<int>::max() / 4 &&
                        number >= std::numeric_limits<int>::min() / 4,
                    what, " is too large: ", number);
  return static_cast<int>(number);
}

inline void check_grad_output(at::IntArrayRef shape, const at::Tensor& grad_output,
                              const at::Tensor& value) {
  TORCH_CHECK_VALUE(grad_output.sizes() == shape &&
                        grad_output.scalar_type() == value.scalar_type() &&
                        grad_output.device() == value.device(),
                    "grad_output must have the shape, dtype and device of the output");
}

}  // namespace ops_dcnv4
