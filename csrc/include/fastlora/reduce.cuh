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

// How many parts there are of each of the equal groups of columns.
struct Parts {
  static constexpr int kGroups = 16;
  int group_width;
  int of_group[kGroups];
};

// out (rows, cols) = c times the sum of parts, each (rows, part_stride) floats of which the first
// `cols` count, that lie `distance` floats apart.
cudaError_t sum_parts(const float* parts, int64_t distance, int64_t part_stride, Parts counts,
                      Factor c, const Matrix& out, cudaStream_t stream);

}  // namespace fastlora::cuda
