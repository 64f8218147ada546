// dA_i = dS_iᵀ (m_i∘X), and with it dX = Σ m_i∘(dS_i A_i): X and the masks are read once.
//
// A block has a slab of 256 columns and a chunk of rows, 32 at a time. What it adds up over its
// rows is its part of dA; the parts are added up in order.
#include <algorithm>

#include "fastlora/product.cuh"
#include "fastlora/reduce.cuh"
#include "fastlora/split.cuh"
#include "fastlora/tile.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kSlab = kWarps * kTileCols, kStages = 3;
constexpr int kLeastRanks = 16, kMostRanks = 64, kMostLayers = 3;
constexpr int kStageVectors = kTileVectors * 32, kRingVectors = kStages * kWarps * kStageVectors;

template <class T, int Ranks, bool Splits>
using RowsOf = SplitRows<T, Ranks, Splits ? kExactParts : 2>;

template <class T, int Ranks, int Layers, bool Splits>
constexpr size_t shared_bytes() {
  return kRingVectors * sizeof(uint4) + 2 * Layers * RowsOf<T, Ranks, Splits>::kBytes;
}

// Blocks on a multiprocessor, for which there are registers.
constexpr int resident(int ranks, bool input, bool splits) {
  return ranks > (input || splits ? 16 : 32) ? 1 : 2;
}

// Of a layer.
template <class T>
struct Job {
  const float* dS;
  const uint8_t* mask;
  const T* A;
  int64_t a_stride;
  float* dA;
  int R;
};

template <class T, int Layers>
struct Jobs {
  Job<T> of[Layers];
};

// Where A `Splits`, its parts are one above the other. `adds`: to dX. More ranks than a tile has
// are those of a single layer.
template <class T, int Ranks, int Layers, bool Input, bool Splits>
__global__ void __launch_bounds__(kThreads, resident(Layers* Ranks, Input, Splits))
    grad_shrink_kernel(const T* X, int64_t x_stride, Jobs<T, Layers> jobs, T* dX, int64_t dx_stride,
                       bool adds, int64_t M, int64_t chunk, int K) {
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
  uint8_t bytes[Layers][kTileVectors];
  bool drops = false;
  Rows rows[Layers];
  const auto fetch_rows = [&](int64_t row) {
#pragma unroll
    for (int l = 0; l < Layers; ++l) {
      const Job<T>& job = jobs.of[l];
      rows[l].fetch(job.dS, Dtype::f32, job.R, 1, row, end, rank, job.R, job.R);
#pragma unroll
      for (int i = 0; i < kTileVectors; ++i) {
        const int64_t m = row + g + 8 * i;
        const bool exists = m < end && mine < K;
        bytes[l][i] = !job.mask ? 0xFF : exists ? job.mask[m * row_bytes + mine / 8] : 0;
      }
    }
  };

#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) fetch(s, begin + s * kTileRows);
  fetch_rows(begin);
  RightFactor<T, Input ? Ranks : 16> factors[Layers][kFactors];
#pragma unroll
  for (int l = 0; l < Layers; ++l) {
    const Job<T>& job = jobs.of[l];
    drops |= job.mask != nullptr;
    if constexpr (Input)
#pragma unroll
      for (int i = 0; i < kFactors; ++i)
        factors[l][i].fetch(job.A + i * job.R * job.a_stride, 1, job.a_stride, column, K, 0, job.R);
  }

  float sum[Layers][Ranks / 16][4][4] = {};
  int slot = 0, filled = kStages - 1, turn = 0;
  for (int64_t row = begin; row < end; row += kTileRows, turn ^= 1) {
    T* here = split + turn * Layers * kParts * Rows::kPart;
    uint32_t kept[Layers];
#pragma unroll
    for (int l = 0; l < Layers; ++l) {
      rows[l].put(here + l * kParts * Rows::kPart);
      const uint8_t (&b)[kTileVectors] = bytes[l];
      kept[l] = b[0] | b[1] << 8 | b[2] << 16 | uint32_t(b[3]) << 24;
    }
    wait_for_copies<kStages - 2>();
    __syncthreads();
    fetch(filled, row + (kStages - 1) * kTileRows);
    fetch_rows(row + kTileRows);
    uint4* vectors = ring + slot * kStageVectors;
    filled = slot;
    slot = slot + 1 < kStages ? slot + 1 : 0;

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 *upper = vectors + 2 * half * 32, *lower = upper + 32;
      const uint4 x[2] = {upper[place_of(g, q)], lower[place_of(g, q)]};
      float out[4][4] = {};
#pragma unroll
      for (int l = 0; l < Layers; ++l) {
        const T* dS = here + l * kParts * Rows::kPart;
        const uint32_t keeps = kept[l] >> 16 * half;
        if (drops) {
          // others of the warp read these vectors, too
          if (l) __syncwarp();
          upper[place_of(g, q)] = dropped_by(keeps).keep(x[0]);
          lower[place_of(g, q)] = dropped_by(keeps >> 8).keep(x[1]);
          __syncwarp();
        }
        uint32_t right[2][2][2];
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) right_of(right[pair], upper, lower, 2 * pair);
#pragma unroll
        for (int tile = 0; tile < Ranks / 16; ++tile) {
          uint32_t left[kParts][4];
#pragma unroll
          for (int part = 0; part < kParts; ++part)
            Rows::left_transposed(left[part], dS + part * Rows::kPart, 16 * half, tile);
#pragma unroll
          for (int j = 0; j < 4; ++j)
            multiply_parts<T, Splits>(sum[l][tile][j], left, right[j / 2][j % 2]);
        }
        if constexpr (Input) {
          float term[4][4] = {};
#pragma unroll
          for (int i = kFactors - 1; i >= 0; --i)
            factors[l][i].multiply_rows(term, dS, 16 * half, 2 - i);
#pragma unroll
          for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              out[j][e] += keeps >> (8 * (e / 2) + 2 * j + e % 2) & 1 ? term[j][e] : 0;
        }
      }
      if constexpr (Input)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t m = row + g + 8 * i + 16 * half;
          if (m >= end || mine >= K) continue;
          uint4& place = *reinterpret_cast<uint4*>(dX + m * dx_stride + mine);
          const uint4 before = adds ? place : uint4{};
          place = {pack_sum<T>(before.x, out[0][2 * i], out[0][2 * i + 1]),
                   pack_sum<T>(before.y, out[1][2 * i], out[1][2 * i + 1]),
                   pack_sum<T>(before.z, out[2][2 * i], out[2][2 * i + 1]),
                   pack_sum<T>(before.w, out[3][2 * i], out[3][2 * i + 1])};
        }
    }
  }

