// Selection of the instruction set at run time.
#include <cstdlib>
#include <string_view>

#include "cpu/kernels.h"
#include "tensor.h"

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

// Returns the highest instruction set that may be used. Falls back to ATEN_CPU_CAPABILITY, which is
// not validated: its values depend on the platform.
std::string_view highest_allowed() {
  const char* name = "OPS_DCNV4_CPU_CAPABILITY";
  const char* ours = std::getenv(name);
  const char* of_torch = std::getenv("ATEN_CPU_CAPABILITY");
  if (ours == nullptr || *ours == '\0') return of_torch == nullptr ? "" : of_torch;
  const std::string_view highest = ours;
  OPS_DCNV4_CHECK(highest == "default" || highest == "avx2" || highest == "avx512",
                  "the environment variable ", name, " must be default, avx2 or avx512, got ",
                  highest);
  return highest;
}

const InstructionSet& choose() {
  [[maybe_unused]] const std::string_view highest = highest_allowed();
#if defined(OPS_DCNV4_X86)
  __builtin_cpu_init();
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
