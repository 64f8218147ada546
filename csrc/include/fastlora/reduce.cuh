// Sums of parts, in their order: what atomics would add in any.
#pragma once

#include "stages.h"

namespace fastlora::cuda {

// Programs that fill a device of any size well enough, where two are on a multiprocessor. A
// constant, so that the same shape is cut up, and rounded, in the same way on all of them.
constexpr int kPrograms = 264;

// Rows of 16 bits that are more to read than a part of 16 ranks in float32 is to write and add up.
constexpr int kLeastRows = 128;

// Rows are cut into so many chunks of `rows`, a multiple of `step`, that chunks times `others` are
// about `programs`, with no chunk but the last of fewer rows than `least`.
struct Chunks {
  int64_t rows;
  int count;

  Chunks(int64_t M, int step, int64_t others, int programs = kPrograms, int least = 1);
};

// out = c times the sum of `count` parts, each as many rows and columns of floats, that lie
// `distance` floats apart; where `stacked`, rows of a part are so many rows side by side, to be
// added up too.
struct Sum {
  const float* parts;
  int count;
  int64_t distance;
  Factor c;
  Matrix out;
  int stacked = 1;
};

// At most three, in one launch.
constexpr int kMostSums = 3;
cudaError_t sum_parts(const Sum* sums, int count, cudaStream_t stream);

}  // namespace fastlora::cuda
