#include <ATen/Parallel.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "attention.h"
#include "checks.h"
#include "cpu/ms_deform_attn_inputs.h"
#include "cpu/workers.h"
#include "dispatch.h"
#include "operators.h"

namespace ops_dcnv4 {
namespace {

struct Gradients {
  at::Tensor value, locations, weights;
};

Gradients backward(const Attention& a, const Inputs& in, const at::Tensor& grad_output) {
  check_grad_output(a.output_shape(), grad_output, in.value);
  if (in.is_empty()) {
    return {at::zeros(in.value.sizes(), in.value.options()),
            at::zeros(in.locations.sizes(), in.locations.options()),
            at::zeros(in.weights.sizes(), in.weights.options())};
  }
  const at::Tensor grad = dense(grad_output);
  const Gradients grads{at::empty(in.value.sizes(), in.value.options()),
                        at::empty(in.locations.sizes(), in.locations.options()),
                        at::empty(in.weights.sizes(), in.weights.options())};
  dispatch(in.value.scalar_type(), [&](auto scalar, auto acc) {
    using scalar_t = decltype(scalar);
    using acc_t = decltype(acc);
    auto tensors = in.tensors<scalar_t>();
    tensors.grad_output = grad.const_data_ptr<scalar_t>();
    tensors.grad_value = grads.value.data_ptr<scalar_t>();
    tensors.grad_locations = grads.locations.data_ptr<acc_t>();
    tensors.grad_weights = grads.weights.data_ptr<acc_t>();
    at::parallel_for(0, a.batch * a.heads, 1, [&](int64_t begin, int64_t end) {
      const ScratchMemory<acc_t> memory(a.taps(), int64_t(a.pixels) * a.head_channels);
      instruction_set().kernels(scalar).ms_deform_attn_backward(a, tensors, memory.scratch, begin,
                                                                end);
    });
  });
  return grads;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& spatial_shapes,
    const at::Tensor& level_start_index, const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights) {
  const Attention a = make_attention(value, spatial_shapes, level_start_index, sampling_locations,
                                     attention_weights);
  const Gradients grads = backward(
      a, Inputs(a, value, spatial_shapes, level_start_index, sampling_locations, attention_weights),
      grad_output);
  const at::ScalarType dtype = sampling_locations.scalar_type();
  return {grads.value, grads.locations.to(dtype), grads.weights.to(dtype)};
}

std::tuple<at::Tensor, at::Tensor> flash_deform_attn_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& spatial_shapes,
    const at::Tensor& level_start_index, const at::Tensor& sampling_loc_attn, int64_t n_points) {
  const Attention a =
      make_fused_attention(value, spatial_shapes, level_start_index, sampling_loc_attn, n_points);
  const Inputs in(a, value, spatial_shapes, level_start_index, sampling_loc_attn, {});
  const Gradients grads = backward(a, in, grad_output);
  const at::Tensor grad_logits =
      at::_softmax_backward_data(grads.weights, in.weights, -1, in.weights.scalar_type());
  grads.locations.slice(3, a.first_weight()).copy_(grad_logits);
  return {grads.value, grads.locations.to(sampling_loc_attn.scalar_type())};
}

}  // namespace ops_dcnv4
