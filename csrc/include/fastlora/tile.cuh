// How warps hold a tile of 32 rows and 32 columns of X, of which they read each element once.
//
// Thread (g, q) has of rows g, g + 8, g + 16 and g + 24 the vector of columns 8q to 8q + 7, which
// is one byte of the mask. It copies and reads these vectors alone, so no barrier is between. As a
// left operand of tensor cores they are two steps of 16 columns; that those are no neighbours does
// not matter as long as the rows of the right operand are in the same order: step h, columns 2q, 2q
// + 1, 2q + 8, 2q + 9  <->  columns 8q + 4h to 8q + 4h + 3 of the tile.
#pragma once

#include "dropout.cuh"
#include "numbers.cuh"

namespace fastlora::cuda {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kTileRows = 32, kTileCols = 32, kTileVectors = 4;
constexpr int kVector = 8;

// A left operand from rows g and g + 8.
__device__ inline void left_of(uint32_t (&left)[4], uint4 upper, uint4 lower, int step) {
  left[0] = step ? upper.z : upper.x;
  left[1] = step ? lower.z : lower.x;
  left[2] = step ? upper.w : upper.y;
  left[3] = step ? lower.w : lower.y;
}

}  // namespace fastlora::cuda
