// Attributes of functions that are compiled into every kernel.
#pragma once

#if defined(__CUDACC__)
#define OPS_DCNV4_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define OPS_DCNV4_INLINE inline __attribute__((always_inline))
#define OPS_DCNV4_INLINE_LAMBDA __attribute__((always_inline))
#else
#define OPS_DCNV4_INLINE inline
#define OPS_DCNV4_INLINE_LAMBDA
#endif