#pragma unroll
  for (int l = 0; l < Layers; ++l) {
    const int R = jobs.of[l].R;
    float* dA = jobs.of[l].dA + int64_t(blockIdx.y) * R * K;
#pragma unroll
    for (int tile = 0; tile < Ranks / 16; ++tile)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = rank + 16 * tile + g + 8 * (e / 2), k = column + 8 * j + 2 * q + e % 2;
          if (r < R && k < K) dA[int64_t(r) * K + k] = sum[l][tile][j][e];
        }
  }
}

// Of the first layers, how many one launch is for, and its shape.
struct Plan {
  bool splits, vectors;
  // with dX
  bool input;
  int layers, ranks;
  int64_t slabs, tiles;
  Chunks chunks;

  Plan(const Matrix& X, const GradShrinkLayer* of, int count, const Matrix& dX)
      : splits(is_split(X, of[0].A)),
        vectors(is_vectors(X) && (splits || X.dtype == of[0].A.dtype) && X.cols < 1 << 30),
        input(vectors && dX.data && is_vectors(dX) && has_input(of[0].A)),
        layers(input ? together(of, count) : 1),
        ranks(of[0].A.rows <= kLeastRanks ? kLeastRanks
              : of[0].A.rows <= 32        ? 32
                                          : kMostRanks),
        slabs(blocks_of(X.cols, kSlab)),
        tiles(blocks_of(of[0].A.rows, ranks)),
        chunks(X.rows, kTileRows, slabs * tiles,
               kPrograms / 2 * resident(layers * ranks, input, splits), kLeastRows) {}

  // of a layer: the bytes of its factor's parts, which come first, and of all
  size_t factor_bytes(const Matrix& A) const {
    return splits ? split_workspace(A, kRoundedParts) : 0;
  }
  size_t workspace(const Matrix& X, const Matrix& A) const {
    const int parts = vectors ? chunks.count : product_parts(A.rows, X.cols, X.rows);
    return factor_bytes(A) + round_up(parts * A.rows * X.cols * sizeof(float), 256);
  }

 private:
  // without dX, as in a model's first layers, each is a launch of its own
  int together(const GradShrinkLayer* of, int count) const {
    const auto fits = [&](const Matrix& A) {
      return A.rows <= kLeastRanks && A.dtype == of[0].A.dtype && has_input(A);
    };
    int n = 1;
    if (fits(of[0].A))
      while (n < std::min(count, kMostLayers) && fits(of[n].A)) ++n;
    return n;
  }
  // parts of the factor need the registers of as many ranks
  bool has_input(const Matrix& A) const {
    return A.rows && A.rows <= (splits ? kMostRanks / 2 : kMostRanks) &&
           (splits || A.col_stride == 1);
  }
};

template <class T, int Ranks, int Layers, bool Input, bool Splits>
cudaError_t start(const Matrix& X, const Plan& plan, const Job<T>* of, const Matrix& dX, bool adds,
                  cudaStream_t stream) {
  Jobs<T, Layers> jobs;
  for (int l = 0; l < Layers; ++l) jobs.of[l] = of[l];
  const dim3 grid(unsigned(plan.slabs), plan.chunks.count, unsigned(plan.tiles));
  return launch(grad_shrink_kernel<T, Ranks, Layers, Input, Splits>, grid, kThreads,
                shared_bytes<T, Ranks, Layers, Splits>(), stream, static_cast<const T*>(X.data),
                X.row_stride, jobs, static_cast<T*>(dX.data), dX.row_stride, adds, X.rows,
                plan.chunks.rows, int(X.cols));
}

