// Launching of kernels, and conversions between types of the same size.
#pragma once

#include <cuda_fp16.h>

#include <cstring>

#include "cuda/runtime.h"

namespace ops_dcnv4 {

constexpr int warp_size = 32;

// Launches a kernel on the current stream, like <<<grid, block>>>, which only nvcc compiles.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
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
