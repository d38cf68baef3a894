// Declarations of the compiled operators, which have the same signature on every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace ops_dcnv4 {

// The window parameters of DCNv4; pairs are (y, x).
struct Window {
  at::IntArrayRef kernel_size, stride, padding, dilation;
  int64_t groups;
  double offset_scale;
  bool remove_center;
};

// value (N, H, W, C), offset_mask (N, H_out, W_out, >= 3*groups*taps) -> (N, H_out, W_out, C)
using Dcnv4Kernel = at::Tensor(const Window& window, const at::Tensor& value,
                               const at::Tensor& offset_mask);

// grad_output (N, H_out, W_out, C) -> gradients of value and offset_mask
using Dcnv4BackwardKernel = std::tuple<at::Tensor, at::Tensor>(const Window& window,
                                                               const at::Tensor& grad_output,
                                                               const at::Tensor& value,
                                                               const at::Tensor& offset_mask);

Dcnv4Kernel dcnv4_cpu, dcnv4_cuda;
Dcnv4BackwardKernel dcnv4_backward_cpu, dcnv4_backward_cuda;

// Calls a kernel with the arguments of the operator's schema, where the window is not a struct.
template <auto kernel>
struct Schema;

template <typename Result, typename... Tensors, Result (*kernel)(const Window&, Tensors...)>
struct Schema<kernel> {
  static Result call(Tensors... tensors, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                     at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                     double offset_scale, bool remove_center) {
    return kernel({kernel_size, stride, padding, dilation, groups, offset_scale, remove_center},
                  tensors...);
  }
};

using Dcnv4 = decltype(Schema<dcnv4_cpu>::call);
using Dcnv4Backward = decltype(Schema<dcnv4_backward_cpu>::call);

// value (N, S, M, D), spatial_shapes (L, 2), level_start_index (L,),
// sampling_locations (N, Lq, M, L, K, 2), attention_weights (N, Lq, M, L, K) -> (N, Lq, M*D)
using MsDeformAttn = at::Tensor(const at::Tensor& value, const at::Tensor& spatial_shapes,
                                const at::Tensor& level_start_index,
                                const at::Tensor& sampling_locations,
                                const at::Tensor& attention_weights);

// grad_output (N, Lq, M*D) -> gradients of value, sampling_locations and attention_weights
using MsDeformAttnBackward = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& spatial_shapes,
    const at::Tensor& level_start_index, const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights);

// Fused form, with locations and logits in one tensor: sampling_loc_attn (N, Lq, M, 3*L*K)
using FlashDeformAttn = at::Tensor(const at::Tensor& value, const at::Tensor& spatial_shapes,
                                   const at::Tensor& level_start_index,
                                   const at::Tensor& sampling_loc_attn, int64_t n_points);

// grad_output (N, Lq, M*D) -> gradients of value and sampling_loc_attn
using FlashDeformAttnBackward = std::tuple<at::Tensor, at::Tensor>(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& spatial_shapes,
    const at::Tensor& level_start_index, const at::Tensor& sampling_loc_attn, int64_t n_points);

MsDeformAttn ms_deform_attn_cpu, ms_deform_attn_cuda;
MsDeformAttnBackward ms_deform_attn_backward_cpu, ms_deform_attn_backward_cuda;
FlashDeformAttn flash_deform_attn_cpu, flash_deform_attn_cuda;
FlashDeformAttnBackward flash_deform_attn_backward_cpu, flash_deform_attn_backward_cuda;

}  // namespace ops_dcnv4
