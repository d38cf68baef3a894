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

AttentionGradients ms_deform_attn_backward_cpu(const AttentionInputs& inputs,
                                               const at::Tensor& grad_output) {
  const Attention a = make_attention(inputs);
  const DenseInputs in(a, inputs);
  check_grad_output(a.output_shape(), grad_output, in.value);
  const at::Tensor grad = dense(grad_output);
  const auto make = [&](const at::Tensor& like) {
    return in.is_empty() ? at::zeros(like.sizes(), like.options())
                         : at::empty(like.sizes(), like.options());
  };
  const AttentionGradients grads{make(in.value), make(in.locations), make(in.weights)};
  if (!in.is_empty())
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
  const at::ScalarType dtype = inputs.locations.scalar_type();
  if (!a.fused) return {grads.value, grads.locations.to(dtype), grads.weights.to(dtype)};
  const at::Tensor grad_logits =
      at::_softmax_backward_data(grads.weights, in.weights, -1, in.weights.scalar_type());
  grads.locations.slice(3, a.first_weight()).copy_(grad_logits);
  return {grads.value, grads.locations.to(dtype), {}};
}

}  // namespace ops_dcnv4
