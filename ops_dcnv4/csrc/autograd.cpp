// Autograd and autocast of the operators. backends.py implements the same in Python for
// installations without this library; in C++, a call costs a tenth.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#include "operators.h"

namespace ops_dcnv4 {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Looks up an operator in the dispatcher, which selects the kernel for the device.
template <typename Signature>
auto find(const char* name, const char* suffix = "") {
  const std::string full = std::string("ops_dcnv4::") + name + suffix;
  return c10::Dispatcher::singleton().findSchemaOrThrow(full.c_str(), "").typed<Signature>();
}

template <typename Function>
const auto& operator_of() {
  static const auto handle = find<typename Function::Signature>(Function::name);
  return handle;
}

template <typename Function>
const auto& backward_of() {
  static const auto handle =
      find<typename Function::BackwardSignature>(Function::name, "_backward");
  return handle;
}

// Calls an operator below the autograd dispatch keys.
template <typename Operator, typename... Arguments>
auto call_kernel(const Operator& handle, const Arguments&... arguments) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return handle.call(arguments...);
}

// The autograd functions, one per operator.
struct Dcnv4Function : torch::autograd::Function<Dcnv4Function> {
  using Signature = Dcnv4;
  using BackwardSignature = Dcnv4Backward;
  static constexpr const char* name = "dcnv4";

  static at::Tensor forward(AutogradContext* context, const at::Tensor& value,
                            const at::Tensor& offset_mask, at::IntArrayRef kernel_size,
                            at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, int64_t groups, double offset_scale,
                            bool remove_center) {
    context->save_for_backward({value, offset_mask});
    auto& data = context->saved_data;
    data["kernel_size"] = kernel_size;
    data["stride"] = stride;
    data["padding"] = padding;
    data["dilation"] = dilation;
    data["groups"] = groups;
    data["offset_scale"] = offset_scale;
    data["remove_center"] = remove_center;
    return call_kernel(operator_of<Dcnv4Function>(), value, offset_mask, kernel_size, stride,
                       padding, dilation, groups, offset_scale, remove_center);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    const variable_list saved = context->get_saved_variables();
    auto& data = context->saved_data;
    auto [grad_value, grad_offset_mask] = backward_of<Dcnv4Function>().call(
        grad_outputs[0], saved[0], saved[1], data["kernel_size"].toIntVector(),
        data["stride"].toIntVector(), data["padding"].toIntVector(), data["dilation"].toIntVector(),
        data["groups"].toInt(), data["offset_scale"].toDouble(), data["remove_center"].toBool());
    variable_list grads(9);  // undefined for all arguments that are not tensors
    grads[0] = grad_value;
    grads[1] = grad_offset_mask;
    return grads;
  }
};

struct MsDeformAttnFunction : torch::autograd::Function<MsDeformAttnFunction> {
  using Signature = MsDeformAttn;
  using BackwardSignature = MsDeformAttnBackward;
  static constexpr const char* name = "ms_deform_attn";

  static at::Tensor forward(AutogradContext* context, const at::Tensor& value,
                            const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
                            const at::Tensor& sampling_locations,
                            const at::Tensor& attention_weights) {
    context->save_for_backward(
        {value, spatial_shapes, level_start_index, sampling_locations, attention_weights});
    return call_kernel(operator_of<MsDeformAttnFunction>(), value, spatial_shapes,
                       level_start_index, sampling_locations, attention_weights);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    const variable_list saved = context->get_saved_variables();
    auto [grad_value, grad_locations, grad_weights] = backward_of<MsDeformAttnFunction>().call(
        grad_outputs[0], saved[0], saved[1], saved[2], saved[3], saved[4]);
    return {grad_value, at::Tensor(), at::Tensor(), grad_locations, grad_weights};
  }
};

struct FlashDeformAttnFunction : torch::autograd::Function<FlashDeformAttnFunction> {
  using Signature = FlashDeformAttn;
  using BackwardSignature = FlashDeformAttnBackward;
  static constexpr const char* name = "flash_deform_attn";

  static at::Tensor forward(AutogradContext* context, const at::Tensor& value,
                            const at::Tensor& spatial_shapes, const at::Tensor& level_start_index,
                            const at::Tensor& sampling_loc_attn, int64_t n_points) {
    context->save_for_backward({value, spatial_shapes, level_start_index, sampling_loc_attn});
    context->saved_data["n_points"] = n_points;
    return call_kernel(operator_of<FlashDeformAttnFunction>(), value, spatial_shapes,
                       level_start_index, sampling_loc_attn, n_points);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    const variable_list saved = context->get_saved_variables();
    auto [grad_value, grad_loc_attn] = backward_of<FlashDeformAttnFunction>().call(
        grad_outputs[0], saved[0], saved[1], saved[2], saved[3],
        context->saved_data["n_points"].toInt());
    return {grad_value, at::Tensor(), at::Tensor(), grad_loc_attn, at::Tensor()};
  }
};

