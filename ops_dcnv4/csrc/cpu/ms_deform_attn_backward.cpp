#include "attention.h"
#include "checks.h"
#include "cpu/ms_deform_attn_inputs.h"
#include "cpu/workers.h"
#include "dispatch.h"
#include "operators.h"

namespace ops_dcnv4 {

AttentionGradients ms_deform_attn_backward_cpu(const AttentionInputs& inputs,
                                               const Tensor& grad_output, bool) {
  const Attention a = make_attention(inputs);
  const DenseInputs in(a, inputs);
  check_grad_output(a.output_shape(), grad_output, in.value);
  const Tensor grad = dense(grad_output);
  const auto make = [&](const Tensor& like) {
    return in.is_empty() ? zero_tensor(like.sizes(), like) : empty_tensor(like.sizes(), like);
  };
  const AttentionGradients grads{make(in.value), make(in.locations), make(in.weights)};
  if (!in.is_empty())
    dispatch(in.value.scalar_type(), [&](auto scalar, auto acc) {
      using scalar_t = decltype(scalar);
      using acc_t = decltype(acc);
      auto tensors = in.tensors<scalar_t>();
      tensors.grad_output = grad.const_data_ptr<scalar_t>();
      tensors.grad_value = grads.value.mutable_data_ptr<scalar_t>();
      tensors.grad_locations = grads.locations.mutable_data_ptr<acc_t>();
      tensors.grad_weights = grads.weights.mutable_data_ptr<acc_t>();
      const auto& kernels = instruction_set().kernels(scalar);
      torch::stable::parallel_for(0, a.batch * a.heads, 1, [&](int64_t begin, int64_t end) {
        const ScratchMemory<acc_t> memory(a.taps(), int64_t(a.pixels) * a.head_channels);
        kernels.ms_deform_attn_backward(a, tensors, memory.scratch, begin, end);
      });
    });
  const ScalarType dtype = inputs.locations.scalar_type();
  if (!a.fused) return {grads.value, cast(grads.locations, dtype), cast(grads.weights, dtype)};
  Tensor packed = grads.locations;
  Tensor grad_logits = torch::stable::narrow(packed, 3, a.first_weight(), a.taps());
  torch::stable::copy_(grad_logits, call_operator("aten::_softmax_backward_data", grads.weights,
                                                  in.weights, int64_t(-1), in.dtype));
  packed = cast(packed, dtype);
  return {grads.value, packed, packed};
}

}  // namespace ops_dcnv4
