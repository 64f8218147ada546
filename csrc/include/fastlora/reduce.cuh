// Sums of parts, in their order: what atomics would add in any.
#pragma once

#include "stages.h"

namespace fastlora::cuda {

// Programs that fill a device of any size well enough. A constant, so that the same shape is cut
// up, and rounded, in the same way on all of them.
constexpr int kPrograms = 264;

// Rows are cut into so many chunks of `rows`, a multiple of `step`, that chunks times `others` fill
// the device.
struct Chunks {
  int64_t rows;
  int count;

  Chunks(int64_t M, int step, int64_t others, int programs = kPrograms);
};

// out = c times the sum of `count` parts, each as many rows and columns of floats, that lie
// `distance` floats apart; where `stacked`, rows of a part are so many rows side by side, to be
// added up too.
cudaError_t sum_parts(const float* parts, int count, int64_t distance, Factor c, const Matrix& out,
                      cudaStream_t stream, int stacked = 1);

}  // namespace fastlora::cuda
