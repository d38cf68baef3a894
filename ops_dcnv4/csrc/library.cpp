// Defines the operators and registers the compiled kernels; registration.py adds the shapes for
// tracing, gradients and autocast. There is one library per device. Neither needs Python, so that
// C++ programs can load them too.
#include "registration.h"

#if defined(OPS_DCNV4_CUDA)

STABLE_TORCH_LIBRARY_IMPL(ops_dcnv4, CUDA, library) {
  ops_dcnv4::CudaOperators::implement(library);
}

#else

#include <string>

#include "cpu/kernels.h"

namespace {

std::string instruction_set() { return ops_dcnv4::instruction_set().name; }

}  // namespace

STABLE_TORCH_LIBRARY(ops_dcnv4, library) {
  ops_dcnv4::define_operators(library);
  library.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(ops_dcnv4, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", TORCH_BOX(&instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(ops_dcnv4, CPU, library) { ops_dcnv4::CpuOperators::implement(library); }

#endif
