// Instantiates the kernels for the instruction set of the including file.
#pragma once

#include "cpu/backward.h"
#include "cpu/forward.h"

namespace ops_dcnv4 {
namespace {

// 3 x 3 windows, and 4 points in each of 4 levels, have specialised kernels.
constexpr int usual_taps(const Geometry*) { return 9; }
constexpr int usual_taps(const Attention*) { return 16; }

template <typename Call>
using UsualTaps = std::integral_constant<int64_t, usual_taps(static_cast<Call*>(nullptr))>;

template <typename Call, typename Tensors, typename acc_t>
void run_forward(const Call& call, const Tensors& t, const Scratch<acc_t>& scratch, int64_t begin,
                 int64_t end) {
  if (call.taps() == UsualTaps<Call>::value) {
    return forward(call, t, scratch, UsualTaps<Call>(), begin, end);
  }
  forward(call, t, scratch, int64_t(call.taps()), begin, end);
}

template <typename Call, typename Tensors, typename acc_t>
void run_backward(const Call& call, const Tensors& t, const Scratch<acc_t>& scratch, int64_t begin,
                  int64_t end) {
  if (call.taps() == UsualTaps<Call>::value) {
    return backward(call, t, scratch, UsualTaps<Call>(), begin, end);
  }
  backward(call, t, scratch, int64_t(call.taps()), begin, end);
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
  return {name, kernels<float>(), kernels<double>(), kernels<at::BFloat16>(), kernels<at::Half>()};
}

}  // namespace
}  // namespace ops_dcnv4
