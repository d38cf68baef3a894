// The emulator has a single stream.
#pragma once

#include "model.h"

namespace c10::cuda {

inline cudaStream_t getCurrentCUDAStream() { return nullptr; }

}  // namespace c10::cuda
