// Which tiles of `out` a pair of blocks computes, and which elements of a tile a thread has.
//
// All of it runs on the host, too, where it is tested.
#pragma once

#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "fastlora/fused.h"
#include "fastlora/numbers.cuh"

namespace fastlora::cuda::hopper {

constexpr int kDepth = 64;
using Tile = cute::Shape<cute::Int<kRows>, cute::Int<kCols>, cute::Int<kDepth>>;
// of two warpgroups that multiply, each of which has half of the rows
constexpr int kMultipliers = 256;

// Two warpgroups, each on half of the rows. `Along`: what the right operand is contiguous along.
template <class E, cute::GMMA::Major Along>
using Mma = decltype(cute::make_tiled_mma(
    cute::GMMA::ss_op_selector<E, E, float, Tile, cute::GMMA::Major::K, Along>(),
    cute::Layout<cute::Shape<cute::_2, cute::_1, cute::_1>>{}));

// The tiles of `out`, by pairs, in the order in which they are taken: those that are computed at
// the same time are a square, more or less, so that they read the same rows and columns.
class Tiles {
 public:
  struct Place {
    // of pairs, of tiles
    int row, col;
  };

  __host__ __device__ Tiles(int64_t M, int64_t N)
      : rows_(int(blocks_of(M, kPair * kRows))), cols_(int(blocks_of(N, kCols))) {}

  // no memory holds more than 2**31 tiles
  __host__ __device__ int count() const { return rows_ * cols_; }

  __host__ __device__ Place operator[](int i) const {
    const int first = i / (kBand * cols_) * kBand, in_band = i % (kBand * cols_);
    const int height = rows_ - first < kBand ? rows_ - first : kBand;
    return {first + in_band % height, in_band / height};
  }

 private:
  // 8 x 8 pairs of blocks are half of the multiprocessors, or nearly
  static constexpr int kBand = 8;
  int rows_, cols_;
};

// Where the elements of a thread are in the tile: (2 columns, 2 rows, a group for every 8 columns).
template <class Mma>
__host__ __device__ auto places_of(int thread) {
  const auto tile = cute::make_identity_tensor(cute::Shape<cute::Int<kRows>, cute::Int<kCols>>{});
  const auto places = Mma{}.get_thread_slice(thread).partition_C(tile);
  using Expected =
      cute::Shape<cute::Shape<cute::_2, cute::_2, cute::Int<kCols / 8>>, cute::_1, cute::_1>;
  static_assert(cute::is_same_v<decltype(cute::shape(places)), Expected>);
  return places(cute::make_coord(cute::_, cute::_, cute::_), 0, 0);
}

// From the first to the second of a thread's rows.
constexpr int kRowStep = 8;

// The first column of what transpose_in_quad gives thread q of the words of four groups.
__host__ __device__ constexpr int vector_column(int group, int q) { return 8 * (group + q); }

// Of the mask, the bits for a thread's two rows.
struct Kept {
  static constexpr int kWords = kCols / 32;
  uint32_t words[2][kWords];

  // `row` and `col`: the first of the tile
  template <class Places>
  __host__ __device__ Kept(const uint32_t* mask, const Places& places, int64_t row, int64_t col,
                           int64_t M, int64_t N) {
    const int64_t row_words = blocks_of(N, 32), left = row_words - col / 32;
    const int count = int(left < kWords ? left : kWords);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t m = row + cute::get<0>(places(0, i, 0));
      // of rows beyond, nothing is stored: any bits will do
      const uint32_t* line = mask + (m < M ? m : M - 1) * row_words + col / 32;
#pragma unroll
      for (int j = 0; j < kWords; ++j) words[i][j] = j < count ? line[j] : 0;
    }
  }

  // Zeroes what is dropped, whatever it is. From a thread's first column on, its bits are in the
  // same places for all threads: constants, of which one instruction makes seven predicates.
  template <class Places, class Sum>
  __host__ __device__ void apply(const Places& places, Sum& sum) const {
    const int first = cute::get<1>(places(0, 0, 0));
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        const uint32_t bits = words[i][word] >> first;
#pragma unroll
        for (int group = 0; group < 4; ++group)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& x = sum(cute::make_coord(j, i, 4 * word + group), 0, 0);
            x = bits & 1u << (8 * group + j) ? x : 0.f;
          }
      }
  }
};

}  // namespace fastlora::cuda::hopper
