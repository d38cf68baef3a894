// Dispatch from a tensor's dtype to the types that a kernel is compiled for.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <type_traits>

namespace ops_dcnv4 {

// Calls function(element, accumulator) with a zero of each type. 16-bit types accumulate in float.
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
      TORCH_INTERNAL_ASSERT(false, "check_dtype accepted ", dtype);
  }
}

// Calls function(element, accumulator, point element) for attention, where the points have the
// dtype of value or that of the accumulator.
template <typename Function>
void dispatch(at::ScalarType dtype, at::ScalarType points, const Function& function) {
  dispatch(dtype, [&](auto scalar, auto acc) {
    if (points == dtype) return function(scalar, acc, scalar);
    if constexpr (!std::is_same_v<decltype(scalar), decltype(acc)>) {
      return function(scalar, acc, acc);
    }
  });
}

}  // namespace ops_dcnv4
