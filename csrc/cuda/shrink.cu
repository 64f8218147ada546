// S_i = c_i (m_i∘X) A_iᵀ: X is read once, for all layers, and their masks drawn as it is.
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
constexpr int kLeastRanks = 16, kMostRanks = 64, kMostLayers = 3;

// Four threads of a quad have four bytes each, one of every step; then each has all of one step.
__device__ inline uint32_t transpose_bytes(uint32_t bytes, int q) {
  uint32_t other = __shfl_xor_sync(~0u, bytes, 1);
  bytes = permute(bytes, other, q & 1 ? 0x3715 : 0x6240);
  other = __shfl_xor_sync(~0u, bytes, 2);
  return permute(bytes, other, q & 2 ? 0x3276 : 0x5410);
}

// Of a layer; the parts of its factor are more of its R ranks.
template <class T>
struct Job {
  const T* A;
  int64_t a_stride;
  int R;
  Factor c;
  // of a mask; null: there is none
  const int64_t* seed;
  uint32_t t;
  uint8_t* mask;
  float* S;
};

template <class T, int Layers>
struct Jobs {
  Job<T> of[Layers];
};

// More ranks than a tile has are those of a single layer.
template <class T, int Ranks, int Layers, bool Drops>
__global__ void __launch_bounds__(kThreads, 2)
    shrink_kernel(const T* X, int64_t x_stride, Jobs<T, Layers> jobs, int64_t M, int K, int tiles,
                  int windows) {
  constexpr int kTilesN = Ranks / 8, kVectors = kTileVectors + Layers * kTilesN,
                kStages = kRing / kVectors;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int64_t row = int64_t(blockIdx.x / tiles) * kTileRows + g;
  const int rank = blockIdx.x % tiles * Ranks + g;
  uint4* ring = shared_memory<uint4>() + warp * kRing * 32 + lane;

  // the columns of this thread: 32 at a time, kWarps windows on after each window
  const unsigned first = (blockIdx.y * windows + warp) * kWindow + kVector * q;
  const unsigned end = min(unsigned(round_up(K, kWindow)), (blockIdx.y + 1) * windows * kWindow);
  const auto is_last = [](unsigned column) { return column / kTileCols % kSteps == kSteps - 1; };
  const auto jump = [=](unsigned column) {
    return kTileCols + (is_last(column) ? (kWarps - 1) * kWindow : 0);
  };
  const int rows = int(min(M - row, int64_t(kTileRows)));
  X += row * x_stride;
  x_stride *= 8;
  unsigned ahead = first;
  const auto fetch = [&](uint4* to) {
    if (ahead - kVector * q < end) {
      const bool inside = ahead < unsigned(K);
      const T* x = X + ahead;
#pragma unroll
      for (int i = 0; i < kTileVectors; ++i, x += x_stride)
        copy_async(to + i * 32, x, inside && 8 * i < rows);
#pragma unroll
      for (int l = 0; l < Layers; ++l) {
        const T* a = jobs.of[l].A + rank * jobs.of[l].a_stride + ahead;
#pragma unroll
        for (int j = 0; j < kTilesN; ++j, a += 8 * jobs.of[l].a_stride)
          copy_async(to + (kTileVectors + l * kTilesN + j) * 32, a,
                     inside && 8 * j < jobs.of[l].R - rank);
      }
    }
    commit_copies();
    ahead += jump(ahead);
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) fetch(ring + s * kVectors * 32);

  const uint2 only_key = Drops && Layers == 1 ? halves(uint64_t(*jobs.of[0].seed)) : uint2{};
  const int row_bytes = int(mask_bytes(K));
  uint32_t bytes[Layers][kTileVectors] = {};
  float sum[Layers][2][kTilesN][4] = {};
  int slot = 0, filled = kStages - 1;
  for (unsigned column = first; column - kVector * q < end; column += jump(column)) {
    wait_for_copies<kStages - 2>();
    fetch(ring + filled * kVectors * 32);
    filled = slot;
    const uint4* vectors = ring + slot * kVectors * 32;
    slot = slot + 1 < kStages ? slot + 1 : 0;
    // bytes past K are zero
    const uint32_t inside = column < unsigned(K) ? 0xFF : 0;
#pragma unroll
    for (int l = 0; l < Layers; ++l) {
      uint4 x[kTileVectors];
#pragma unroll
      for (int i = 0; i < kTileVectors; ++i) x[i] = vectors[i * 32];
      if (Drops && (Layers == 1 || jobs.of[l].seed)) {
        // several keys, and those of their rounds, would take registers that there are not
        const uint2 key = Layers == 1 ? only_key : halves(uint64_t(*jobs.of[l].seed));
#pragma unroll
        for (int i = 0; i < kTileVectors; ++i) {
          const Dropped dropped =
              draw((row + 8 * i) * row_bytes + column / 8, key, limit_of(jobs.of[l].t));
          x[i] = dropped.keep(x[i]);
          bytes[l][i] = permute(bytes[l][i], byte_of(dropped) & inside, 0x4321);
        }
      }
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
        const uint4 a = vectors[(kTileVectors + l * kTilesN + j) * 32];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t right[2] = {h ? a.z : a.x, h ? a.w : a.y};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            uint32_t left[4];
            left_of(left, x[2 * i], x[2 * i + 1], h);
            multiply<T>(sum[l][i][j], left, right);
          }
        }
      }
    }
    if constexpr (Drops) {
      if (!is_last(column)) continue;
      // the byte at column - 8q of the last step is the first of four; this thread has step q's
      const int byte = int(column - kVector * q) / 8 - 4 * (kSteps - 1) + 4 * q;
#pragma unroll
      for (int i = 0; i < kTileVectors; ++i) {
        const bool exists = rank == g && 8 * i < rows && byte < row_bytes;
#pragma unroll
        for (int l = 0; l < Layers; ++l) {
          const uint32_t word = transpose_bytes(bytes[l][i], q);
          if (exists && (Layers == 1 || jobs.of[l].seed))
            *reinterpret_cast<uint32_t*>(jobs.of[l].mask + (row + 8 * i) * row_bytes + byte) = word;
        }
      }
    }
  }

  // [warp][row][layer][rank], where the ring was
  constexpr int kColumns = Layers * Ranks;
  float* sums = shared_memory<float>();
  __syncthreads();
