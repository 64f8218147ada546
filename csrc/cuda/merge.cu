// The rounded sum of a weight and its low-rank delta, and the correction between what a prediction
// gives and what was there.
#include <algorithm>

#include "fastlora/merge.h"
#include "fastlora/numbers.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// ---- round(base + delta) ------------------------------------------------------------------------

constexpr int kRows = 8;

// For a 16-bit result, to odd first: to 16 significant bits, more than it has by enough that no tie
// is made, and few enough that fp32 holds all that do not round to 0.
__device__ float before_narrowing(double x, Dtype dtype) {
  if (dtype == Dtype::f32) return float(x);
  constexpr uint64_t kLow = (uint64_t(1) << 37) - 1;
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits = (bits | ((bits & kLow) + kLow)) & ~kLow;
  memcpy(&x, &bits, sizeof bits);
  return float(x);
}

// A thread has a column of eight rows.
__global__ void add_low_rank_kernel(Matrix base, const double* left, const double* right, int64_t r,
                                    const double* row_scale, const double* column_scale, Matrix out,
                                    int64_t across) {
  const int64_t col = blockIdx.x % across * kThreads + threadIdx.x;
  const int64_t first = blockIdx.x / across * kRows;
  if (col >= out.cols) return;
  double sum[kRows] = {};
  for (int64_t i = 0; i < r; ++i) {
    const double of_right = right[i * out.cols + col];
#pragma unroll
    for (int j = 0; j < kRows; ++j)
      if (first + j < out.rows) sum[j] += left[(first + j) * r + i] * of_right;
  }
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const int64_t row = first + j;
    if (row >= out.rows) return;
    // undoing a merge depends on these roundings
    double delta = multiply_rounded(sum[j], row_scale[row]);
    if (column_scale) delta = multiply_rounded(delta, column_scale[col]);
    const float before = load(base.data, base.dtype, row * base.row_stride + col * base.col_stride);
    const double x = add_rounded(delta, before);
    store(out.data, out.dtype, row * out.cols + col, before_narrowing(x, out.dtype));
  }
}

// ---- distances ----------------------------------------------------------------------------------

// elements of a thread, whose codes are whole words
constexpr int kEach = kChunk / kThreads;
static_assert(kEach == 16);

template <class U>
using Signed = std::make_signed_t<U>;

// An involution between a float's bits and an integer that grows with the float.
template <class U>
__device__ U flip_negative(U bits) {
  const U negative = U(Signed<U>(bits) >> (8 * int(sizeof(U)) - 1));
  return U(bits ^ (negative & (U(-1) >> 1)));
}

// The place of a predicted value: of 0 for NaN and -0, whose bits arithmetic does not define.
template <class U>
__device__ U predicted_order(U bits, U infinity) {
  const U size = bits & (U(-1) >> 1);
  return U(size - 1) < infinity ? flip_negative(bits) : U(0);
}

template <class U>
__device__ U distance(const U* predicted, const U* exact, int64_t i, U infinity) {
  return U(flip_negative(exact[i]) - predicted_order(predicted[i], infinity));
}

// The largest distance that a code of so many bits holds.
__host__ __device__ constexpr int largest_distance(int bits) {
  return bits ? (1 << (bits - 1)) - 1 : 0;
}

template <class U>
__device__ bool is_outside(U distance, int bits) {
  const U largest = U(largest_distance(bits));
  return U(distance + largest) > U(2 * largest);
}

// Of all threads of a block, for its first one.
template <class V>
__device__ V block_sum(V value, V* of_warps) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) value += __shfl_xor_sync(~0u, value, mask);
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  V total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += of_warps[warp];
  return total;
}

template <class U>
__global__ void count_kernel(const U* predicted, const U* exact, U infinity, int64_t n,
                             int32_t* outside) {
  constexpr int kBits[] = {0, 2, 4, 8};
  const int64_t begin = blockIdx.x * kChunk, end = min(begin + kChunk, n);
  int counts[4] = {};
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const U d = distance(predicted, exact, i, infinity);
#pragma unroll
    for (int b = 0; b < 4; ++b) counts[b] += is_outside(d, kBits[b]);
  }
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    const int total = block_sum(counts[b], shared_memory<int>());
    if (threadIdx.x == 0) outside[blockIdx.x * 4 + b] = total;
  }
}

template <class U>
__global__ void encode_kernel(const U* predicted, const U* exact, U infinity, int64_t n, int bits,
                              const int64_t* first, uint8_t* codes, int32_t* escaped, U* values) {
  const int64_t begin = (blockIdx.x * int64_t(kThreads) + threadIdx.x) * kEach;
  const int64_t end = min(begin + kEach, n);
  const U largest = U(largest_distance(bits)), top = U(2 * largest + 1);
  int escapes = 0;
  uint64_t low = 0, high = 0;
  for (int64_t i = begin; i < end; ++i) {
    const U code = U(distance(predicted, exact, i, infinity) + largest);
    escapes += code >= top;
    const int at = int(i - begin) * bits;
    (at < 64 ? low : high) |= uint64_t(code < top ? code : top) << at % 64;
  }
  if (bits)
    for (int64_t i = begin; i < end; i += 8 / bits) {
      const int at = int(i - begin) * bits;
      codes[i * bits / 8] = uint8_t((at < 64 ? low : high) >> at % 64);
    }

  // the escapes before those of this thread
  int* counts = shared_memory<int>();
  counts[threadIdx.x] = escapes;
  for (int step = 1; step < kThreads; step *= 2) {
    __syncthreads();
    const int before = int(threadIdx.x) >= step ? counts[threadIdx.x - step] : 0;
    __syncthreads();
    counts[threadIdx.x] += before;
  }
  if (!escapes) return;
  int64_t place = first[blockIdx.x] + counts[threadIdx.x] - escapes;
  for (int64_t i = begin; i < end; ++i) {
    const U d = distance(predicted, exact, i, infinity);
    if (!is_outside(d, bits)) continue;
    escaped[place] = int32_t(i);
    values[place++] = d;
  }
}

