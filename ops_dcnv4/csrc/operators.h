// Declarations of the compiled operators, which have the same signature on every device.
#pragma once

#include <tuple>

#include "tensor.h"

namespace ops_dcnv4 {

// The window parameters of DCNv4; pairs are (y, x).
struct Window {
  IntArrayRef kernel_size, stride, padding, dilation;
  int64_t groups;
  double offset_scale;
  bool remove_center;
};

// value (N, H, W, C), offset_mask (N, H_out, W_out, >= 3*groups*taps) -> (N, H_out, W_out, C)
using Dcnv4Kernel = Tensor(const Window& window, const Tensor& value, const Tensor& offset_mask);

// grad_output (N, H_out, W_out, C) -> gradients of value and offset_mask
using Dcnv4BackwardKernel = std::tuple<Tensor, Tensor>(const Window& window,
                                                       const Tensor& grad_output,
                                                       const Tensor& value,
                                                       const Tensor& offset_mask,
                                                       bool deterministic);

Dcnv4Kernel dcnv4_cpu, dcnv4_cuda;
Dcnv4BackwardKernel dcnv4_backward_cpu, dcnv4_backward_cuda;

// The tensors of an attention call: value (N, S, M, D), spatial_shapes (L, 2), level_start_index
// (L,), locations (N, Lq, M, L, K, 2) and weights (N, Lq, M, L, K). In the fused form, locations
// and logits are one tensor (N, Lq, M, 3*L*K), passed as both.
struct AttentionInputs {
  const Tensor &value, &spatial_shapes, &level_start_index, &locations, &weights;
  bool fused = false;
  int64_t n_points = 0;  // only in the fused form
};

struct AttentionGradients {
  Tensor value, locations, weights;  // in the fused form, locations include the logits
};

// Output and grad_output are (N, Lq, M*D).
using AttentionKernel = Tensor(const AttentionInputs& inputs);
using AttentionBackwardKernel = AttentionGradients(const AttentionInputs& inputs,
                                                   const Tensor& grad_output, bool deterministic);

AttentionKernel ms_deform_attn_cpu, ms_deform_attn_cuda;
AttentionBackwardKernel ms_deform_attn_backward_cpu, ms_deform_attn_backward_cuda;

}  // namespace ops_dcnv4
