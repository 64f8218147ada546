// dS = c dY_g B_g and dB_g = dY_gᵀ S_g, from one read of dY.
//
// A block has a slab of one group's features and a chunk of rows, 32 at a time. What it adds up
// over its rows is its part of dB; what its features add to dS is a part too. Parts are added in
// order.
#include <algorithm>

#include "fastlora/product.cuh"
#include "fastlora/reduce.cuh"
#include "fastlora/split.cuh"
#include "fastlora/tile.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kMostRanks = 32;

// A slab that is wider has fewer parts of dS; more ranks, or parts of the factor, leave no
// registers for that.
template <int Ranks, bool Splits>
struct Shape {
  static constexpr int kTiles = Ranks == 16 && !Splits ? 2 : 1, kStages = kTiles == 2 ? 2 : 3;
  static constexpr int kFactors = Splits ? kExactParts : 1, kParts = Splits ? kExactParts : 2;
  static constexpr int kSlab = kWarps * kTiles * kTileCols;
  static constexpr int kStageVectors = kTiles * kTileVectors * 32;
  static constexpr int kRingVectors = kStages * kWarps * kStageVectors;
  static constexpr int kSums = kWarps * kTileRows * Ranks;
};

// Blocks on a multiprocessor, for which there are registers.
constexpr int resident(int ranks, bool splits) { return ranks == 32 && splits ? 1 : 2; }

// An element of `sums`, in an order of ranks that is that of eight rows on, too. Neither quads that
// write eight rows nor threads that read one compete for banks.
template <int Ranks>
__device__ int place_of_sum(int row, int rank) {
  return row * Ranks + (rank ^ (Ranks == 32 ? row % 4 : row / 2 % 2) * 8);
}

template <class T, int Ranks, bool Splits>
constexpr size_t shared_bytes() {
  using Of = Shape<Ranks, Splits>;
  return Of::kRingVectors * sizeof(uint4) + Of::kSums * sizeof(float) +
         2 * SplitRows<T, Ranks, Of::kParts>::kBytes;
}

