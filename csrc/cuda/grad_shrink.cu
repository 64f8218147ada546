// dA = dSᵀ (m∘X), and with it dX = m∘(dS A): X and the mask are read once.
//
// A block has a slab of 256 columns and a chunk of rows, 32 at a time. What it adds up over its
// rows is its part of dA; the parts are added up in order.
#include "fastlora/product.cuh"
#include "fastlora/reduce.cuh"
#include "fastlora/split.cuh"
#include "fastlora/tile.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kSlab = kWarps * kTileCols, kMostRanks = 64, kStages = 3;
constexpr int kStageVectors = kTileVectors * 32, kRingVectors = kStages * kWarps * kStageVectors;

template <class T, int Ranks, bool Splits>
using RowsOf = SplitRows<T, Ranks, Splits ? kExactParts : 2>;

template <class T, int Ranks, bool Splits>
constexpr size_t shared_bytes() {
  return kRingVectors * sizeof(uint4) + 2 * RowsOf<T, Ranks, Splits>::kBytes;
}

// Where A `Splits`, its parts are one above the other.
template <class T, int Ranks, bool Input, bool Splits>
__global__ void __launch_bounds__(kThreads, Ranks > (Input ? 16 : 32) ? 1 : 2)
    grad_shrink_kernel(const float* dS, const T* X, int64_t x_stride, const uint8_t* mask,
                       const T* A, int64_t a_stride, float* dA, T* dX, int64_t dx_stride, int64_t M,
                       int64_t chunk, int K, int R) {
  using Rows = RowsOf<T, Ranks, Splits>;
  constexpr int kParts = Splits ? kExactParts : 2, kFactors = Splits ? kRoundedParts : 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int column = blockIdx.x * kSlab + warp * kTileCols, mine = column + kVector * q;
  const int rank = blockIdx.z * Ranks;
  const int64_t begin = blockIdx.y * chunk, end = min(begin + chunk, M);
  const int64_t row_bytes = mask_bytes(K);
  uint4* ring = shared_memory<uint4>() + warp * kStages * kStageVectors;
  T* split = reinterpret_cast<T*>(shared_memory<uint4>() + kRingVectors);

  const auto fetch = [&](int slot, int64_t row) {
    const T* x = X + (row + g) * x_stride + mine;
#pragma unroll
    for (int i = 0; i < kTileVectors; ++i, x += 8 * x_stride)
      copy_async(ring + slot * kStageVectors + i * 32 + place_of(g, q), x,
                 mine < K && row + g + 8 * i < end);
    commit_copies();
  };
  // the byte that decides each vector
  uint8_t bytes[kTileVectors];
  const auto fetch_mask = [&](int64_t row) {
#pragma unroll
    for (int i = 0; i < kTileVectors; ++i) {
      const int64_t m = row + g + 8 * i;
      bytes[i] = !mask ? 0xFF : m < end && mine < K ? mask[m * row_bytes + mine / 8] : 0;
    }
  };

#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) fetch(s, begin + s * kTileRows);
  Rows rows;
  rows.fetch(dS, Dtype::f32, R, 1, begin, end, rank, R, R);
  fetch_mask(begin);
  RightFactor<T, Input ? Ranks : 16> factors[kFactors];
  if constexpr (Input)
#pragma unroll
    for (int i = 0; i < kFactors; ++i)
      factors[i].fetch(A + i * R * a_stride, 1, a_stride, column, K, 0, R);

  float sum[Ranks / 16][4][4] = {};
  int slot = 0, filled = kStages - 1, turn = 0;
  for (int64_t row = begin; row < end; row += kTileRows, turn ^= 1) {
    T* here = split + turn * kParts * Rows::kPart;
    rows.put(here);
    wait_for_copies<kStages - 2>();
    __syncthreads();
    fetch(filled, row + (kStages - 1) * kTileRows);
    rows.fetch(dS, Dtype::f32, R, 1, row + kTileRows, end, rank, R, R);
    uint4* vectors = ring + slot * kStageVectors;
    filled = slot;
    slot = slot + 1 < kStages ? slot + 1 : 0;

    const uint32_t kept = bytes[0] | bytes[1] << 8 | bytes[2] << 16 | uint32_t(bytes[3]) << 24;
    if (mask) {
      // others of the warp read these vectors, too
#pragma unroll
      for (int i = 0; i < kTileVectors; ++i) {
        uint4& x = vectors[i * 32 + place_of(g, q)];
        x = dropped_by(kept >> 8 * i).keep(x);
      }
      fetch_mask(row + kTileRows);
      __syncwarp();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t right[2][2][2];
#pragma unroll
      for (int pair = 0; pair < 2; ++pair)
        right_of(right[pair], vectors + 2 * half * 32, vectors + (2 * half + 1) * 32, 2 * pair);
#pragma unroll
      for (int part = kParts - 1; part >= 0; --part)
#pragma unroll
        for (int tile = 0; tile < Ranks / 16; ++tile) {
          uint32_t left[4];
          Rows::left_transposed(left, here + part * Rows::kPart, 16 * half, tile);
#pragma unroll
          for (int j = 0; j < 4; ++j) multiply<T>(sum[tile][j], left, right[j / 2][j % 2]);
        }
      if constexpr (Input) {
        float out[4][4] = {};
#pragma unroll
        for (int i = kFactors - 1; i >= 0; --i)
          factors[i].multiply_rows(out, here, 16 * half, 2 - i);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t m = row + g + 8 * i + 16 * half;
          const uint4 x = {
              pack<T>(out[0][2 * i], out[0][2 * i + 1]), pack<T>(out[1][2 * i], out[1][2 * i + 1]),
              pack<T>(out[2][2 * i], out[2][2 * i + 1]), pack<T>(out[3][2 * i], out[3][2 * i + 1])};
          const Dropped dropped = dropped_by(kept >> 8 * (2 * half + i));
          if (m < end && mine < K)
            *reinterpret_cast<uint4*>(dX + m * dx_stride + mine) = dropped.keep(x);
        }
      }
    }
  }

  dA += int64_t(blockIdx.y) * R * K;
