// Merging on an NVIDIA GPU, as fastlora/backends/reference_merge.py documents it; as stages.h says
// of pointers and streams. Values to be corrected are contiguous.
#pragma once

#include "stages.h"

namespace fastlora::cuda {

// out = round(base + (left right) * row_scale * column_scale), out: (n, k), contiguous.
// left: (n, r), right: (r, k), contiguous; column_scale may be null.
cudaError_t add_low_rank(const Matrix& base, const double* left, const double* right, int64_t r,
                         const double* row_scale, const double* column_scale, const Matrix& out,
                         cudaStream_t stream);

// elements that are counted together
constexpr int64_t kChunk = 4096;

// outside: (chunks, 4), of each chunk how many distances a code of 0, 2, 4 and 8 bits cannot hold.
cudaError_t count_distances(const void* predicted, const void* exact, Dtype dtype, int64_t n,
                            int32_t* outside, cudaStream_t stream);

// first: of each chunk, the place of its first escape in `escaped` and `values`.
cudaError_t encode_correction(const void* predicted, const void* exact, Dtype dtype, int64_t n,
                              int bits, const int64_t* first, uint8_t* codes, int32_t* escaped,
                              void* values, cudaStream_t stream);

cudaError_t decode_correction(const void* predicted, Dtype dtype, int64_t n, int bits,
                              const uint8_t* codes, const int32_t* escaped, const void* values,
                              int64_t escapes, void* out, cudaStream_t stream);

// Sums of the bits of all elements, each times its place, 2i + 1; in parts, of which there are so
// many.
int checksum_parts(int64_t n);
cudaError_t checksum(const void* data, Dtype dtype, int64_t n, int64_t* parts, cudaStream_t stream);

}  // namespace fastlora::cuda
