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

// sum += the parts, the last of which are the smallest, times `right`. Tensor cores cut a sum off
// each time, in one direction: over many rows that would be more than the last bits of float32. One
// that `IsExact` is short, therefore, and then added as other numbers are, rounded.
template <class T, bool IsExact, int Parts>
__device__ void multiply_parts(float (&sum)[4], const uint32_t (&parts)[Parts][4],
                               const uint32_t (&right)[2]) {
  float fresh[4] = {};
  float (&to)[4] = IsExact ? fresh : sum;
#pragma unroll
  for (int part = Parts - 1; part >= 0; --part) multiply<T>(to, parts[part], right);
#pragma unroll
  for (int e = 0; IsExact && e < 4; ++e) sum[e] += fresh[e];
}

// 32 rows of `Ranks` numbers, such as S, that all warps multiply with: each as the sum of `Parts`
// numbers of 16 bits, in shared memory. Fetched by each thread in part, so that they can be on
// their way.
template <class T, int Ranks, int Parts = 2>
struct SplitRows {
  // rows that are read by column must not compete for banks
  static constexpr int kStride = Ranks + 8, kPart = kTileRows * kStride;
  static constexpr size_t kBytes = Parts * kPart * sizeof(T);
  static constexpr int kPairs = kTileRows * Ranks / 2 / kThreads;
  float pairs[kPairs][2];

  // `period`: where there are more ranks than numbers, the rank that has the first of them again
  __device__ void fetch(const void* data, Dtype dtype, int64_t row_stride, int64_t rank_stride,
                        int64_t row, int64_t rows, int rank, int ranks, int period) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int pair = threadIdx.x + i * kThreads;
        const int64_t m = row + pair / (Ranks / 2);
        const int r = rank + pair % (Ranks / 2) * 2 + j;
        const bool exists = m < rows && r < ranks;
        const int of = r < period ? r : r - period;
        pairs[i][j] = exists ? load(data, dtype, m * row_stride + of * rank_stride) : 0;
      }
  }

  __device__ void put(T* to) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int pair = threadIdx.x + i * kThreads;
      const int at = pair / (Ranks / 2) * kStride + pair % (Ranks / 2) * 2;
      const Split<T, Parts> first(pairs[i][0]), second(pairs[i][1]);
#pragma unroll
      for (int part = 0; part < Parts; ++part)
        *reinterpret_cast<uint32_t*>(to + part * kPart + at) =
            pack(first.parts[part], second.parts[part]);
    }
  }

  // As a left operand: 16 rows from `row` on, ranks from 16 * step on.
  __device__ static void left(uint32_t (&out)[4], const T* part, int row, int step) {
    const int lane = threadIdx.x % 32;
    load_matrices<false>(out, part + (row + lane % 16) * kStride + 16 * step + lane / 16 * 8);
  }

  // As the left operand of a product that sums over rows: 16 ranks from 16 * step on.
  __device__ static void left_transposed(uint32_t (&out)[4], const T* part, int row, int step) {
    const int lane = threadIdx.x % 32, rank = 16 * step + lane / 8 % 2 * 8;
    load_matrices<true>(out, part + (row + lane % 8 + lane / 16 * 8) * kStride + rank);
  }
};

// A factor F (columns, ranks), for rows of numbers times Fᵀ, in the registers of a warp that has 32
// of its columns. In an order that leaves thread (g, q) with elements 8q to 8q + 7 of rows g and
// g + 8 of the product: word j of them is column 8q + 2j.
template <class T, int Ranks>
struct RightFactor {
  uint32_t words[Ranks / 16][4][2];

  __device__ void fetch(const T* F, int64_t col_stride, int64_t rank_stride, int column,
                        int columns, int rank, int ranks) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll
    for (int step = 0; step < Ranks / 16; ++step)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          T pair[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int n = column + g / 2 * 8 + 2 * j + g % 2;
            const int r = rank + 16 * step + 8 * half + 2 * q + e;
            pair[e] = n < columns && r < ranks ? F[n * col_stride + r * rank_stride] : T(0.f);
          }
          words[step][j][half] = pack(pair[0], pair[1]);
        }
  }

  // Where neighbouring ranks are neighbours and aligned to 4 bytes.
  __device__ void fetch_pairs(const T* F, int64_t col_stride, int column, int columns, int ranks) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int first = column + g / 2 * 8 + g % 2;
    const T* of = F + first * col_stride + 2 * q;
#pragma unroll
    for (int j = 0; j < 4; ++j, of += 2 * col_stride)
#pragma unroll
      for (int i = 0; i < Ranks / 8; ++i) {
        const bool exists = first + 2 * j < columns && 8 * i + 2 * q < ranks;
        words[i / 2][j][i % 2] = exists ? *reinterpret_cast<const uint32_t*>(of + 8 * i) : 0;
      }
  }

  // sum += the first `parts` parts, at most two, of 16 rows times Fᵀ. Rows of 16 bits have one: the
  // others are zero, which infinity must not meet.
  __device__ void multiply_rows(float (&sum)[4][4], const T* rows, int row, int parts) const {
#pragma unroll
    for (int part = 1; part >= 0; --part) {
      if (part >= parts) continue;
#pragma unroll
      for (int step = 0; step < Ranks / 16; ++step) {
        uint32_t left[4];
        SplitRows<T, Ranks>::left(left, rows + part * SplitRows<T, Ranks>::kPart, row, step);
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply<T>(sum[j], left, words[step][j]);
      }
    }
  }
};

// Vector (g, q) of eight rows of a tile in shared memory: neither threads that read their own nor
// eight rows of one q compete for banks.
__device__ inline int place_of(int g, int q) { return 4 * g + (q ^ (g / 2)); }

// The right operands of a product that sums over 16 rows, those of vectors `upper` and `lower`, for
// the columns 8 * pair to 8 * pair + 15.
__device__ inline void right_of(uint32_t (&right)[2][2], const uint4* upper, const uint4* lower,
                                int pair) {
  const int lane = threadIdx.x % 32;
  uint32_t words[4];
  const uint4* rows = lane / 8 % 2 ? lower : upper;
  load_matrices<true>(words, rows + place_of(lane % 8, pair + lane / 16));
#pragma unroll
  for (int i = 0; i < 4; ++i) right[i / 2][i % 2] = words[i];
}

}  // namespace fastlora::cuda
