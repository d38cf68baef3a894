// Schemas of the operators, and registration of a device's kernels for them.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "operators.h"

namespace ops_dcnv4 {

using torch::stable::detail::StableLibrary;

// registration.py has the same schemas, for installations without compiled libraries.
inline void define_operators(StableLibrary& library) {
#define OPS_DCNV4_WINDOW                                                 \
  "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, " \
  "int groups, float offset_scale, bool remove_center"
#define OPS_DCNV4_LEVELS "Tensor value, Tensor spatial_shapes, Tensor level_start_index"
#define OPS_DCNV4_DEFINE(name, inputs, gradients)          \
  library.def(name "(" inputs ") -> Tensor");              \
  library.def(name "_backward(Tensor grad_output, " inputs \
                   ", *, bool deterministic=False) -> (" gradients ")")
  OPS_DCNV4_DEFINE("dcnv4", "Tensor value, Tensor offset_mask, " OPS_DCNV4_WINDOW,
                   "Tensor, Tensor");
  OPS_DCNV4_DEFINE("ms_deform_attn",
                   OPS_DCNV4_LEVELS ", Tensor sampling_locations, Tensor attention_weights",
                   "Tensor, Tensor, Tensor");
  OPS_DCNV4_DEFINE("flash_deform_attn", OPS_DCNV4_LEVELS ", Tensor sampling_loc_attn, int n_points",
                   "Tensor, Tensor");
#undef OPS_DCNV4_DEFINE
#undef OPS_DCNV4_LEVELS
#undef OPS_DCNV4_WINDOW
}

// The operators' functions, with the arguments of their schemas.
template <Dcnv4Kernel& dcnv4_kernel, Dcnv4BackwardKernel& dcnv4_backward_kernel,
          AttentionKernel& attention_kernel, AttentionBackwardKernel& attention_backward_kernel>
struct Operators {
  static Tensor dcnv4(const Tensor& value, const Tensor& offset_mask, IntArrayRef kernel_size,
                      IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                      double offset_scale, bool remove_center) {
    return dcnv4_kernel(
        {kernel_size, stride, padding, dilation, groups, offset_scale, remove_center}, value,
        offset_mask);
  }

  static std::tuple<Tensor, Tensor> dcnv4_backward(const Tensor& grad_output, const Tensor& value,
                                                   const Tensor& offset_mask,
                                                   IntArrayRef kernel_size, IntArrayRef stride,
                                                   IntArrayRef padding, IntArrayRef dilation,
                                                   int64_t groups, double offset_scale,
                                                   bool remove_center, bool deterministic) {
    return dcnv4_backward_kernel(
        {kernel_size, stride, padding, dilation, groups, offset_scale, remove_center}, grad_output,
        value, offset_mask, deterministic);
  }

  static Tensor ms_deform_attn(const Tensor& value, const Tensor& shapes, const Tensor& starts,
                               const Tensor& locations, const Tensor& weights) {
    return attention_kernel({value, shapes, starts, locations, weights});
  }

  static std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(
      const Tensor& grad_output, const Tensor& value, const Tensor& shapes, const Tensor& starts,
      const Tensor& locations, const Tensor& weights, bool deterministic) {
    const auto grads = attention_backward_kernel({value, shapes, starts, locations, weights},
                                                 grad_output, deterministic);
    return {grads.value, grads.locations, grads.weights};
  }

  static Tensor flash_deform_attn(const Tensor& value, const Tensor& shapes, const Tensor& starts,
                                  const Tensor& packed, int64_t n_points) {
    return attention_kernel({value, shapes, starts, packed, packed, true, n_points});
  }

  static std::tuple<Tensor, Tensor> flash_deform_attn_backward(
      const Tensor& grad_output, const Tensor& value, const Tensor& shapes, const Tensor& starts,
      const Tensor& packed, int64_t n_points, bool deterministic) {
    const auto grads = attention_backward_kernel(
        {value, shapes, starts, packed, packed, true, n_points}, grad_output, deterministic);
    return {grads.value, grads.locations};
  }

  static void implement(StableLibrary& library) {
    library.impl("dcnv4", TORCH_BOX(&dcnv4));
    library.impl("dcnv4_backward", TORCH_BOX(&dcnv4_backward));
    library.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn));
    library.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward));
    library.impl("flash_deform_attn", TORCH_BOX(&flash_deform_attn));
    library.impl("flash_deform_attn_backward", TORCH_BOX(&flash_deform_attn_backward));
  }
};

using CudaOperators =
    Operators<dcnv4_cuda, dcnv4_backward_cuda, ms_deform_attn_cuda, ms_deform_attn_backward_cuda>;
using CpuOperators =
    Operators<dcnv4_cpu, dcnv4_backward_cpu, ms_deform_attn_cpu, ms_deform_attn_backward_cpu>;

}  // namespace ops_dcnv4
