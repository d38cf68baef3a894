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

// The tensors of an attention call. In the fused form, locations and logits are one tensor, which
// stands for both.
struct AttentionInputs {
  const at::Tensor &value, &spatial_shapes, &level_start_index, &locations, &weights;
  bool fused;
  int64_t n_points;  // only in the fused form
};

struct AttentionGradients {
  at::Tensor value, locations, weights;  // in the fused form, locations include the logits
};

using AttentionKernel = at::Tensor(const AttentionInputs& inputs);
using AttentionBackwardKernel = AttentionGradients(const AttentionInputs& inputs,
                                                   const at::Tensor& grad_output);

AttentionKernel ms_deform_attn_cpu, ms_deform_attn_cuda;
AttentionBackwardKernel ms_deform_attn_backward_cpu, ms_deform_attn_backward_cuda;

// The arguments of the attention operators' schemas:
// value (N, S, M, D), spatial_shapes (L, 2), level_start_index (L,),
// sampling_locations (N, Lq, M, L, K, 2), attention_weights (N, Lq, M, L, K) or, in the fused form,
// sampling_loc_attn (N, Lq, M, 3*L*K); output and grad_output (N, Lq, M*D)
template <AttentionKernel& kernel>
at::Tensor ms_deform_attn(const at::Tensor& value, const at::Tensor& shapes,
                          const at::Tensor& starts, const at::Tensor& locations,
                          const at::Tensor& weights) {
  return kernel({value, shapes, starts, locations, weights, false, 0});
}

template <AttentionBackwardKernel& kernel>
std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& shapes,
    const at::Tensor& starts, const at::Tensor& locations, const at::Tensor& weights) {
  const auto grads = kernel({value, shapes, starts, locations, weights, false, 0}, grad_output);
  return {grads.value, grads.locations, grads.weights};
}

template <AttentionKernel& kernel>
at::Tensor flash_deform_attn(const at::Tensor& value, const at::Tensor& shapes,
                             const at::Tensor& starts, const at::Tensor& packed, int64_t n_points) {
  return kernel({value, shapes, starts, packed, packed, true, n_points});
}

template <AttentionBackwardKernel& kernel>
std::tuple<at::Tensor, at::Tensor> flash_deform_attn_backward(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& shapes,
    const at::Tensor& starts, const at::Tensor& packed, int64_t n_points) {
  const auto grads = kernel({value, shapes, starts, packed, packed, true, n_points}, grad_output);
  return {grads.value, grads.locations};
}

}  // namespace ops_dcnv4
