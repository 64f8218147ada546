// csrc/cuda/runtime.cu for the emulated device.
#include "fastlora/stages.h"

namespace fastlora::cuda {

cudaError_t set_device(int) { return cudaSuccess; }
cudaError_t obstacle() { return cudaSuccess; }
const char* describe(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid value" : "an error of the emulated device";
}

}  // namespace fastlora::cuda