// Where B `Splits`, its parts are side by side.
template <class T, int Ranks, bool Splits>
__global__ void __launch_bounds__(kThreads, resident(Ranks, Splits))
    grad_expand_kernel(const T* dY, int64_t y_stride, const float* S, int64_t s_stride, const T* B,
                       int64_t n_stride, int64_t r_stride, float* dS, float* dB, int64_t M,
                       int64_t chunk, int N, int r) {
  using Of = Shape<Ranks, Splits>;
  using Rows = SplitRows<T, Ranks, Of::kParts>;
  constexpr int kTilesN = Ranks / 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int column = blockIdx.x * Of::kSlab + warp * Of::kTiles * kTileCols;
  const int mine = column + kVector * q, rank = blockIdx.z * Ranks;
  const int64_t begin = blockIdx.y * chunk, end = min(begin + chunk, M);
  uint4* ring = shared_memory<uint4>() + warp * Of::kStages * Of::kStageVectors;
  float* sums = reinterpret_cast<float*>(shared_memory<uint4>() + Of::kRingVectors);
  T* split = reinterpret_cast<T*>(sums + Of::kSums);
  // of this thread: where it puts its first sum, and where it finds the first to add up
  const int first_sum = warp * kTileRows * Ranks + place_of_sum<Ranks>(g, 2 * q);
  const float* of_element = sums + place_of_sum<Ranks>(threadIdx.x / Ranks, threadIdx.x % Ranks);

  const auto fetch = [&](int slot, int64_t row) {
    const T* y = dY + (row + g) * y_stride + mine;
#pragma unroll
    for (int i = 0; i < kTileVectors; ++i, y += 8 * y_stride)
#pragma unroll
      for (int tile = 0; tile < Of::kTiles; ++tile)
        copy_async(
            ring + slot * Of::kStageVectors + (tile * kTileVectors + i) * 32 + place_of(g, q),
            y + tile * kTileCols, mine + tile * kTileCols < N && row + g + 8 * i < end);
    commit_copies();
  };
#pragma unroll
  for (int s = 0; s < Of::kStages - 1; ++s) fetch(s, begin + s * kTileRows);
  Rows rows;
  if (dB) rows.fetch(S, Dtype::f32, s_stride, 1, begin, end, rank, r, r);

  // the right operand of dS, in the order of columns in which vectors are left operands
  uint32_t factor[Of::kFactors][Of::kTiles][2][kTilesN][2] = {};
  if (dS)
#pragma unroll
    for (int part = 0; part < Of::kFactors; ++part)
#pragma unroll
      for (int tile = 0; tile < Of::kTiles; ++tile)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int j = 0; j < kTilesN; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int n = mine + tile * kTileCols + 4 * h + 2 * half, of = rank + 8 * j + g;
              // N is even
              const bool exists = n < N && of < r;
              const T* b = B + n * n_stride + (part * r + of) * r_stride;
              factor[part][tile][h][j][half] = exists ? pack(b[0], b[n_stride]) : 0;
            }

  float sum_B[Of::kTiles][Ranks / 16][4][4] = {};
  int slot = 0, filled = Of::kStages - 1, turn = 0;
  for (int64_t row = begin; row < end; row += kTileRows, turn ^= 1) {
    T* here = split + turn * Of::kParts * Rows::kPart;
    if (dB) rows.put(here);
    wait_for_copies<Of::kStages - 2>();
    __syncthreads();
    fetch(filled, row + (Of::kStages - 1) * kTileRows);
    if (dB) rows.fetch(S, Dtype::f32, s_stride, 1, row + kTileRows, end, rank, r, r);
    const uint4* vectors = ring + slot * Of::kStageVectors;
    filled = slot;
    slot = slot + 1 < Of::kStages ? slot + 1 : 0;

    if (dB)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t right[Of::kTiles][2][2][2];
#pragma unroll
        for (int tile = 0; tile < Of::kTiles; ++tile)
#pragma unroll
          for (int pair = 0; pair < 2; ++pair) {
            const uint4* upper = vectors + (tile * kTileVectors + 2 * half) * 32;
            right_of(right[tile][pair], upper, upper + 32, 2 * pair);
          }
#pragma unroll
        for (int m = 0; m < Ranks / 16; ++m) {
          uint32_t left[Of::kParts][4];
#pragma unroll
          for (int part = 0; part < Of::kParts; ++part)
            Rows::left_transposed(left[part], here + part * Rows::kPart, 16 * half, m);
#pragma unroll
          for (int tile = 0; tile < Of::kTiles; ++tile)
#pragma unroll
            for (int j = 0; j < 4; ++j)
              multiply_parts<T, Splits>(sum_B[tile][m][j], left, right[tile][j / 2][j % 2]);
        }
      }
    if (!dS) continue;

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum[kTilesN][4] = {};
#pragma unroll
      for (int tile = 0; tile < Of::kTiles; ++tile) {
        const uint4* upper = vectors + (tile * kTileVectors + 2 * i) * 32 + place_of(g, q);
        const uint4 x = upper[0], y = upper[32];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          uint32_t left[4];
          left_of(left, x, y, h);
#pragma unroll
          for (int part = Of::kFactors - 1; part >= 0; --part)
#pragma unroll
            for (int j = 0; j < kTilesN; ++j) multiply<T>(sum[j], left, factor[part][tile][h][j]);
        }
      }
#pragma unroll
      for (int j = 0; j < kTilesN; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = (16 * i + 8 * half) * Ranks + (first_sum ^ 8 * j);
          *reinterpret_cast<float2*>(sums + at) = {sum[j][2 * half], sum[j][2 * half + 1]};
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTileRows * Ranks / kThreads; ++i) {
      const int e = threadIdx.x + i * kThreads;
      float total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += of_element[w * kTileRows * Ranks + i * kThreads];
      const int64_t m = row + e / Ranks;
      const int of = rank + e % Ranks;
      if (m < end && of < r) dS[(blockIdx.x * M + m) * r + of] = total;
    }
  }

  if (!dB) return;
  dB += int64_t(blockIdx.y) * N * r;
#pragma unroll
  for (int tile = 0; tile < Of::kTiles; ++tile)
#pragma unroll
    for (int m = 0; m < Ranks / 16; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int n = column + tile * kTileCols + 8 * j + 2 * q + e % 2;
          const int of = rank + 16 * m + g + 8 * (e / 2);
          if (n < N && of < r) dB[int64_t(n) * r + of] = sum_B[tile][m][j][e];
        }
}

// How one block of the output is worked on.
struct Plan {
  bool splits, vectors;
  int ranks;
  int64_t slabs, tiles;
  Chunks chunks;

  Plan(const Matrix& dY, const Matrix& B, const Layout& layout, const Block& block)
      : splits(is_split(dY, B)),
        vectors(layout.repeats == 1 && (splits || dY.dtype == B.dtype) &&
                is_vectors(part(dY, 0, block.offset, dY.rows, block.width))),
        ranks(B.cols <= 16 ? 16 : kMostRanks),
        slabs(blocks_of(block.width,
                        ranks == 16 && !splits ? Shape<16, false>::kSlab : Shape<32, true>::kSlab)),
        tiles(blocks_of(B.cols, ranks)),
        chunks(dY.rows, kTileRows, slabs * tiles, kPrograms / 2 * resident(ranks, splits),
               kLeastRows) {}
};

}  // namespace

