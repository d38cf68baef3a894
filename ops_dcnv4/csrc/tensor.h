// Tensors of PyTorch's stable ABI and what the operators do with them. The libraries use nothing
// else of PyTorch, so that one build works with every PyTorch from TORCH_TARGET_VERSION on.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <sstream>
#include <stdexcept>

namespace ops_dcnv4 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using IntArrayRef = torch::headeronly::IntHeaderOnlyArrayRef;

// Writes a part of an error message.
template <typename T>
void write(std::ostream& out, const T& part) {
  out << part;
}
inline void write(std::ostream& out, IntArrayRef numbers) {
  out << '[';
  for (size_t i = 0; i < numbers.size(); ++i) out << (i > 0 ? ", " : "") << numbers[i];
  out << ']';
}
inline void write(std::ostream& out, const torch::stable::Device& device) {
  const bool is_meta = device.type() == torch::headeronly::DeviceType::Meta;
  out << (device.is_cuda() ? "cuda" : device.is_cpu() ? "cpu" : is_meta ? "meta" : "other device");
  if (device.is_cuda()) out << ':' << device.index();
}

// Throws an exception, by default one that Python receives as a ValueError.
template <typename Exception = std::invalid_argument, typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (write(message, parts), ...);
  throw Exception(message.str());
}

// The parts of the message are only evaluated if the condition does not hold.
#define OPS_DCNV4_CHECK(condition, ...) ((condition) ? void() : ::ops_dcnv4::refuse(__VA_ARGS__))

// Return a contiguous tensor on the device of `like`, with its dtype by default.
template <typename Allocate>
Tensor new_tensor(Allocate allocate, IntArrayRef shape, const Tensor& like, ScalarType dtype) {
  auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle result;
  const auto failed = allocate(like.get(), shape.data(), static_cast<int64_t>(shape.size()), &code,
                               nullptr, nullptr, 0, nullptr, &result);
  if (failed) {
    // The reason is lost; too little memory is the usual one.
    refuse<std::runtime_error>("failed to allocate a tensor of ", dtype, " and shape ", shape,
                               " on ", like.device(), ", which may be out of memory");
  }
  return Tensor(result);
}
inline Tensor empty_tensor(IntArrayRef shape, const Tensor& like, ScalarType dtype) {
  return new_tensor(aoti_torch_aten_new_empty, shape, like, dtype);
}
inline Tensor empty_tensor(IntArrayRef shape, const Tensor& like) {
  return empty_tensor(shape, like, like.scalar_type());
}
inline Tensor zero_tensor(IntArrayRef shape, const Tensor& like, ScalarType dtype) {
  return new_tensor(aoti_torch_aten_new_zeros, shape, like, dtype);
}
inline Tensor zero_tensor(IntArrayRef shape, const Tensor& like) {
  return zero_tensor(shape, like, like.scalar_type());
}

inline Tensor cast(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// Calls an operator of PyTorch that returns a tensor.
template <typename... Arguments>
Tensor call_operator(const char* name, const Arguments&... arguments) {
  StableIValue stack[] = {torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace ops_dcnv4
