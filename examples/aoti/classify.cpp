// Classifies images with an AOTInductor package, without Python:
//   classify LIBRARY PACKAGE IMAGE.ppm...
// LIBRARY is the path that ops_dcnv4.library_path() returns, PACKAGE the file of
// `flash-internimage export --format aoti`. The images form one batch, so their sizes must be
// equal.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// Reads a binary PPM file (P6, 8 bits, no comments) as a tensor (3, H, W) of uint8.
at::Tensor read_image(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t width = 0, height = 0, largest = 0;
  file >> magic >> width >> height >> largest;
  if (!file || magic != "P6" || largest != 255)
    throw std::runtime_error(path + " must be a P6 file of 8 bits");
  file.get();  // the white space after the header
  const at::Tensor pixels = at::empty({height, width, 3}, at::kByte);
  if (!file.read(static_cast<char*>(pixels.mutable_data_ptr()), pixels.nbytes()))
    throw std::runtime_error(path + " is too short");
  return pixels.permute({2, 0, 1});
}

// Reads three numbers, such as "[123.7, 116.3, 103.5]", as a tensor (3, 1, 1).
at::Tensor per_channel(const std::string& json) {
  std::istringstream text(json);
  std::vector<float> numbers(3);
  char separator = 0;
  for (float& number : numbers) text >> separator >> number;
  return at::tensor(numbers).view({3, 1, 1});
}

int main(int count, char** arguments) try {
  if (count < 4) throw std::runtime_error("usage: classify LIBRARY PACKAGE IMAGE.ppm...");
  // Before the package, whose operators must exist when it is loaded.
  if (dlopen(arguments[1], RTLD_NOW) == nullptr) throw std::runtime_error(dlerror());
  torch::inductor::AOTIModelPackageLoader model(arguments[2]);
  const auto metadata = model.get_metadata();

  std::vector<at::Tensor> images;
  for (int i = 3; i < count; ++i) images.push_back(read_image(arguments[i]));
  const at::Tensor pixels = at::stack(images).to(at::kFloat);
  const at::Tensor input =
      (pixels - per_channel(metadata.at("mean"))) / per_channel(metadata.at("std"));
  const at::Tensor probabilities = model.run({input.contiguous()}).at(0).softmax(1);
  const auto [best, classes] = probabilities.max(1);
  for (int i = 3; i < count; ++i)
    std::cout << arguments[i] << ": class " << classes[i - 3].item<int64_t>() << ", probability "
              << best[i - 3].item<float>() << '\n';
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
