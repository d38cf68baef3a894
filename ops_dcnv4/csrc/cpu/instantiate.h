// The kernels in the instruction set of the including file.
#pragma once

#include "cpu/backward.h"
#include "cpu/forward.h"

namespace ops_dcnv4 {
namespace {

// The usual window, 3 x 3, has kernels of its own.
using NineTaps = std::integral_constant<int64_t, 9>;

template <typename scalar_t>
void run_forward(const Geometry& g, const Tensors<scalar_t>& t,
                 const Scratch<Accumulated<scalar_t>>& scratch, int64_t begin, int64_t end) {
  if (g.taps() == 9) {
    return forward(g, t, scratch, NineTaps(), begin, end);
  }
  forward(g, t, scratch, int64_t(g.taps()), begin, end);
}

template <typename scalar_t>
void run_backward(const Geometry& g, const Tensors<scalar_t>& t,
                  const Scratch<Accumulated<scalar_t>>& scratch, int64_t begin, int64_t end) {
  if (g.taps() == 9) {
    return backward(g, t, scratch, NineTaps(), begin, end);
  }
  backward(g, t, scratch, int64_t(g.taps()), begin, end);
}

template <typename scalar_t>
constexpr Kernels<scalar_t> kernels() {
  return {run_forward<scalar_t>, run_backward<scalar_t>};
}

constexpr InstructionSet instruction_set() {
  return {kernels<float>(), kernels<double>(), kernels<at::BFloat16>(), kernels<at::Half>()};
}

}  // namespace
}  // namespace ops_dcnv4