template <class T, bool Input, bool Splits>
cudaError_t start(const Matrix& X, const Plan& plan, const Job<T>* of, const Matrix& dX, bool adds,
                  cudaStream_t stream) {
  if constexpr (Input) {
    if (plan.layers == 3) return start<T, 16, 3, Input, Splits>(X, plan, of, dX, adds, stream);
    if (plan.layers == 2) return start<T, 16, 2, Input, Splits>(X, plan, of, dX, adds, stream);
  }
  if (plan.ranks == 16) return start<T, 16, 1, Input, Splits>(X, plan, of, dX, adds, stream);
  if (plan.ranks == 32) return start<T, 32, 1, Input, Splits>(X, plan, of, dX, adds, stream);
  if constexpr (Input && Splits)
    return cudaErrorInvalidValue;
  else
    return start<T, 64, 1, Input, Splits>(X, plan, of, dX, adds, stream);
}

// The layers of one launch.
cudaError_t grad_shrink_together(const Matrix& X, const Plan& plan, const GradShrinkLayer* layers,
                                 const Matrix& dX, bool adds, char* workspace,
                                 cudaStream_t stream) {
  float* parts[kMostLayers];
  Matrix A[kMostLayers];
  for (int l = 0; l < plan.layers; ++l) {
    A[l] = layers[l].A;
    if (plan.input && plan.splits)
      if (const cudaError_t error =
              split(layers[l].A, kRoundedParts, Stack::rows, workspace, &A[l], stream))
        return error;
    parts[l] = reinterpret_cast<float*>(workspace + plan.factor_bytes(layers[l].A));
    workspace += plan.workspace(X, layers[l].A);
  }
  const cudaError_t error = with_type(X.dtype, [&](auto type) {
    using T = decltype(type);
    Job<T> jobs[kMostLayers];
    for (int l = 0; l < plan.layers; ++l)
      jobs[l] = {layers[l].dS,    layers[l].mask, static_cast<const T*>(A[l].data),
                 A[l].row_stride, parts[l],       int(layers[l].A.rows)};
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      if (plan.splits)
        return plan.input ? start<T, true, true>(X, plan, jobs, dX, adds, stream)
                          : start<T, false, true>(X, plan, jobs, dX, adds, stream);
    return plan.input ? start<T, true, false>(X, plan, jobs, dX, adds, stream)
                      : start<T, false, false>(X, plan, jobs, dX, adds, stream);
  });
  if (error) return error;
  Sum sums[kMostLayers];
  for (int l = 0; l < plan.layers; ++l)
    sums[l] = {parts[l], plan.chunks.count, layers[l].A.rows * X.cols, {}, layers[l].dA};
  return sum_parts(sums, plan.layers, stream);
}

// Any layer's dA.
cudaError_t grad_shrink_alone(const Matrix& X, const Plan& plan, const GradShrinkLayer& layer,
                              char* workspace, cudaStream_t stream) {
  const int64_t M = X.rows, K = X.cols, R = layer.A.rows;
  return product_in_parts(R, K, M, transposed(layer.dS, R), masked(view(X), layer.mask, K), {},
                          view(layer.dA), workspace + plan.factor_bytes(layer.A), stream);
}

}  // namespace

size_t grad_shrink_workspace(const Matrix& X, const GradShrinkLayer* layers, int count,
                             const Matrix& dX) {
  size_t most = 0;
  for (int done = 0; done < count;) {
    const Plan plan(X, layers + done, count - done, dX);
    size_t bytes = 0;
    for (int l = 0; l < plan.layers; ++l) bytes += plan.workspace(X, layers[done++].A);
    most = std::max(most, bytes);
  }
  return most;
}

cudaError_t grad_shrink(const Matrix& X, const GradShrinkLayer* layers, int count, const Matrix& dX,
                        void* workspace, cudaStream_t stream) {
  char* room = static_cast<char*>(workspace);
  for (int done = 0; done < count;) {
    const GradShrinkLayer* next = layers + done;
    const Plan plan(X, next, count - done, dX);
    const bool adds = done > 0;
    cudaError_t error = cudaSuccess;
    for (int l = 0; l < plan.layers && dX.data && !plan.input && !error; ++l)
      error = grad_input(next[l].dS, next[l].A, next[l].mask, dX, adds || l, workspace, stream);
    if (error) return error;
    error = plan.vectors ? grad_shrink_together(X, plan, next, dX, adds, room, stream)
                         : grad_shrink_alone(X, plan, *next, room, stream);
    if (error) return error;
    done += plan.layers;
  }
  return cudaSuccess;
}

}  // namespace fastlora::cuda
