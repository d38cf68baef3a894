// Dispatch from a tensor's dtype to the types that a kernel is compiled for.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "tensor.h"

namespace ops_dcnv4 {

// Calls function(element, accumulator) with a zero of each type. 16-bit types accumulate in float.
template <typename Function>
void dispatch(ScalarType dtype, const Function& function) {
  switch (dtype) {
    case ScalarType::Float:
      return function(float(), float());
    case ScalarType::Double:
      return function(double(), double());
    case ScalarType::BFloat16:
      return function(c10::BFloat16(), float());
    case ScalarType::Half:
      return function(c10::Half(), float());
    default:
      refuse<std::logic_error>("check_dtype accepted ", dtype);
  }
}

// Calls function(element, accumulator, point element) for attention, where the points have the
// dtype of value or that of the accumulator.
template <typename Function>
void dispatch(ScalarType dtype, ScalarType points, const Function& function) {
  dispatch(dtype, [&](auto scalar, auto acc) {
    if (points == dtype) return function(scalar, acc, scalar);
    if constexpr (!std::is_same_v<decltype(scalar), decltype(acc)>) {
      return function(scalar, acc, acc);
    }
  });
}

}  // namespace ops_dcnv4
