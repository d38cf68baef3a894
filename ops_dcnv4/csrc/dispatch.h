// From a tensor's dtype to the types that a kernel is compiled for.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

namespace ops_dcnv4 {

// Calls function(element, accumulator) with a zero of each type: 16 bits are summed up in 32.
template <typename Function>
void dispatch(at::ScalarType dtype, const Function& function) {
  switch (dtype) {
    case at::kFloat:
      return function(float(), float());
    case at::kDouble:
      return function(double(), double());
    case at::kBFloat16:
      return function(at::BFloat16(), float());
    case at::kHalf:
      return function(at::Half(), float());
    default:
      TORCH_CHECK_TYPE(false, "value must be a floating-point tensor of 16, 32 or 64 bits, got ", dtype);
  }
}

}  // namespace ops_dcnv4
