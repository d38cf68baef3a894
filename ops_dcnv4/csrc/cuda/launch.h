// Launching of kernels, and conversions between types of the same size.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstring>

#include "cuda/runtime.h"

namespace ops_dcnv4 {

constexpr int warp_size = 32;

// The size of a launch: blocks, threads per block, and bytes of shared memory per block.
struct LaunchSize {
  dim3 grid, block;
  std::size_t shared_bytes = 0;
};

// Launches a kernel on the current stream, like <<<grid, block>>>, which only nvcc compiles.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchSize& size, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = size.grid;
  config.blockDim = size.block;
  config.dynamicSmemBytes = size.shared_bytes;
  config.stream = current_stream();
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <typename To, typename From>
__device__ __forceinline__ To bit_cast(const From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace ops_dcnv4
