// Runs an AOTInductor package in a program without Python:
//   run_package LIBRARY PACKAGE INPUT OUTPUT SIZE...
// LIBRARY is the path that ops_dcnv4.library_path() returns. INPUT and OUTPUT are files of float32
// numbers, those of a tensor of the given sizes and those of the model's first output.
#include <ATen/ops/from_blob.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

int main(int count, char** arguments) try {
  if (count < 6) throw std::runtime_error("at least five arguments are needed");
  if (dlsym(RTLD_DEFAULT, "Py_Initialize") != nullptr)
    throw std::runtime_error("libpython must not be loaded");
  // Before the package, whose operators must exist when it is loaded.
  if (dlopen(arguments[1], RTLD_NOW) == nullptr) throw std::runtime_error(dlerror());
  torch::inductor::AOTIModelPackageLoader model(arguments[2]);

  std::ifstream file(arguments[3], std::ios::binary);
  std::vector<char> numbers{std::istreambuf_iterator<char>(file), {}};
  std::vector<int64_t> sizes;
  for (int i = 5; i < count; ++i) sizes.push_back(std::stoll(arguments[i]));

  const at::Tensor output = model.run({at::from_blob(numbers.data(), sizes)}).at(0).contiguous();
  std::ofstream(arguments[4], std::ios::binary)
      .write(static_cast<const char*>(output.const_data_ptr()), output.nbytes());
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
