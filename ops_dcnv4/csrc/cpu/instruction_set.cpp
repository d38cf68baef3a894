// Selection of the instruction set at run time.
#include <cstdlib>
#include <string_view>

#include "cpu/kernels.h"

#if defined(OPS_DCNV4_X86)
#include <cpuid.h>
#endif

namespace ops_dcnv4 {
namespace {

#if defined(OPS_DCNV4_X86)

// Not all compilers accept "f16c" in __builtin_cpu_supports.
bool supports_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}

// Checks for everything that kernels_avx2.cpp is compiled with. A test compares the two lists.
bool supports_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c();
}

// Checks for everything that kernels_avx512.cpp is compiled with.
bool supports_avx512() {
  return supports_avx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

#endif

const InstructionSet& choose() {
#if defined(OPS_DCNV4_X86)
  __builtin_cpu_init();
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view highest = variable == nullptr ? "" : variable;
  if (highest != "default") {
    if (highest != "avx2" && supports_avx512()) return avx512;
    if (supports_avx2()) return avx2;
  }
#endif
  return baseline;
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

}  // namespace ops_dcnv4
