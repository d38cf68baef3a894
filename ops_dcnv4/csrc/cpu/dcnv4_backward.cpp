#include "checks.h"
#include "cpu/workers.h"
#include "dispatch.h"
#include "geometry.h"
#include "operators.h"

namespace ops_dcnv4 {

std::tuple<Tensor, Tensor> dcnv4_backward_cpu(const Window& window, const Tensor& grad_output,
                                              const Tensor& value, const Tensor& offset_mask,
                                              bool) {
  const Geometry g = make_geometry(window, value, offset_mask);
  check_grad_output(g.output_shape(), grad_output, value);
  if (value.numel() == 0 || offset_mask.numel() == 0) {
    return {zero_tensor(value.sizes(), value), zero_tensor(offset_mask.sizes(), offset_mask)};
  }
  const Tensor go = dense(grad_output), v = dense(value), o = dense(offset_mask);
  const Tensor grad_value = empty_tensor(v.sizes(), v);
  const Tensor grad_offset_mask = empty_tensor(o.sizes(), o);
  const int64_t slice_numbers = int64_t(g.height) * g.width * g.group_channels;
  dispatch(v.scalar_type(), [&](auto scalar, auto acc) {
    using scalar_t = decltype(scalar);
    using acc_t = decltype(acc);
    Dcnv4Tensors<scalar_t> tensors{v.const_data_ptr<scalar_t>(), o.const_data_ptr<scalar_t>()};
    tensors.grad_output = go.const_data_ptr<scalar_t>();
    tensors.grad_value = grad_value.mutable_data_ptr<scalar_t>();
    tensors.grad_offset_mask = grad_offset_mask.mutable_data_ptr<scalar_t>();
    const auto& kernels = instruction_set().kernels(scalar);
    torch::stable::parallel_for(0, g.batch * g.groups, 1, [&](int64_t begin, int64_t end) {
      const ScratchMemory<acc_t> memory(g.taps(), slice_numbers);
      kernels.dcnv4_backward(g, tensors, memory.scratch, begin, end);
    });
  });
  return {grad_value, grad_offset_mask};
}

}  // namespace ops_dcnv4
