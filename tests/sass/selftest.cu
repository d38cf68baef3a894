// Kernels for test_emulator.py. The tests compute the same with NumPy.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

extern "C" {

__global__ void integers(const int* a, const int* b, long long* products, int* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  products[i] = static_cast<long long>(a[i]) * b[i] - b[i];
  out[5 * i] = a[i] / b[i];
  out[5 * i + 1] = min(a[i], b[i]) ^ (a[i] >> 3) ^ (static_cast<unsigned>(b[i]) >> 5);
  out[5 * i + 2] = abs(a[i]) % 7 + __umulhi(a[i], b[i]);
  out[5 * i + 3] = max(min(a[i], b[i]), 0);
  out[5 * i + 4] = __ffs(a[i]);
}

__global__ void floats(const float* x, float* out, int* whole) {
  const int i = threadIdx.x;
  out[4 * i] = fmaf(x[i], x[i], -1.0f);
  out[4 * i + 1] = x[i] > 0.5f ? x[i] : -x[i];
  out[4 * i + 2] = fminf(x[i], 0.25f) + fmaxf(x[i], -0.25f);
  out[4 * i + 3] = floorf(x[i]);
  whole[2 * i] = __float2int_rd(x[i]);
  whole[2 * i + 1] = static_cast<int>(x[i]);
}

__global__ void halves(const __half2* x, const __half2* y, __half2* out, float2* wide) {
  const int i = threadIdx.x;
  const __half2 product = __hmul2(x[i], __low2half2(y[i]));
  out[2 * i] = __hfma2(x[i], __high2half2(y[i]), product);
  out[2 * i + 1] = __hadd2(x[i], y[i]);
  wide[i] = __half22float2(product);
}

__global__ void bfloats(const __nv_bfloat162* x, const __nv_bfloat162* y, __nv_bfloat162* out) {
  const int i = threadIdx.x;
  const __nv_bfloat162 product = __hmul2(x[i], __low2bfloat162(y[i]));
  out[2 * i] = __hfma2(x[i], __high2bfloat162(y[i]), product);
  out[2 * i + 1] = __hadd2(x[i], y[i]);
}

__global__ void lanes(const int* x, int* out) {
  const int i = threadIdx.x;
  const int v = x[i];
  out[5 * i] = __shfl_sync(0xffffffff, v, 3, 8);
  out[5 * i + 1] = __shfl_xor_sync(0xffffffff, v, 5);
  out[5 * i + 2] = __shfl_down_sync(0xffffffff, v, 4, 16);
  out[5 * i + 3] = __all_sync(0xffffffff, v < 1000);
  out[5 * i + 4] = __ballot_sync(0xffffffff, v & 1);
}

// Lanes leave the loop after different numbers of turns.
__global__ void diverging(const int* turns, int* out) {
  const int i = threadIdx.x;
  int sum = 0;
  for (int turn = 0; turn < turns[i]; ++turn) sum += turn % 2 ? turn : 10;
  if (i >= 40) return;
  out[i] = sum;
}

// Sums each block's numbers in shared memory.
__global__ void block_sums(const float* x, float* sums) {
  extern __shared__ float partial[];
  const int i = threadIdx.x;
  partial[i] = x[blockIdx.x * blockDim.x + i];
  __syncthreads();
  for (int step = blockDim.x / 2; step > 0; step /= 2) {
    if (i < step) partial[i] += partial[i + step];
    __syncthreads();
  }
  if (i == 0) sums[blockIdx.x] = partial[0];
}

__global__ void add(float* sums, const float4* x) {
  const int i = threadIdx.x;
  atomicAdd(sums + i % 3, x[i].w);
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                   __cvta_generic_to_global(sums + 4)),
               "f"(x[i].x), "f"(x[i].y), "f"(x[i].z), "f"(x[i].w)
               : "memory");
}

__global__ void copy(const uint4* from, uint4* to, int shift) {
  reinterpret_cast<unsigned*>(to)[threadIdx.x] = 1;
  const char* shifted = reinterpret_cast<const char*>(from + threadIdx.x) + shift;
  to[threadIdx.x] = *reinterpret_cast<const uint4*>(shifted);
}
}
