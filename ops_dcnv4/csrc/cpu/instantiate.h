// The kernels in the instruction set of the including file.
#pragma once

#include "cpu/backward.h"
#include "cpu/forward.h"

namespace ops_dcnv4 {
namespace {

// Calls body(plan), with a constant number of taps for the usual window of 3 x 3.
template <typename acc_t, typename Body>
OPS_DCNV4_INLINE void with_plan(const Geometry& g, const Scratch<acc_t>& scratch, const Body& body) {
  using Nine = std::integral_constant<int64_t, 9>;
  if (g.taps() == 9) return body(Plan<acc_t, Nine>{scratch, {}});
  body(Plan<acc_t, int64_t>{scratch, g.taps()});
}

template <typename scalar_t>
void run_forward(const Geometry& g, const Tensors<scalar_t>& t,
                 const Scratch<Accumulated<scalar_t>>& scratch, int64_t begin, int64_t end) {
  with_plan(g, scratch, [&](auto plan) OPS_DCNV4_INLINE_LAMBDA { forward(g, t, plan, begin, end); });
}

template <typename scalar_t>
void run_backward(const Geometry& g, const Tensors<scalar_t>& t,
                  const Scratch<Accumulated<scalar_t>>& scratch, int64_t begin, int64_t end) {
  with_plan(g, scratch, [&](auto plan) OPS_DCNV4_INLINE_LAMBDA { backward(g, t, plan, begin, end); });
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
