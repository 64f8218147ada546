// S = c (m∘X) Aᵀ: X is read once, and its mask drawn as it is.
//
// A block has 32 rows, and each of its warps every eighth window of 128 columns; the sums of the
// warps are added up in order at the end. Few rows: windows are shared out among more blocks.
#include <algorithm>

#include "fastlora/product.cuh"
#include "fastlora/reduce.cuh"
#include "fastlora/split.cuh"
#include "fastlora/tile.cuh"

namespace fastlora::cuda {
namespace {

// vectors of a lane that are on their way or waiting, 96 KiB for all: two blocks fit
constexpr int kRing = 24;
constexpr int kSteps = 4, kWindow = kSteps * kTileCols;
constexpr int kMostRanks = 64;

// Four threads of a quad have four bytes each, one of every step; then each has all of one step.
__device__ inline uint32_t transpose_bytes(uint32_t bytes, int q) {
  uint32_t other = __shfl_xor_sync(~0u, bytes, 1);
  bytes = permute(bytes, other, q & 1 ? 0x3715 : 0x6240);
  other = __shfl_xor_sync(~0u, bytes, 2);
  return permute(bytes, other, q & 2 ? 0x3276 : 0x5410);
}

template <class T, int Ranks, bool Drops>
__global__ void __launch_bounds__(kThreads, 2)
    shrink_kernel(const T* X, int64_t x_stride, const T* A, int64_t a_stride, float* S, Factor c,
                  uint32_t t, const int64_t* seed, uint8_t* mask, int64_t M, int K, int R,
                  int windows) {
  constexpr int kTilesN = Ranks / 8, kVectors = kTileVectors + kTilesN, kStages = kRing / kVectors;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int rank_tiles = (R + Ranks - 1) / Ranks;
  const int64_t row = int64_t(blockIdx.x / rank_tiles) * kTileRows + g;
  const int rank = blockIdx.x % rank_tiles * Ranks + g;
  uint4* ring = shared_memory<uint4>() + warp * kRing * 32 + lane;

  // the columns of this thread: 32 at a time, kWarps windows on after each window
  const int first = (blockIdx.y * windows + warp) * kWindow + kVector * q;
  const int end = min(int(round_up(K, kWindow)), int(blockIdx.y + 1) * windows * kWindow);
  const auto jump = [](int step) {
    return kTileCols + (step % kSteps == kSteps - 1 ? (kWarps - 1) * kWindow : 0);
  };
  const int rows = int(min(M - row, int64_t(kTileRows))), ranks = R - rank;
  X += row * x_stride + first;
  A += rank * a_stride + first;
  x_stride *= 8;
  a_stride *= 8;
  int ahead = first;
  const auto fetch = [&](uint4* to, int step) {
    if (ahead - kVector * q < end) {
      const bool inside = ahead < K;
      const T *x = X, *a = A;
#pragma unroll
      for (int i = 0; i < kTileVectors; ++i, x += x_stride)
        copy_async(to + i * 32, x, inside && 8 * i < rows);
#pragma unroll
      for (int j = 0; j < kTilesN; ++j, a += a_stride)
        copy_async(to + (kTileVectors + j) * 32, a, inside && 8 * j < ranks);
    }
    commit_copies();
    ahead += jump(step);
    X += jump(step);
    A += jump(step);
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) fetch(ring + s * kVectors * 32, s);

  const uint32_t limit = limit_of(t);
  const uint2 key = Drops ? halves(uint64_t(*seed)) : uint2{};
  const int64_t row_bytes = mask_bytes(K);
  uint32_t bytes[kTileVectors] = {};
  float sum[2][kTilesN][4] = {};
  int slot = 0, filled = kStages - 1;
  for (int column = first, step = 0; column - kVector * q < end; column += jump(step++)) {
    wait_for_copies<kStages - 2>();
    fetch(ring + filled * kVectors * 32, step + kStages - 1);
    filled = slot;
    const uint4* vectors = ring + slot * kVectors * 32;
    slot = slot + 1 < kStages ? slot + 1 : 0;
    // bytes past K are zero
    const uint32_t inside = column < K ? 0xFF : 0;
    uint4 x[kTileVectors];
#pragma unroll
    for (int i = 0; i < kTileVectors; ++i) {
      x[i] = vectors[i * 32];
      if constexpr (Drops) {
        const Dropped dropped = draw((row + 8 * i) * row_bytes + column / 8, key, limit);
        x[i] = dropped.keep(x[i]);
        bytes[i] = permute(bytes[i], byte_of(dropped) & inside, 0x4321);
      }
    }
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      const uint4 a = vectors[(kTileVectors + j) * 32];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t right[2] = {h ? a.z : a.x, h ? a.w : a.y};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t left[4];
          left_of(left, x[2 * i], x[2 * i + 1], h);
          multiply<T>(sum[i][j], left, right);
        }
      }
    }
    if constexpr (Drops) {
      if (step % kSteps < kSteps - 1) continue;
      // the byte at column - 8q of the last step is the first of four; this thread has step q's
      const int64_t byte = (column - kVector * q) / 8 - 4 * (kSteps - 1) + 4 * q;
#pragma unroll
      for (int i = 0; i < kTileVectors; ++i) {
        const uint32_t word = transpose_bytes(bytes[i], q);
        const int64_t at = row + 8 * i;
        if (rank == g && at < M && byte < row_bytes)
          *reinterpret_cast<uint32_t*>(mask + at * row_bytes + byte) = word;
      }
    }
  }

  // [warp][row][rank], where the ring was
  float* sums = shared_memory<float>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < kTilesN; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = warp * kTileRows + 16 * i + g + 8 * (e / 2);
        sums[at * Ranks + 8 * j + 2 * q + e % 2] = sum[i][j][e];
      }
  __syncthreads();
  const float scale = value(c);
  S += blockIdx.y * M * R;
  for (int e = threadIdx.x; e < kTileRows * Ranks; e += kThreads) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sums[w * kTileRows * Ranks + e];
    const int64_t m = row - g + e / Ranks;
    const int r = rank - g + e % Ranks;
    if (m < M && r < R) S[m * R + r] = scale * total;
  }
}

