// Binds the compiled kernels to the operators, whose schemas ops.py defines.
#include <Python.h>
#include <torch/library.h>

#include "dcnv4.h"

// Importing ops_dcnv4._C only runs the registration below.
extern "C" PyObject* PyInit__C() {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

TORCH_LIBRARY_IMPL(ops_dcnv4, CPU, m) {
  m.impl("dcnv4", ops_dcnv4::dcnv4_cpu);
  m.impl("dcnv4_backward", ops_dcnv4::dcnv4_backward_cpu);
}