#pragma unroll
  for (int tile = 0; tile < Ranks / 16; ++tile)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = rank + 16 * tile + g + 8 * (e / 2), k = column + 8 * j + 2 * q + e % 2;
        if (r < R && k < K) dA[int64_t(r) * K + k] = sum[tile][j][e];
      }
}

struct Plan {
  bool splits, vectors;
  int ranks;
  int64_t slabs, tiles;
  Chunks chunks;

  Plan(const Matrix& X, const Matrix& A)
      : splits(is_split(X, A)),
        vectors(is_vectors(X) && (splits || X.dtype == A.dtype) && X.cols < 1 << 30),
        ranks(A.rows <= 16   ? 16
              : A.rows <= 32 ? 32
                             : kMostRanks),
        slabs(blocks_of(X.cols, kSlab)),
        tiles(blocks_of(A.rows, ranks)),
        chunks(X.rows, kTileRows, slabs * tiles) {}
};

}  // namespace

size_t grad_shrink_workspace(const Matrix& X, const Matrix& A) {
  const Plan plan(X, A);
  const int parts = plan.vectors ? plan.chunks.count : product_parts(A.rows, X.cols, X.rows);
  return parts * A.rows * X.cols * sizeof(float) +
         (plan.splits ? split_workspace(A, kRoundedParts) : 0);
}

cudaError_t grad_shrink(const float* dS, const Matrix& X, const uint8_t* mask, const Matrix& A,
                        const Matrix& dA, const Matrix& dX, void* workspace, cudaStream_t stream) {
  const int64_t M = X.rows, K = X.cols, R = A.rows;
  const Plan plan(X, A);
  // parts of the factor need the registers of as many ranks
  const bool fused = plan.vectors && R <= (plan.splits ? kMostRanks / 2 : kMostRanks) &&
                     is_vectors(dX) && (plan.splits || A.col_stride == 1);
  // for the parts of A, and then for those of dA
  char* room =
      static_cast<char*>(workspace) + (plan.splits ? split_workspace(A, kRoundedParts) : 0);
  if (dX.data && !fused)
    if (const cudaError_t error = grad_input(dS, A, mask, dX, workspace, stream)) return error;
  Matrix factor = A;
  if (dX.data && fused && plan.splits)
    if (const cudaError_t error = split(A, kRoundedParts, Stack::rows, workspace, &factor, stream))
      return error;
  if (!plan.vectors)
    return product_in_parts(R, K, M, transposed(dS, R), masked(view(X), mask, K), {}, view(dA),
                            room, stream);
  float* parts = reinterpret_cast<float*>(room);
  const cudaError_t error = with_type(X.dtype, [&](auto type) {
    using T = decltype(type);
    const auto start = [&](auto ranks, auto input, auto splits) {
      constexpr int kRanks = decltype(ranks)::value;
      constexpr bool kInput = decltype(input)::value, kSplits = decltype(splits)::value;
      const dim3 grid(unsigned(plan.slabs), plan.chunks.count, unsigned(plan.tiles));
      return launch(grad_shrink_kernel<T, kRanks, kInput, kSplits>, grid, kThreads,
                    shared_bytes<T, kRanks, kSplits>(), stream, dS, static_cast<const T*>(X.data),
                    X.row_stride, mask, static_cast<const T*>(factor.data), factor.row_stride,
                    parts, static_cast<T*>(dX.data), dX.row_stride, M, plan.chunks.rows, int(K),
                    int(R));
    };
    const auto start_for = [&](auto input, auto splits) {
      if (plan.ranks == 16) return start(std::integral_constant<int, 16>(), input, splits);
      if (plan.ranks == 32) return start(std::integral_constant<int, 32>(), input, splits);
      if constexpr (decltype(input)::value && decltype(splits)::value)
        return cudaErrorInvalidValue;
      else
        return start(std::integral_constant<int, 64>(), input, splits);
    };
    const std::true_type yes;
    const std::false_type no;
    const bool input = dX.data && fused;
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      if (plan.splits) return input ? start_for(yes, yes) : start_for(no, yes);
    return input ? start_for(yes, no) : start_for(no, no);
  });
  if (error) return error;
  return sum_parts(parts, plan.chunks.count, R * K, {}, dA, stream);
}

}  // namespace fastlora::cuda
