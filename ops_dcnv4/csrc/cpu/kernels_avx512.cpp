// Kernels for x86 processors with AVX-512 (F, BW, DQ, VL).
#include "cpu/kernels.h"

#if defined(OPS_DCNV4_X86)
#include <immintrin.h>

#include <cstring>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
// GCC 12 warns about operands that its own intrinsics leave undefined on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define OPS_DCNV4_VECTOR_BYTES 64
#include "cpu/instantiate.h"

namespace ops_dcnv4 {
constexpr InstructionSet avx512 = instruction_set_of_file("avx512");
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
