// out = c left right + bias: tiles in shared memory, 4 x 4 elements of the product a thread.
#include <algorithm>

#include "fastlora/dropout.cuh"
#include "fastlora/numbers.cuh"
#include "fastlora/product.cuh"
#include "fastlora/reduce.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kDepth = 16, kEach = 4;

__device__ int64_t place(const View& m, int64_t row, int64_t col) {
  const int64_t column =
      m.period ? int64_t(int(col) / m.width) * m.period + int(col) % m.width : col;
  return row * m.row_stride + column * m.col_stride;
}

__device__ bool kept(const View& m, int64_t row, int64_t col) {
  return !m.mask || m.mask[row * m.row_bytes + col / 8] >> col % 8 & 1;
}

// Fills a tile; neighbouring threads read along the dimension whose elements lie closer.
template <class T, int Rows, int Cols, int Threads, bool RowsAreInner>
__device__ void fill_from(float* tile, const View& m, int64_t row, int64_t col, int64_t rows,
                          int64_t cols) {
  const bool down = m.row_stride < m.col_stride;
#pragma unroll 4
  for (int e = threadIdx.x; e < Rows * Cols; e += Threads) {
    const int i = down ? e % Rows : e / Cols, j = down ? e / Rows : e % Cols;
    const bool exists = row + i < rows && col + j < cols && kept(m, row + i, col + j);
    const float x = exists ? float(static_cast<const T*>(m.data)[place(m, row + i, col + j)]) : 0;
    tile[RowsAreInner ? j * (Rows + kEach) + i : i * (Cols + kEach) + j] = x;
  }
}

template <int Rows, int Cols, int Threads, bool RowsAreInner>
__device__ void fill(float* tile, const View& m, int64_t row, int64_t col, int64_t rows,
                     int64_t cols) {
  if (m.dtype == Dtype::f32)
    fill_from<float, Rows, Cols, Threads, RowsAreInner>(tile, m, row, col, rows, cols);
  else if (m.dtype == Dtype::bf16)
    fill_from<__nv_bfloat16, Rows, Cols, Threads, RowsAreInner>(tile, m, row, col, rows, cols);
  else
    fill_from<__half, Rows, Cols, Threads, RowsAreInner>(tile, m, row, col, rows, cols);
}

template <int BlockM, int BlockN>
__global__ void __launch_bounds__(BlockM* BlockN / (kEach * kEach), 1)
    product_kernel(int64_t M, int64_t N, int64_t L, int64_t chunk, View left, View right, View bias,
                   Factor c, View out, int64_t distance) {
  constexpr int kThreads = BlockM * BlockN / (kEach * kEach), kAcross = BlockN / kEach;
  float* of_left = shared_memory<float>();
  float* of_right = of_left + kDepth * (BlockM + kEach);
  const unsigned tiles_n = unsigned(blocks_of(N, BlockN));
  const int64_t m = int64_t(blockIdx.x / tiles_n) * BlockM, n = blockIdx.x % tiles_n * BlockN;
  const int i = threadIdx.x / kAcross * kEach, j = threadIdx.x % kAcross * kEach;
  const int64_t begin = blockIdx.y * chunk, end = begin + chunk < L ? begin + chunk : L;
  float sum[kEach][kEach] = {};
  for (int64_t l = begin; l < end; l += kDepth) {
    fill<BlockM, kDepth, kThreads, true>(of_left, left, m, l, M, end);
    fill<kDepth, BlockN, kThreads, false>(of_right, right, l, n, end, N);
    __syncthreads();
    // a sum of short sums: more accurate than one long one
    float part[kEach][kEach] = {};
#pragma unroll
    for (int k = 0; k < kDepth; ++k)
#pragma unroll
      for (int a = 0; a < kEach; ++a)
#pragma unroll
        for (int b = 0; b < kEach; ++b)
          part[a][b] = fmaf(of_left[k * (BlockM + kEach) + i + a],
                            of_right[k * (BlockN + kEach) + j + b], part[a][b]);
#pragma unroll
    for (int a = 0; a < kEach; ++a)
#pragma unroll
      for (int b = 0; b < kEach; ++b) sum[a][b] += part[a][b];
    __syncthreads();
  }
  // through shared memory, for neighbouring threads to write neighbours
  float* sums = shared_memory<float>();
#pragma unroll
  for (int a = 0; a < kEach; ++a)
#pragma unroll
    for (int b = 0; b < kEach; ++b) sums[(i + a) * (BlockN + 1) + j + b] = sum[a][b];
  __syncthreads();
  const float scale = value(c);
  const bool down = out.row_stride < out.col_stride;
#pragma unroll 1
  for (int e = threadIdx.x; e < BlockM * BlockN; e += kThreads) {
    const int a = down ? e % BlockM : e / BlockN, b = down ? e / BlockM : e % BlockN;
    const int64_t row = m + a, col = n + b;
    if (row >= M || col >= N) continue;
    float x = scale * sums[a * (BlockN + 1) + b];
    if (bias.data) x += load(bias.data, bias.dtype, place(bias, 0, col));
    const int64_t at = blockIdx.y * distance + place(out, row, col);
    x = kept(out, row, col) ? x : 0;
    store(out.data, out.dtype, at, out.adds ? load(out.data, out.dtype, at) + x : x);
  }
}