#pragma unroll
  for (int l = 0; l < Layers; ++l)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < kTilesN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int at = warp * kTileRows + 16 * i + g + 8 * (e / 2);
          sums[at * kColumns + l * Ranks + 8 * j + 2 * q + e % 2] = sum[l][i][j][e];
        }
  __syncthreads();
#pragma unroll
  for (int l = 0; l < Layers; ++l) {
    const Job<T>& job = jobs.of[l];
    const float scale = value(job.c);
    float* S = job.S + blockIdx.y * M * job.R;
    for (int e = threadIdx.x; e < kTileRows * Ranks; e += kThreads) {
      const int at = e / Ranks * kColumns + l * Ranks + e % Ranks;
      float total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += sums[w * kTileRows * kColumns + at];
      const int64_t m = row - g + e / Ranks;
      const int r = rank - g + e % Ranks;
      if (m < M && r < job.R) S[m * job.R + r] = scale * total;
    }
  }
}

// Of the first layers, how many one launch is for, and its shape.
struct Plan {
  bool vectors;
  // parts of a factor, as more rows of it
  int stacked;
  int layers = 1, ranks, tiles, windows, parts;

  Plan(const Matrix& X, const ShrinkLayer* of, int count)
      : vectors(is_fast(X, of[0].A)), stacked(is_split(X, of[0].A) ? kExactParts : 1) {
    int64_t R = stacked * of[0].A.rows;
    for (; vectors && layers < std::min(count, kMostLayers); ++layers) {
      const Matrix& A = of[layers].A;
      if (!is_fast(X, A) || A.dtype != of[0].A.dtype) break;
      if (std::max(R, stacked * A.rows) > kLeastRanks) break;
      R = std::max(R, stacked * A.rows);
    }
    ranks = tile_for(R);
    tiles = int(blocks_of(R, ranks));
    const int64_t all = blocks_of(X.cols, kWindow), blocks = blocks_of(X.rows, kTileRows) * tiles;
    int64_t wanted = 1;
    while (2 * wanted * blocks <= kPrograms && 2 * wanted * kWarps <= all) wanted *= 2;
    windows = int(round_up(std::max<int64_t>(1, blocks_of(all, wanted)), kWarps));
    parts = int(std::max<int64_t>(1, blocks_of(all, windows)));
  }

  // whether a launch leaves nothing to add up
  bool whole() const { return parts * stacked == 1; }

  // of a layer: the bytes of its factor's parts, which come first, and of all
  size_t factor_bytes(const Matrix& A) const {
    return vectors && stacked > 1 ? split_workspace(A, stacked) : 0;
  }
  size_t workspace(const Matrix& X, const Matrix& A) const {
    const size_t bytes = X.rows * A.rows * sizeof(float);
    if (vectors) return factor_bytes(A) + (whole() ? 0 : round_up(parts * stacked * bytes, 256));
    const int slices = product_parts(X.rows, A.rows, X.cols);
    return slices > 1 ? slices * bytes : 0;
  }

  static bool is_fast(const Matrix& X, const Matrix& A) {
    return A.rows && is_vectors(X) && X.cols < 1 << 30 &&
           (is_split(X, A) || (A.dtype == X.dtype && is_vectors(A)));
  }
  static int tile_for(int64_t R) {
    return R <= kLeastRanks ? kLeastRanks : R <= 32 ? 32 : kMostRanks;
  }
};