// Calls a backward operator; its result cannot be differentiated again.
template <typename Function>
struct Once : torch::autograd::Function<Once<Function>> {
  template <typename... Arguments>
  static variable_list forward(AutogradContext*, const Arguments&... arguments) {
    return std::apply([](const auto&... grads) { return variable_list{grads...}; },
                      call_kernel(backward_of<Function>(), arguments...));
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, Function::name,
                " has no second derivative: call backward or autograd.grad without "
                "create_graph=True");
  }
};

// Casts tensors to the autocast dtype; float64 is left unchanged.
template <c10::DeviceType device>
struct Cast {
  at::ScalarType dtype = at::autocast::get_autocast_dtype(device);

  at::Tensor operator()(const at::Tensor& tensor) const {
    return at::autocast::cached_cast(dtype, tensor, device);
  }

  // Locations are never rounded to 16 bits, which would shift them by fractions of a pixel.
  at::Tensor points(const at::Tensor& tensor) const {
    if (tensor.scalar_type() == dtype) return tensor;
    return at::autocast::cached_cast(at::kFloat, tensor, device);
  }
};

// The functions that are registered with the dispatcher; they have the operators' signatures.
template <typename Function, typename Signature = typename Function::Signature>
struct Forward;

template <typename Function, typename... Arguments>
struct Forward<Function, at::Tensor(Arguments...)> {
  static at::Tensor autograd(Arguments... arguments) { return Function::apply(arguments...); }

  // cast_all(cast, arguments...) returns the cast arguments as a tuple.
  template <c10::DeviceType device, c10::DispatchKey key>
  static at::Tensor autocast(Arguments... arguments) {
    const c10::impl::ExcludeDispatchKeyGuard guard(key);
    return std::apply([](const auto&... cast) { return operator_of<Function>().call(cast...); },
                      cast_all(Cast<device>(), arguments...));
  }

 private:
  template <typename Cast, typename... Parameters>
  static auto cast_all(const Cast& cast, const at::Tensor& value, const at::Tensor& offset_mask,
                       const Parameters&... parameters) {
    return std::make_tuple(cast(value), cast(offset_mask), parameters...);
  }
  template <typename Cast>
  static auto cast_all(const Cast& cast, const at::Tensor& value, const at::Tensor& shapes,
                       const at::Tensor& start, const at::Tensor& locations,
                       const at::Tensor& weights) {
    return std::make_tuple(cast(value), shapes, start, cast.points(locations),
                           cast.points(weights));
  }
  template <typename Cast>
  static auto cast_all(const Cast& cast, const at::Tensor& value, const at::Tensor& shapes,
                       const at::Tensor& start, const at::Tensor& packed, int64_t n_points) {
    return std::make_tuple(cast(value), shapes, start, cast.points(packed), n_points);
  }
};

template <typename Function, typename Signature = typename Function::BackwardSignature>
struct Backward;

template <typename Function, typename... Grads, typename... Arguments>
struct Backward<Function, std::tuple<Grads...>(Arguments...)> {
  static std::tuple<Grads...> autograd(Arguments... arguments) {
    return as_tuple(Once<Function>::apply(arguments...), std::index_sequence_for<Grads...>());
  }

 private:
  template <size_t... i>
  static std::tuple<Grads...> as_tuple(const variable_list& grads, std::index_sequence<i...>) {
    return {grads[i]...};
  }
};

template <typename Function>
void register_autograd(torch::Library& m) {
  m.impl(Function::name, Forward<Function>::autograd);
  m.impl((std::string(Function::name) + "_backward").c_str(), Backward<Function>::autograd);
}

template <c10::DeviceType device, c10::DispatchKey key>
void register_autocast(torch::Library& m) {
  m.impl(Dcnv4Function::name, Forward<Dcnv4Function>::autocast<device, key>);
  m.impl(MsDeformAttnFunction::name, Forward<MsDeformAttnFunction>::autocast<device, key>);
  m.impl(FlashDeformAttnFunction::name, Forward<FlashDeformAttnFunction>::autocast<device, key>);
}

}  // namespace
}  // namespace ops_dcnv4

TORCH_LIBRARY_IMPL(ops_dcnv4, Autograd, m) {
  ops_dcnv4::register_autograd<ops_dcnv4::Dcnv4Function>(m);
  ops_dcnv4::register_autograd<ops_dcnv4::MsDeformAttnFunction>(m);
  ops_dcnv4::register_autograd<ops_dcnv4::FlashDeformAttnFunction>(m);
}

TORCH_LIBRARY_IMPL(ops_dcnv4, AutocastCPU, m) {
  ops_dcnv4::register_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>(m);
}

TORCH_LIBRARY_IMPL(ops_dcnv4, AutocastCUDA, m) {
  ops_dcnv4::register_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>(m);
}
