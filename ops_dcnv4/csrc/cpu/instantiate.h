// Instantiates the kernels for the instruction set of the including file.
#pragma once

#include "cpu/backward.h"
#include "cpu/forward.h"

namespace ops_dcnv4 {
namespace {

// 3 x 3 windows, and 4 points in each of 4 levels, have specialised kernels.
constexpr int usual_taps(const Geometry*) { return 9; }
constexpr int usual_taps(const Attention*) { return 16; }

template <typename Sizes>
using UsualTaps = std::integral_constant<int64_t, usual_taps(static_cast<Sizes*>(nullptr))>;

template <typename Sizes, typename Tensors, typename acc_t>
void run_forward(const Sizes& sizes, const Tensors& t, const Scratch<acc_t>& scratch, int64_t begin,
                 int64_t end) {
  if (sizes.taps() == UsualTaps<Sizes>::value) {
    return forward(sizes, t, scratch, UsualTaps<Sizes>(), begin, end);
  }
  forward(sizes, t, scratch, int64_t(sizes.taps()), begin, end);
}

template <typename Sizes, typename Tensors, typename acc_t>
void run_backward(const Sizes& sizes, const Tensors& t, const Scratch<acc_t>& scratch,
                  int64_t begin, int64_t end) {
  if (sizes.taps() == UsualTaps<Sizes>::value) {
    return backward(sizes, t, scratch, UsualTaps<Sizes>(), begin, end);
  }
  backward(sizes, t, scratch, int64_t(sizes.taps()), begin, end);
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
