// The compiled kernels behind the operators, with one signature on every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace ops_dcnv4 {

// value (N, H, W, C), offset_mask (N, H_out, W_out, >= 3*groups*taps) -> (N, H_out, W_out, C)
using Forward = at::Tensor(const at::Tensor& value, const at::Tensor& offset_mask,
                           at::IntArrayRef kernel_size, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                           double offset_scale, bool remove_center);

// grad_output (N, H_out, W_out, C) -> gradients of value and offset_mask
using Backward = std::tuple<at::Tensor, at::Tensor>(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& offset_mask,
    at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, double offset_scale, bool remove_center);

Forward dcnv4_cpu, dcnv4_cuda;
Backward dcnv4_backward_cpu, dcnv4_backward_cuda;

}  // namespace ops_dcnv4
