// Instantiates the kernels for the instruction set of the including file.
#pragma once

#include "cpu/backward.h"
#include "cpu/forward.h"

namespace ops_dcnv4 {
namespace {

// Calls body with the number of taps, as a constant for 3 x 3 windows and for 4 points in each of 4
// levels.
template <typename Call, typename Body>
void with_taps(const Call& call, const Body& body) {
  constexpr int64_t usual = std::is_same_v<Call, Geometry> ? 9 : 16;
  if (call.taps() == usual) return body(std::integral_constant<int64_t, usual>());
  body(int64_t(call.taps()));
}

template <typename Call, typename Tensors, typename acc_t>
void run_forward(const Call& call, const Tensors& t, const Scratch<acc_t>& scratch, int64_t begin,
                 int64_t end) {
  with_taps(call, [&](auto taps) { forward(call, t, scratch, taps, begin, end); });
}

template <typename Call, typename Tensors, typename acc_t>
void run_backward(const Call& call, const Tensors& t, const Scratch<acc_t>& scratch, int64_t begin,
                  int64_t end) {
  with_taps(call, [&](auto taps) { backward(call, t, scratch, taps, begin, end); });
}

template <typename scalar_t>
constexpr Kernels<scalar_t> kernels() {
  using acc_t = Accumulated<scalar_t>;
  return {run_forward<Geometry, Dcnv4Tensors<scalar_t>, acc_t>,
          run_forward<Attention, AttentionTensors<scalar_t>, acc_t>,
          run_backward<Geometry, Dcnv4Tensors<scalar_t>, acc_t>,
          run_backward<Attention, AttentionTensors<scalar_t>, acc_t>};
}

constexpr InstructionSet instruction_set_of_file(const char* name) {
  return {name, kernels<float>(), kernels<double>(), kernels<c10::BFloat16>(),
          kernels<c10::Half>()};
}

}  // namespace
}  // namespace ops_dcnv4
