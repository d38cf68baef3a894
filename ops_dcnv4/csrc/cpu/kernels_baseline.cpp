// Kernels for every processor of the platform.
#include "cpu/kernels.h"

#define OPS_DCNV4_VECTOR_BYTES 16
#include "cpu/instantiate.h"

namespace ops_dcnv4 {
constexpr InstructionSet baseline = instruction_set_of_file("baseline");
}