size_t grad_expand_workspace(const Matrix& dY, const Matrix& B, const Layout& layout) {
  const int64_t M = dY.rows, r = B.cols;
  int64_t most = 0;
  for (int i = 0; i < layout.count; ++i) {
    const Block& block = layout.blocks[i];
    if (block.group < 0) continue;
    const Plan plan(dY, B, layout, block);
    const int64_t n = int64_t(block.width) * layout.repeats;
    most = std::max(most, plan.vectors ? (plan.slabs * M + plan.chunks.count * n) * r
                                       : std::max(product_parts(M, r, n) * M * r,
                                                  product_parts(r, n, M) * n * r));
  }
  return most * sizeof(float) + (is_split(dY, B) ? split_workspace(B, kExactParts) : 0);
}

cudaError_t grad_expand(const Matrix& dY, const float* S, const Matrix& B, Factor c,
                        const Layout& layout, float* dS, const Matrix& dB, void* workspace,
                        cudaStream_t stream) {
  const int64_t M = dY.rows, r = B.cols;
  int64_t R = 0;
  for (int i = 0; i < layout.count; ++i) R += layout.blocks[i].group < 0 ? 0 : r;
  Matrix factor = B;
  if (is_split(dY, B)) {
    if (const cudaError_t error = split(B, kExactParts, Stack::columns, workspace, &factor, stream))
      return error;
    workspace = static_cast<char*>(workspace) + split_workspace(B, kExactParts);
  }
  for (int i = 0; i < layout.count; ++i) {
    const Block& block = layout.blocks[i];
    if (block.group < 0) continue;
    const int64_t n = int64_t(block.width) * layout.repeats;
    const Matrix B_g = part(B, block.row, 0, n, r), dB_g = part(dB, block.row, 0, n, r);
    const float* S_g = S ? S + block.group * r : nullptr;
    float* dS_g = dS ? dS + block.group * r : nullptr;
    const Plan plan(dY, B, layout, block);
    cudaError_t error = cudaSuccess;
    if (!plan.vectors) {
      const View dY_g = columns(dY, block, layout);
      if (dS)
        error =
            product_in_parts(M, r, n, dY_g, view(B_g), c, contiguous(dS_g, R), workspace, stream);
      if (!error && dB.data)
        error = product_in_parts(r, n, M, transposed(S_g, R), dY_g, {}, transposed(dB_g), workspace,
                                 stream);
      if (error) return error;
      continue;
    }
    float* dS_parts = static_cast<float*>(workspace);
    float* dB_parts = dS_parts + plan.slabs * M * r;
    error = with_type(dY.dtype, [&](auto type) {
      using T = decltype(type);
      const Matrix of_block = part(factor, block.row, 0, n, factor.cols);
      const auto start = [&](auto kernel, size_t shared) {
        const dim3 grid(unsigned(plan.slabs), plan.chunks.count, unsigned(plan.tiles));
        return launch(kernel, grid, kThreads, shared, stream,
                      static_cast<const T*>(dY.data) + block.offset, dY.row_stride, S_g, R,
                      static_cast<const T*>(of_block.data), of_block.row_stride,
                      of_block.col_stride, dS ? dS_parts : nullptr, dB.data ? dB_parts : nullptr, M,
                      plan.chunks.rows, int(n), int(r));
      };
      const auto start_for = [&](auto splits) {
        constexpr bool kSplits = decltype(splits)::value;
        return plan.ranks == 16
                   ? start(grad_expand_kernel<T, 16, kSplits>, shared_bytes<T, 16, kSplits>())
                   : start(grad_expand_kernel<T, 32, kSplits>, shared_bytes<T, 32, kSplits>());
      };
      if constexpr (std::is_same_v<T, __nv_bfloat16>)
        if (plan.splits) return start_for(std::true_type());
      return start_for(std::false_type());
    });
    Sum sums[2];
    int count = 0;
    if (dS) sums[count++] = {dS_parts, int(plan.slabs), M * r, c, {dS_g, Dtype::f32, M, r, R, 1}};
    if (dB.data) sums[count++] = {dB_parts, plan.chunks.count, n * r, {}, dB_g};
    if (!error) error = sum_parts(sums, count, stream);
    if (error) return error;
  }
  return cudaSuccess;
}

}  // namespace fastlora::cuda
