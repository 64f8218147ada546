// out (+)= m∘(c left rightᵀ + bias), written as whole vectors: what is read is little.
//
// A block has a slab of 256 columns, of which each warp keeps its part of the factor in registers,
// and a chunk of rows, 32 at a time.
#include "fastlora/low_rank.cuh"
#include "fastlora/product.cuh"
#include "fastlora/reduce.cuh"
#include "fastlora/split.cuh"
#include "fastlora/tile.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kSlab = kWarps * kTileCols, kMostRanks = 64;

// `Plain`: there is no mask, and nothing is added to. `Floats`: the rows of `left` are float32 next
// to each other, and no more than the ranks of a tile. `pairs`: see RightFactor.
template <class T, int Ranks, bool Plain, bool Floats>
__global__ void __launch_bounds__(kThreads, Ranks > (Floats ? 32 : 16) ? 1 : 2)
    low_rank_kernel(Matrix left, const T* right, int64_t n_stride, int64_t r_stride, int r,
                    bool pairs, Matrix bias, Factor c, const uint8_t* mask, T* out,
                    int64_t out_stride, bool adds, int64_t chunk, int N) {
  using Rows = SplitRows<T, Ranks>;
  if (Plain) mask = nullptr, adds = false;
  if (Floats) left.dtype = Dtype::f32, left.col_stride = 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int column = blockIdx.x * kSlab + warp * kTileCols, mine = column + kVector * q;
  const int64_t begin = blockIdx.y * chunk, end = min(begin + chunk, left.rows);
  const int period = int(left.cols), tiles = Floats ? 1 : max(1, (r + Ranks - 1) / Ranks);
  const int64_t row_bytes = mask_bytes(N);
  T* split = shared_memory<T>();

  float start[kVector] = {};
  if (bias.data && mine < N)
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      start[i] = load(bias.data, bias.dtype, (mine + i) * bias.col_stride);
  const float scale = value(c);
  const int parts = left.dtype == Dtype::f32 ? 2 : 1;

  Rows rows;
  RightFactor<T, Ranks> factor;
  rows.fetch(left.data, left.dtype, left.row_stride, left.col_stride, begin, end, 0, r, period);
  if (Floats && pairs)
    factor.fetch_pairs(right, n_stride, column, N, r);
  else
    factor.fetch(right, n_stride, r_stride, column, N, 0, r);
  float sum[2][4][4] = {};
  // more ranks than a tile has: all of its tiles for 32 rows, then for the next
  int turn = 0, tile = 0;
  for (int64_t row = begin; row < end; turn ^= 1) {
    T* here = split + turn * 2 * Rows::kPart;
    rows.put(here);
    __syncthreads();
    const int next = tile + 1 < tiles ? tile + 1 : 0;
    const int64_t next_row = next ? row : row + kTileRows;
    rows.fetch(left.data, left.dtype, left.row_stride, left.col_stride, next_row, end, next * Ranks,
               r, period);
#pragma unroll
    for (int half = 0; half < 2; ++half) factor.multiply_rows(sum[half], here, 16 * half, parts);
    if (tiles > 1) factor.fetch(right, n_stride, r_stride, column, N, next * Ranks, r);
    if (!next) {
#pragma unroll
      for (int i = 0; i < kTileVectors; ++i) {
        const int64_t m = row + 8 * i + g;
        if (m >= end || mine >= N) continue;
        const uint32_t kept = mask ? mask[m * row_bytes + mine / 8] : 0xFF;
        uint4& place = *reinterpret_cast<uint4*>(out + m * out_stride + mine);
        const uint4 before = adds ? place : uint4{};
        const auto pair = [&](uint32_t before, int j) {
          const float* of = sum[i / 2][j] + i % 2 * 2;
          float x[2];
#pragma unroll
          for (int e = 0; e < 2; ++e)
            x[e] = kept >> (2 * j + e) & 1 ? scale * of[e] + start[2 * j + e] : 0;
          return Plain ? pack<T>(x[0], x[1]) : pack_sum<T>(before, x[0], x[1]);
        };
        place = {pair(before.x, 0), pair(before.y, 1), pair(before.z, 2), pair(before.w, 3)};
      }
#pragma unroll
      for (int i = 0; i < 32; ++i) sum[i / 16][i / 4 % 4][i % 4] = 0;
    }
    tile = next;
    row = next_row;
  }
}

}  // namespace

size_t low_rank_workspace(const Matrix& right, const Matrix& out) {
  return is_split(out, right) ? split_workspace(right, kRoundedParts) : 0;
}

cudaError_t low_rank(const Matrix& left, const Matrix& right, const Matrix& bias, Factor c,
                     const uint8_t* mask, const Matrix& out, bool adds, void* workspace,
                     cudaStream_t stream) {
  const int64_t M = out.rows, N = out.cols;
  const bool splits = is_split(out, right);
  if (!is_vectors(out) || (right.dtype != out.dtype && !splits) || N >= 1 << 30)
    return product(M, N, left.cols, view(left), transposed(right), view(bias), c,
                   added(masked(view(out), mask, N), adds), stream);
  // its parts are more ranks, which the numbers of `left` are multiplied with again
  Matrix factor = right;
  if (splits)
    if (const cudaError_t error =
            split(right, kRoundedParts, Stack::columns, workspace, &factor, stream))
      return error;
  const int64_t r = factor.cols;
  const int64_t slabs = blocks_of(N, kSlab);
  const Chunks chunks(M, kTileRows, slabs, 2 * kPrograms);
  const bool floats = left.dtype == Dtype::f32 && left.col_stride == 1 && r <= kMostRanks;
  const bool pairs = factor.col_stride == 1 && factor.row_stride % 2 == 0 && r % 2 == 0 &&
                     reinterpret_cast<uintptr_t>(factor.data) % 4 == 0;
  return with_type(out.dtype, [&](auto type) {
    using T = decltype(type);
    const auto start = [&](auto kernel, size_t shared) {
      return launch(kernel, dim3(unsigned(slabs), chunks.count), kThreads, shared, stream, left,
                    static_cast<const T*>(factor.data), factor.row_stride, factor.col_stride,
                    int(r), pairs, bias, c, mask, static_cast<T*>(out.data), out.row_stride, adds,
                    chunks.rows, int(N));
    };
    const auto start_for = [&](auto ranks) {
      constexpr int kRanks = decltype(ranks)::value;
      return start(!floats        ? low_rank_kernel<T, kRanks, false, false>
                   : mask || adds ? low_rank_kernel<T, kRanks, false, true>
                                  : low_rank_kernel<T, kRanks, true, true>,
                   2 * SplitRows<T, kRanks>::kBytes);
    };
    return r <= 16   ? start_for(std::integral_constant<int, 16>())
           : r <= 32 ? start_for(std::integral_constant<int, 32>())
                     : start_for(std::integral_constant<int, kMostRanks>());
  });
}

}  // namespace fastlora::cuda
