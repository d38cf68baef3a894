// The kernels of all instruction sets, and the choice among them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "attention.h"
#include "geometry.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(OPS_DCNV4_PLAIN_VECTORS)
#define OPS_DCNV4_X86 1
#endif

namespace ops_dcnv4 {

// 16-bit types are computed and accumulated in float32.
template <typename scalar_t>
using Accumulated = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename scalar_t>
struct Dcnv4Tensors {
  const scalar_t* value;
  const scalar_t* offset_mask;
  scalar_t* output;             // forward
  const scalar_t* grad_output;  // backward
  scalar_t* grad_value;         // backward
  scalar_t* grad_offset_mask;   // backward
};

// Locations and normalized weights have the accumulator's type. Weights are contiguous. Locations
// are Attention::location_stride apart from one (query, head) to the next.
template <typename scalar_t>
struct AttentionTensors {
  using acc_t = Accumulated<scalar_t>;
  const int64_t *spatial_shapes, *level_start_index;
  const scalar_t* value;
  const acc_t *locations, *weights;
  scalar_t* output;                      // forward
  const scalar_t* grad_output;           // backward
  scalar_t* grad_value;                  // backward
  acc_t *grad_locations, *grad_weights;  // backward
};

// Memory of a worker, aligned to whole vectors.
template <typename acc_t>
struct Scratch {
  acc_t* numbers;
  int32_t* indices;
  acc_t* value;       // backward: one group or head of one image
  acc_t* grad_value;  // backward: its gradient
};

// Number of taps in a plan, possibly zero, rounded up to whole vectors of any width.
constexpr int64_t plan_stride(int64_t taps) { return taps > 0 ? (taps + 15) / 16 * 16 : 16; }

// Number of plans that are made at a time, few enough to stay in the L1 cache.
constexpr int64_t strip_plans(int64_t taps) { return taps <= 64 ? 256 / plan_stride(taps) : 1; }

// Sizes of Scratch's numbers and indices: the arrays shared by all plans, and the plans of a strip.
constexpr int64_t shared_arrays = 2;
constexpr int64_t scratch_numbers(int64_t taps) {
  return (shared_arrays + 13 * strip_plans(taps)) * plan_stride(taps);
}
constexpr int64_t scratch_indices(int64_t taps) {
  return (shared_arrays + 3 * strip_plans(taps)) * plan_stride(taps);
}

template <typename scalar_t>
struct Kernels {
  // Kernels may be called for several ranges concurrently.
  template <typename Call, typename Tensors>
  using Function = void(const Call&, const Tensors&, const Scratch<Accumulated<scalar_t>>&,
                        int64_t begin, int64_t end);
  // Output pixels or queries [begin, end), counted over the batch.
  Function<Geometry, Dcnv4Tensors<scalar_t>>* dcnv4_forward;
  Function<Attention, AttentionTensors<scalar_t>>* ms_deform_attn_forward;
  // (image, group) or (image, head) slices [begin, end), counted over the batch.
  Function<Geometry, Dcnv4Tensors<scalar_t>>* dcnv4_backward;
  Function<Attention, AttentionTensors<scalar_t>>* ms_deform_attn_backward;
};

struct InstructionSet {
  const char* name;
  Kernels<float> for_float;
  Kernels<double> for_double;
  Kernels<c10::BFloat16> for_bfloat16;
  Kernels<c10::Half> for_half;

  const Kernels<float>& kernels(float) const { return for_float; }
  const Kernels<double>& kernels(double) const { return for_double; }
  const Kernels<c10::BFloat16>& kernels(c10::BFloat16) const { return for_bfloat16; }
  const Kernels<c10::Half>& kernels(c10::Half) const { return for_half; }
};

extern const InstructionSet baseline, avx2, avx512;

// Returns the best instruction set that the processor supports and the environment variable
// OPS_DCNV4_CPU_CAPABILITY or, if it is unset, ATEN_CPU_CAPABILITY allows. Raises an error if the
// former has an unknown value.
const InstructionSet& instruction_set();

}  // namespace ops_dcnv4
