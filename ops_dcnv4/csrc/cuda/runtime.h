// CUDA and stable-ABI declarations for host code. The tests' emulator of CUDA replaces this header.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/macros/Macros.h>

namespace ops_dcnv4 {

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream() {
  void* stream;
  const auto device = torch::stable::accelerator::getCurrentDeviceIndex();
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Returns the block's dynamic shared memory, which is aligned to 16 bytes.
__device__ __forceinline__ void* shared_memory() {
  extern __shared__ uint4 shared_words[];
  return shared_words;
}

}  // namespace ops_dcnv4
