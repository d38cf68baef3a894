// Runs an AOTInductor package in a program without Python:
//   run_package LIBRARY PACKAGE INPUT OUTPUT
// LIBRARY is the path that ops_dcnv4.library_path() returns. INPUT and OUTPUT are tensors in files
// of torch.save.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <vector>

int main(int count, char** arguments) try {
  if (count != 5) throw std::runtime_error("four arguments are needed");
  if (dlsym(RTLD_DEFAULT, "Py_Initialize") != nullptr) throw std::runtime_error("Python is here");
  // Before the package, whose operators must exist when it is loaded.
  if (dlopen(arguments[1], RTLD_NOW) == nullptr) throw std::runtime_error(dlerror());
  torch::inductor::AOTIModelPackageLoader model(arguments[2]);

  std::ifstream file(arguments[3], std::ios::binary);
  const std::vector<char> saved{std::istreambuf_iterator<char>(file), {}};
  const at::Tensor input = torch::jit::pickle_load(saved).toTensor();

  const std::vector<char> output = torch::jit::pickle_save(model.run({input}).at(0));
  std::ofstream(arguments[4], std::ios::binary).write(output.data(), output.size());
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
