// Gradients and autocast of the operators. ops.py has the same in Python for installations without
// this library; here a call costs the tenth of it.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "dcnv4.h"

namespace ops_dcnv4 {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The operators, through the dispatcher, that is on any device.
const c10::TypedOperatorHandle<Forward>& dcnv4_operator() {
  static const auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow("ops_dcnv4::dcnv4", "").typed<Forward>();
  return handle;
}

const c10::TypedOperatorHandle<Backward>& dcnv4_backward_operator() {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("ops_dcnv4::dcnv4_backward", "")
                                 .typed<Backward>();
  return handle;
}

struct Dcnv4 : torch::autograd::Function<Dcnv4> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& value,
                            const at::Tensor& offset_mask, at::IntArrayRef kernel_size,
                            at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, int64_t groups, double offset_scale,
                            bool remove_center) {
    context->save_for_backward({value, offset_mask});
    context->saved_data["kernel_size"] = kernel_size;
    context->saved_data["stride"] = stride;
    context->saved_data["padding"] = padding;
    context->saved_data["dilation"] = dilation;
    context->saved_data["groups"] = groups;
    context->saved_data["offset_scale"] = offset_scale;
    context->saved_data["remove_center"] = remove_center;
    const at::AutoDispatchBelowADInplaceOrView guard;
    return dcnv4_operator().call(value, offset_mask, kernel_size, stride, padding, dilation, groups,
                                 offset_scale, remove_center);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    const variable_list saved = context->get_saved_variables();
    auto& data = context->saved_data;
    auto [grad_value, grad_offset_mask] = dcnv4_backward_operator().call(
        grad_outputs[0], saved[0], saved[1], data["kernel_size"].toIntVector(),
        data["stride"].toIntVector(), data["padding"].toIntVector(),
        data["dilation"].toIntVector(), data["groups"].toInt(), data["offset_scale"].toDouble(),
        data["remove_center"].toBool());
    variable_list grads(9);  // undefined for the parameters
    grads[0] = grad_value;
    grads[1] = grad_offset_mask;
    return grads;
  }
};

struct Dcnv4Backward : torch::autograd::Function<Dcnv4Backward> {
  static variable_list forward(AutogradContext*, const at::Tensor& grad_output,
                               const at::Tensor& value, const at::Tensor& offset_mask,
                               at::IntArrayRef kernel_size, at::IntArrayRef stride,
                               at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                               double offset_scale, bool remove_center) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [grad_value, grad_offset_mask] = dcnv4_backward_operator().call(
        grad_output, value, offset_mask, kernel_size, stride, padding, dilation, groups,
        offset_scale, remove_center);
    return {grad_value, grad_offset_mask};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "dcnv4 has no second derivative: call backward or autograd.grad without "
                "create_graph=True");
  }
};

at::Tensor dcnv4_autograd(const at::Tensor& value, const at::Tensor& offset_mask,
                          at::IntArrayRef kernel_size, at::IntArrayRef stride,
                          at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                          double offset_scale, bool remove_center) {
  return Dcnv4::apply(value, offset_mask, kernel_size, stride, padding, dilation, groups,
                      offset_scale, remove_center);
}

std::tuple<at::Tensor, at::Tensor> dcnv4_backward_autograd(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& offset_mask,
    at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, double offset_scale, bool remove_center) {
  const variable_list grads =
      Dcnv4Backward::apply(grad_output, value, offset_mask, kernel_size, stride, padding, dilation,
                           groups, offset_scale, remove_center);
  return {grads[0], grads[1]};
}

// Brings both tensors to the dtype of the surrounding linear layers; float64 stays as it is.
template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor dcnv4_autocast(const at::Tensor& value, const at::Tensor& offset_mask,
                          at::IntArrayRef kernel_size, at::IntArrayRef stride,
                          at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                          double offset_scale, bool remove_center) {
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  return dcnv4_operator().call(at::autocast::cached_cast(dtype, value, device),
                               at::autocast::cached_cast(dtype, offset_mask, device), kernel_size,
                               stride, padding, dilation, groups, offset_scale, remove_center);
}

}  // namespace
}  // namespace ops_dcnv4

TORCH_LIBRARY_IMPL(ops_dcnv4, Autograd, m) {
  m.impl("dcnv4", ops_dcnv4::dcnv4_autograd);
  m.impl("dcnv4_backward", ops_dcnv4::dcnv4_backward_autograd);
}

TORCH_LIBRARY_IMPL(ops_dcnv4, AutocastCPU, m) {
  m.impl("dcnv4", ops_dcnv4::dcnv4_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(ops_dcnv4, AutocastCUDA, m) {
  m.impl("dcnv4", ops_dcnv4::dcnv4_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}
