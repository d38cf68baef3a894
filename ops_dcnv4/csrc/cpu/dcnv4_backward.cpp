#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "checks.h"
#include "cpu/workers.h"
#include "dispatch.h"
#include "geometry.h"
#include "operators.h"

namespace ops_dcnv4 {

std::tuple<at::Tensor, at::Tensor> dcnv4_backward_cpu(const Window& window,
                                                      const at::Tensor& grad_output,
                                                      const at::Tensor& value,
                                                      const at::Tensor& offset_mask) {
  const Geometry g = make_geometry(window, value, offset_mask);
  check_grad_output(g.output_shape(), grad_output, value);
  if (value.numel() == 0 || offset_mask.numel() == 0) {
    return {at::zeros(value.sizes(), value.options()),
            at::zeros(offset_mask.sizes(), offset_mask.options())};
  }
  const at::Tensor go = dense(grad_output), v = dense(value), o = dense(offset_mask);
  const at::Tensor grad_value = at::empty(v.sizes(), v.options());
  const at::Tensor grad_offset_mask = at::empty(o.sizes(), o.options());
  const int64_t slice_numbers = int64_t(g.height) * g.width * g.group_channels;
  dispatch(v.scalar_type(), [&](auto scalar, auto acc) {
    using scalar_t = decltype(scalar);
    using acc_t = decltype(acc);
    Dcnv4Tensors<scalar_t> tensors{v.const_data_ptr<scalar_t>(), o.const_data_ptr<scalar_t>()};
    tensors.grad_output = go.const_data_ptr<scalar_t>();
    tensors.grad_value = grad_value.data_ptr<scalar_t>();
    tensors.grad_offset_mask = grad_offset_mask.data_ptr<scalar_t>();
    at::parallel_for(0, g.batch * g.groups, 1, [&](int64_t begin, int64_t end) {
      const ScratchMemory<acc_t> memory(g.taps(), slice_numbers);
      instruction_set().kernels(scalar).dcnv4_backward(g, tensors, memory.scratch, begin, end);
    });
  });
  return {grad_value, grad_offset_mask};
}

}  // namespace ops_dcnv4