struct Tile {
  int m, n;
};

Tile tile_for(int64_t M, int64_t N) {
  return M <= 16 ? Tile{16, 128} : N <= 16 ? Tile{128, 16} : Tile{64, 64};
}

cudaError_t start(int64_t M, int64_t N, int64_t L, int64_t chunk, int parts, View left, View right,
                  View bias, Factor c, View out, int64_t distance, cudaStream_t stream) {
  const Tile tile = tile_for(M, N);
  const auto kernel = tile.m == 16   ? product_kernel<16, 128>
                      : tile.n == 16 ? product_kernel<128, 16>
                                     : product_kernel<64, 64>;
  const dim3 grid(unsigned(blocks_of(M, tile.m) * blocks_of(N, tile.n)), parts);
  const int floats = std::max(kDepth * (tile.m + tile.n + 2 * kEach), tile.m * (tile.n + 1));
  return launch(kernel, grid, tile.m * tile.n / (kEach * kEach), floats * sizeof(float), stream, M,
                N, L, chunk, left, right, bias, c, out, distance);
}

Chunks chunks_of(int64_t M, int64_t N, int64_t L) {
  const Tile tile = tile_for(M, N);
  return Chunks(L, kDepth, blocks_of(M, tile.m) * blocks_of(N, tile.n));
}

__global__ void draw_kernel(int64_t bytes, int64_t row_bytes, int64_t K, uint32_t t,
                            const int64_t* seed, uint8_t* mask) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= bytes) return;
  const int64_t inside = K - i % row_bytes * 8;
  const uint32_t bits = inside >= 8 ? 0xFF : inside > 0 ? (1 << inside) - 1 : 0;
  const Dropped dropped = draw(uint64_t(i), halves(uint64_t(*seed)), limit_of(t));
  mask[i] = uint8_t(byte_of(dropped) & bits);
}

}  // namespace

Matrix part(const Matrix& m, int64_t row, int64_t col, int64_t rows, int64_t cols) {
  const int64_t skipped =
      (row * m.row_stride + col * m.col_stride) * (m.dtype == Dtype::f32 ? 4 : 2);
  void* data = m.data ? static_cast<char*>(m.data) + skipped : nullptr;
  return {data, m.dtype, rows, cols, m.row_stride, m.col_stride};
}

View view(const Matrix& m) { return {m.data, m.dtype, m.row_stride, m.col_stride}; }

View transposed(const Matrix& m) { return {m.data, m.dtype, m.col_stride, m.row_stride}; }

View contiguous(const float* data, int64_t cols) {
  return {const_cast<float*>(data), Dtype::f32, cols, 1};
}

View transposed(const float* data, int64_t cols) {
  return {const_cast<float*>(data), Dtype::f32, 1, cols};
}

View masked(View m, const uint8_t* mask, int64_t K) {
  m.mask = mask;
  m.row_bytes = mask_bytes(K);
  return m;
}

View added(View m, bool adds) {
  m.adds = adds;
  return m;
}

View columns(const Matrix& m, const Block& block, const Layout& layout) {
  View v = view(part(m, 0, block.offset, m.rows, block.width));
  v.width = block.width;
  v.period = layout.repeats > 1 ? layout.period : 0;
  return v;
}

cudaError_t product(int64_t M, int64_t N, int64_t L, View left, View right, View bias, Factor c,
                    View out, cudaStream_t stream) {
  return start(M, N, L, L, 1, left, right, bias, c, out, 0, stream);
}

int product_parts(int64_t M, int64_t N, int64_t L) { return chunks_of(M, N, L).count; }

cudaError_t product_in_parts(int64_t M, int64_t N, int64_t L, View left, View right, Factor c,
                             View out, void* workspace, cudaStream_t stream) {
  const Chunks chunks = chunks_of(M, N, L);
  if (chunks.count < 2) return product(M, N, L, left, right, {}, c, out, stream);
  float* parts = static_cast<float*>(workspace);
  const cudaError_t error = start(M, N, L, chunks.rows, chunks.count, left, right, {}, {},
                                  contiguous(parts, N), M * N, stream);
  if (error) return error;
  const Matrix all = {out.data, out.dtype, M, N, out.row_stride, out.col_stride};
  const Sum sum = {parts, chunks.count, M * N, c, all};
  return sum_parts(&sum, 1, stream);
}

cudaError_t draw_mask(int64_t M, int64_t K, uint32_t t, const int64_t* seed, uint8_t* mask,
                      cudaStream_t stream) {
  const int64_t row_bytes = mask_bytes(K);
  return launch(draw_kernel, dim3(unsigned(blocks_of(M * row_bytes, 256))), 256, 0, stream,
                M * row_bytes, row_bytes, K, t, seed, mask);
}

}  // namespace fastlora::cuda
