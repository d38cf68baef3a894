// The emulator has a single device and stream, and reports errors as exceptions.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <stdexcept>

#include "model.h"

#define STD_CUDA_CHECK(expression) static_cast<void>(expression)

#undef CUDA_KERNEL_ASSERT_MSG
#define CUDA_KERNEL_ASSERT_MSG(condition, message) \
  if (!(condition)) throw std::runtime_error(message)

namespace ops_dcnv4 {

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

inline cudaStream_t current_stream() { return nullptr; }

using cuda_model::shared_memory;

}  // namespace ops_dcnv4
