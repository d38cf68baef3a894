// Kernels for x86 processors with AVX2, FMA and F16C.
#include "cpu/kernels.h"

#if defined(OPS_DCNV4_X86)
#include <immintrin.h>

#include <cstring>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define OPS_DCNV4_VECTOR_BYTES 32
#include "cpu/instantiate.h"

namespace ops_dcnv4 {
constexpr InstructionSet avx2 = instruction_set_of_file("avx2");
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
