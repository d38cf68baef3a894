// Binds the compiled kernels to the operators, whose schemas backends.py defines.
// A library per device.
#include <Python.h>
#include <torch/library.h>

#include "operators.h"

// Importing the module only runs the registration.
#define OPS_DCNV4_MODULE(name)                                                           \
  extern "C" PyObject* PyInit_##name() {                                                 \
    static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, #name, nullptr, -1, nullptr}; \
    return PyModule_Create(&module);                                                     \
  }

#if defined(OPS_DCNV4_CUDA)

OPS_DCNV4_MODULE(_C_cuda)

TORCH_LIBRARY_IMPL(ops_dcnv4, CUDA, m) {
  m.impl("dcnv4", ops_dcnv4::dcnv4_cuda);
  m.impl("dcnv4_backward", ops_dcnv4::dcnv4_backward_cuda);
  m.impl("ms_deform_attn", ops_dcnv4::ms_deform_attn_cuda);
  m.impl("ms_deform_attn_backward", ops_dcnv4::ms_deform_attn_backward_cuda);
  m.impl("flash_deform_attn", ops_dcnv4::flash_deform_attn_cuda);
  m.impl("flash_deform_attn_backward", ops_dcnv4::flash_deform_attn_backward_cuda);
}

#else

OPS_DCNV4_MODULE(_C)

TORCH_LIBRARY_IMPL(ops_dcnv4, CPU, m) {
  m.impl("dcnv4", ops_dcnv4::dcnv4_cpu);
  m.impl("dcnv4_backward", ops_dcnv4::dcnv4_backward_cpu);
  m.impl("ms_deform_attn", ops_dcnv4::ms_deform_attn_cpu);
  m.impl("ms_deform_attn_backward", ops_dcnv4::ms_deform_attn_backward_cpu);
  m.impl("flash_deform_attn", ops_dcnv4::flash_deform_attn_cpu);
  m.impl("flash_deform_attn_backward", ops_dcnv4::flash_deform_attn_backward_cpu);
}

#endif