template <class U>
__global__ void decode_kernel(const U* predicted, U infinity, int64_t n, int bits,
                              const uint8_t* codes, U* out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const int code = bits ? codes[i * bits / 8] >> i * bits % 8 & ((1 << bits) - 1) : 0;
  const U order = predicted_order(predicted[i], infinity);
  out[i] = flip_negative(U(order + code - largest_distance(bits)));
}

template <class U>
__global__ void escape_kernel(const U* predicted, U infinity, int64_t n, const int32_t* escaped,
                              const U* values, int64_t escapes, U* out) {
  const int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= escapes) return;
  const int64_t i = escaped[e];
  if (i >= 0 && i < n)
    out[i] = flip_negative(U(predicted_order(predicted[i], infinity) + values[e]));
}

// ---- checksum -----------------------------------------------------------------------------------

constexpr int kMostParts = 1024;

template <class U>
__global__ void checksum_kernel(const U* data, int64_t n, int64_t* parts) {
  uint64_t sum = 0;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step)
    sum += uint64_t(int64_t(Signed<U>(data[i]))) * uint64_t(2 * i + 1);
  const uint64_t total = block_sum(sum, shared_memory<uint64_t>());
  if (threadIdx.x == 0) parts[blockIdx.x] = int64_t(total);
}

// f with infinity's bits, of the unsigned type that has as many
template <class F>
cudaError_t with_bits(Dtype dtype, const F& f) {
  if (dtype == Dtype::f32) return f(uint32_t(0x7F800000));
  return f(uint16_t(dtype == Dtype::bf16 ? 0x7F80 : 0x7C00));
}

dim3 blocks_for(int64_t n) { return dim3(unsigned(blocks_of(n, kThreads))); }
dim3 chunks_for(int64_t n) { return dim3(unsigned(blocks_of(n, kChunk))); }

}  // namespace

cudaError_t add_low_rank(const Matrix& base, const double* left, const double* right, int64_t r,
                         const double* row_scale, const double* column_scale, const Matrix& out,
                         cudaStream_t stream) {
  const int64_t across = blocks_of(out.cols, kThreads);
  const dim3 grid(unsigned(across * blocks_of(out.rows, kRows)));
  return launch(add_low_rank_kernel, grid, kThreads, 0, stream, base, left, right, r, row_scale,
                column_scale, out, across);
}

cudaError_t count_distances(const void* predicted, const void* exact, Dtype dtype, int64_t n,
                            int32_t* outside, cudaStream_t stream) {
  return with_bits(dtype, [&](auto infinity) {
    using U = decltype(infinity);
    return launch(count_kernel<U>, chunks_for(n), kThreads, kWarps * sizeof(int), stream,
                  static_cast<const U*>(predicted), static_cast<const U*>(exact), infinity, n,
                  outside);
  });
}

cudaError_t encode_correction(const void* predicted, const void* exact, Dtype dtype, int64_t n,
                              int bits, const int64_t* first, uint8_t* codes, int32_t* escaped,
                              void* values, cudaStream_t stream) {
  return with_bits(dtype, [&](auto infinity) {
    using U = decltype(infinity);
    return launch(encode_kernel<U>, chunks_for(n), kThreads, kThreads * sizeof(int), stream,
                  static_cast<const U*>(predicted), static_cast<const U*>(exact), infinity, n, bits,
                  first, codes, escaped, static_cast<U*>(values));
  });
}

cudaError_t decode_correction(const void* predicted, Dtype dtype, int64_t n, int bits,
                              const uint8_t* codes, const int32_t* escaped, const void* values,
                              int64_t escapes, void* out, cudaStream_t stream) {
  return with_bits(dtype, [&](auto infinity) {
    using U = decltype(infinity);
    const U* from = static_cast<const U*>(predicted);
    const cudaError_t error = launch(decode_kernel<U>, blocks_for(n), kThreads, 0, stream, from,
                                     infinity, n, bits, codes, static_cast<U*>(out));
    if (error) return error;
    return launch(escape_kernel<U>, blocks_for(escapes), kThreads, 0, stream, from, infinity, n,
                  escaped, static_cast<const U*>(values), escapes, static_cast<U*>(out));
  });
}

int checksum_parts(int64_t n) { return int(std::min<int64_t>(blocks_of(n, kChunk), kMostParts)); }

cudaError_t checksum(const void* data, Dtype dtype, int64_t n, int64_t* parts,
                     cudaStream_t stream) {
  return with_bits(dtype, [&](auto infinity) {
    using U = decltype(infinity);
    return launch(checksum_kernel<U>, dim3(checksum_parts(n)), kThreads, kWarps * sizeof(uint64_t),
                  stream, static_cast<const U*>(data), n, parts);
  });
}

}  // namespace fastlora::cuda