template <class T, int Ranks, int Layers>
cudaError_t start(const Matrix& X, const Plan& plan, const Job<T>* of, cudaStream_t stream) {
  Jobs<T, Layers> jobs;
  bool drops = false;
  for (int l = 0; l < Layers; ++l) {
    jobs.of[l] = of[l];
    drops |= of[l].seed != nullptr;
  }
  const dim3 grid(unsigned(blocks_of(X.rows, kTileRows) * plan.tiles), plan.parts);
  return launch(
      drops ? shrink_kernel<T, Ranks, Layers, true> : shrink_kernel<T, Ranks, Layers, false>, grid,
      kThreads, kRing * kThreads * sizeof(uint4), stream, static_cast<const T*>(X.data),
      X.row_stride, jobs, X.rows, int(X.cols), plan.tiles, plan.windows);
}

// The layers of one launch.
cudaError_t shrink_together(const Matrix& X, const Plan& plan, const ShrinkLayer* layers,
                            char* workspace, cudaStream_t stream) {
  float* out[kMostLayers];
  Matrix A[kMostLayers];
  for (int l = 0; l < plan.layers; ++l) {
    A[l] = layers[l].A;
    if (plan.stacked > 1)
      if (const cudaError_t error =
              split(layers[l].A, plan.stacked, Stack::rows, workspace, &A[l], stream))
        return error;
    out[l] = plan.whole() ? layers[l].S
                          : reinterpret_cast<float*>(workspace + plan.factor_bytes(layers[l].A));
    workspace += plan.workspace(X, layers[l].A);
  }
  const cudaError_t error = with_type(X.dtype, [&](auto type) {
    using T = decltype(type);
    Job<T> jobs[kMostLayers];
    for (int l = 0; l < plan.layers; ++l) {
      const ShrinkLayer& of = layers[l];
      jobs[l] = {static_cast<const T*>(A[l].data),
                 A[l].row_stride,
                 int(A[l].rows),
                 plan.whole() ? of.c : Factor{},
                 of.t ? of.seed : nullptr,
                 of.t,
                 of.mask,
                 out[l]};
    }
    return plan.ranks == 64   ? start<T, 64, 1>(X, plan, jobs, stream)
           : plan.ranks == 32 ? start<T, 32, 1>(X, plan, jobs, stream)
           : plan.layers == 1 ? start<T, 16, 1>(X, plan, jobs, stream)
           : plan.layers == 2 ? start<T, 16, 2>(X, plan, jobs, stream)
                              : start<T, 16, 3>(X, plan, jobs, stream);
  });
  if (error || plan.whole()) return error;
  Sum sums[kMostLayers];
  for (int l = 0; l < plan.layers; ++l) {
    const int64_t M = X.rows, R = layers[l].A.rows;
    sums[l] = {
        out[l],      plan.parts, M * A[l].rows, layers[l].c, {layers[l].S, Dtype::f32, M, R, R, 1},
        plan.stacked};
  }
  return sum_parts(sums, plan.layers, stream);
}

// Any layer.
cudaError_t shrink_alone(const Matrix& X, const ShrinkLayer& layer, void* workspace,
                         cudaStream_t stream) {
  const int64_t M = X.rows, K = X.cols, R = layer.A.rows;
  if (layer.t)
    if (const cudaError_t error = draw_mask(M, K, layer.t, layer.seed, layer.mask, stream))
      return error;
  if (!R) return cudaSuccess;
  return product_in_parts(M, R, K, masked(view(X), layer.t ? layer.mask : nullptr, K),
                          transposed(layer.A), layer.c, contiguous(layer.S, R), workspace, stream);
}

}  // namespace

size_t shrink_workspace(const Matrix& X, const ShrinkLayer* layers, int count) {
  size_t most = 0;
  for (int done = 0; done < count;) {
    const Plan plan(X, layers + done, count - done);
    size_t bytes = 0;
    for (int l = 0; l < plan.layers; ++l) bytes += plan.workspace(X, layers[done++].A);
    most = std::max(most, bytes);
  }
  return most;
}

cudaError_t shrink(const Matrix& X, const ShrinkLayer* layers, int count, void* workspace,
                   cudaStream_t stream) {
  for (int done = 0; done < count;) {
    const Plan plan(X, layers + done, count - done);
    const cudaError_t error = plan.vectors ? shrink_together(X, plan, layers + done,
                                                             static_cast<char*>(workspace), stream)
                                           : shrink_alone(X, layers[done], workspace, stream);
    if (error) return error;
    done += plan.layers;
  }
  return cudaSuccess;
}

}  // namespace fastlora::cuda