struct Plan {
  bool vectors;
  // parts of the factor, as more rows of it
  int stacked;
  int ranks, tiles, windows, parts;

  Plan(const Matrix& X, const Matrix& A) {
    stacked = is_split(X, A) ? kExactParts : 1;
    const int64_t R = stacked * A.rows;
    vectors = is_vectors(X) && X.cols < (1 << 30) &&
              (is_split(X, A) || (A.dtype == X.dtype && is_vectors(A)));
    ranks = R <= 16 ? 16 : R <= 32 ? 32 : kMostRanks;
    tiles = int(blocks_of(R, ranks));
    const int64_t all = blocks_of(X.cols, kWindow), blocks = blocks_of(X.rows, kTileRows) * tiles;
    int64_t wanted = 1;
    while (2 * wanted * blocks <= kPrograms && 2 * wanted * kWarps <= all) wanted *= 2;
    windows = int(round_up(std::max<int64_t>(1, blocks_of(all, wanted)), kWarps));
    parts = int(std::max<int64_t>(1, blocks_of(all, windows)));
  }
};

}  // namespace

size_t shrink_workspace(const Matrix& X, const Matrix& A) {
  const Plan plan(X, A);
  const int64_t bytes = X.rows * A.rows * sizeof(float);
  if (plan.vectors && plan.stacked > 1)
    return split_workspace(A, plan.stacked) + plan.parts * plan.stacked * bytes;
  const int parts = plan.vectors ? plan.parts : product_parts(X.rows, A.rows, X.cols);
  return parts > 1 ? parts * bytes : 0;
}

cudaError_t shrink(const Matrix& X, const Matrix& A, Factor c, uint32_t t, const int64_t* seed,
                   uint8_t* mask, float* S, void* workspace, cudaStream_t stream) {
  const int64_t M = X.rows, K = X.cols, R = A.rows;
  const Plan plan(X, A);
  cudaError_t error = cudaSuccess;
  if (!plan.vectors || !R) {
    if (t) error = draw_mask(M, K, t, seed, mask, stream);
    if (error || !R) return error;
    return product_in_parts(M, R, K, masked(view(X), t ? mask : nullptr, K), transposed(A), c,
                            contiguous(S, R), workspace, stream);
  }
  Matrix factor = A;
  char* room = static_cast<char*>(workspace);
  if (plan.stacked > 1) {
    error = split(A, plan.stacked, Stack::rows, room, &factor, stream);
    if (error) return error;
    room += split_workspace(A, plan.stacked);
  }
  const bool whole = plan.parts * plan.stacked == 1;
  float* out = whole ? S : reinterpret_cast<float*>(room);
  const dim3 grid(unsigned(blocks_of(M, kTileRows) * plan.tiles), plan.parts);
  error = with_type(X.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = [&](auto drops) {
      constexpr bool kDrops = decltype(drops)::value;
      return plan.ranks == 16   ? shrink_kernel<T, 16, kDrops>
             : plan.ranks == 32 ? shrink_kernel<T, 32, kDrops>
                                : shrink_kernel<T, 64, kDrops>;
    };
    return launch(t ? kernel(std::true_type()) : kernel(std::false_type()), grid, kThreads,
                  kRing * kThreads * sizeof(uint4), stream, static_cast<const T*>(X.data),
                  X.row_stride, static_cast<const T*>(factor.data), factor.row_stride, out,
                  whole ? c : Factor{}, t, seed, mask, M, int(K), int(factor.rows), plan.windows);
  });
  if (error || whole) return error;
  return sum_parts(out, plan.parts, M * factor.rows, c, {S, Dtype::f32, M, R, R, 1}, stream,
                   plan.stacked);
}

}  // namespace fastlora::cuda
