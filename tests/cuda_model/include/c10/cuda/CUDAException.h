// The emulator reports errors as exceptions.
#pragma once

#include <c10/macros/Macros.h>

#include <stdexcept>

#define C10_CUDA_CHECK(expression) static_cast<void>(expression)

#undef CUDA_KERNEL_ASSERT_MSG
#define CUDA_KERNEL_ASSERT_MSG(condition, message) \
  if (!(condition)) throw std::runtime_error(message)
