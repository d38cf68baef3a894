// Tensors of PyTorch's stable ABI and what the operators do with them. The libraries use nothing
// else of PyTorch, so that other versions than the one they were compiled against can load them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <sstream>
#include <stdexcept>
#include <vector>

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
#define OPS_DCNV4_CHECK(condition, ...) \
  if (!(condition)) ::ops_dcnv4::refuse(__VA_ARGS__)

// Returns a contiguous tensor on the device of `like`.
inline Tensor empty_tensor(IntArrayRef shape, const Tensor& like, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * (shape[i] > 0 ? shape[i] : 1);
  }
  using torch::stable::detail::from, torch::stable::detail::to;
  const auto device = like.device();
  AtenTensorHandle result;
  const auto failed = aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(), to<int32_t>(from(dtype)),
      to<int32_t>(from(device.type())), device.index(), &result);
  if (failed) {
    refuse<std::runtime_error>("out of memory. Tried to allocate a tensor of ", dtype,
                               " and shape ", shape, " on ", device);
  }
  return Tensor(result);
}
inline Tensor empty_tensor(IntArrayRef shape, const Tensor& like) {
  return empty_tensor(shape, like, like.scalar_type());
}

inline Tensor zero_tensor(IntArrayRef shape, const Tensor& like, ScalarType dtype) {
  const Tensor result = empty_tensor(shape, like, dtype);
  TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(result.get()));
  return result;
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
