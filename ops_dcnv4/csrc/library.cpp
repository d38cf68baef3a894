// Registers the compiled kernels for the operators, whose schemas, gradients and
// autocast are registered in registration.py. There is one library per device.
#include <Python.h>
#include <torch/library.h>

#include "operators.h"

#if !defined(OPS_DCNV4_CUDA)
#include "cpu/kernels.h"
#endif

namespace {

// Importing a module only runs the registration below.
PyObject* make_module(const char* name) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, name, nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

}  // namespace

#if defined(OPS_DCNV4_CUDA)

extern "C" PyObject* PyInit__C_cuda() { return make_module("_C_cuda"); }

TORCH_LIBRARY_IMPL(ops_dcnv4, CUDA, m) {
  m.impl("dcnv4", ops_dcnv4::Schema<ops_dcnv4::dcnv4_cuda>::call);
  m.impl("dcnv4_backward", ops_dcnv4::Schema<ops_dcnv4::dcnv4_backward_cuda>::call);
  m.impl("ms_deform_attn", ops_dcnv4::ms_deform_attn<ops_dcnv4::ms_deform_attn_cuda>);
  m.impl("ms_deform_attn_backward",
         ops_dcnv4::ms_deform_attn_backward<ops_dcnv4::ms_deform_attn_backward_cuda>);
  m.impl("flash_deform_attn", ops_dcnv4::flash_deform_attn<ops_dcnv4::ms_deform_attn_cuda>);
  m.impl("flash_deform_attn_backward",
         ops_dcnv4::flash_deform_attn_backward<ops_dcnv4::ms_deform_attn_backward_cuda>);
}

#else

extern "C" PyObject* PyInit__C() {
  PyObject* module = make_module("_C");
  if (module == nullptr) return nullptr;
  PyModule_AddStringConstant(module, "INSTRUCTION_SET", ops_dcnv4::instruction_set().name);
  return module;
}

TORCH_LIBRARY_IMPL(ops_dcnv4, CPU, m) {
  m.impl("dcnv4", ops_dcnv4::Schema<ops_dcnv4::dcnv4_cpu>::call);
  m.impl("dcnv4_backward", ops_dcnv4::Schema<ops_dcnv4::dcnv4_backward_cpu>::call);
  m.impl("ms_deform_attn", ops_dcnv4::ms_deform_attn<ops_dcnv4::ms_deform_attn_cpu>);
  m.impl("ms_deform_attn_backward",
         ops_dcnv4::ms_deform_attn_backward<ops_dcnv4::ms_deform_attn_backward_cpu>);
  m.impl("flash_deform_attn", ops_dcnv4::flash_deform_attn<ops_dcnv4::ms_deform_attn_cpu>);
  m.impl("flash_deform_attn_backward",
         ops_dcnv4::flash_deform_attn_backward<ops_dcnv4::ms_deform_attn_backward_cpu>);
}

#endif
