// Whether there are enough tiles for a device, asked of the device.
#include "fastlora/fused.h"

namespace fastlora::cuda::hopper {

bool fills(int64_t M, int64_t N, int device) {
  int multiprocessors = 0;
  return !cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) &&
         filled(M, N, multiprocessors) >= kFilled;
}

}  // namespace fastlora::cuda::hopper
