// The stages of a LoRA linear layer on an NVIDIA GPU: what bindings call. No torch header here or
// below.
//
// Sizes as in docs/math.md: M tokens, K in_features, N out_features, r rank, G adapted blocks,
// R = G * r. All pointers are to memory of the current device. A stage enqueues its work on
// `stream`, allocates nothing and waits for nothing; where it needs room, for sums that are added
// up in order, say, the caller brings as many bytes as its `..._workspace` says. Any strides and
// sizes are right; rows of 16-bit elements that are contiguous, multiples of 8 long and aligned to
// 16 bytes are fast, under factors of the same dtype, and those of bfloat16 under float32, too.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace fastlora::cuda {

enum class Dtype { f32, bf16, f16 };

// A 2-D operand; strides in elements, 0 for an expanded dimension.
struct Matrix {
  void* data;
  Dtype dtype;
  int64_t rows, cols;
  int64_t row_stride, col_stride;
};

// The number c, times a number on the device where there is one.
struct Factor {
  float c = 1;
  const float* scale = nullptr;
};

// A block of the output: its offset and width in one repeat of the pattern, its first row of B, and
// which of the adapted blocks it is; -1 twice where it is not adapted.
struct Block {
  int offset, width, row, group;
};

// Blocks that make up a pattern of `period` output features, which repeats; in the order of their
// groups.
struct Layout {
  const Block* blocks;
  int count;
  int period, repeats;
};

// S = c (m∘X) Aᵀ, drawing m where t > 0; of layers that share X, in as few reads of it as their
// ranks allow.
// X: (M, K), A: (R, K), seed: 64 bits, mask: (M, 4 * ceil(K / 32)) bytes, aligned to 4 and written,
// S: (M, R), contiguous. R may be 0.
struct ShrinkLayer {
  Matrix A;
  Factor c;
  uint32_t t;
  const int64_t* seed;
  uint8_t* mask;
  float* S;
};
size_t shrink_workspace(const Matrix& X, const ShrinkLayer* layers, int count);
cudaError_t shrink(const Matrix& X, const ShrinkLayer* layers, int count, void* workspace,
                   cudaStream_t stream);

// Y = S_g B_gᵀ + bias on the features of adapted block g, bias or 0 on the others; the product with
// W is the caller's.
// S: (M, R), contiguous, B: (adapted features, r), bias: (1, N) or without data, Y: (M, N).
size_t expand_workspace(const Matrix& B, const Matrix& Y);
cudaError_t expand(const float* S, const Matrix& B, const Matrix& bias, const Layout& layout,
                   const Matrix& Y, void* workspace, cudaStream_t stream);

// dS = c dY_g B_g and dB_g = dY_gᵀ S_g, from one read of dY; either is left out where it is null or
// without data.
// dY: (M, N), S and dS: (M, R), contiguous, B and dB: (adapted features, r).
size_t grad_expand_workspace(const Matrix& dY, const Matrix& B, const Layout& layout);
cudaError_t grad_expand(const Matrix& dY, const float* S, const Matrix& B, Factor c,
                        const Layout& layout, float* dS, const Matrix& dB, void* workspace,
                        cudaStream_t stream);

// dA = dSᵀ (m∘X) of each layer and, where it has data, dX = Σ m∘(dS A), from as few reads of X and
// the masks as the ranks allow; the product of dY and W is the caller's.
// dS: (M, R), contiguous, X and dX: (M, K), mask: as shrink wrote it or null, A and dA: (R, K).
struct GradShrinkLayer {
  const float* dS;
  const uint8_t* mask;
  Matrix A, dA;
};
size_t grad_shrink_workspace(const Matrix& X, const GradShrinkLayer* layers, int count,
                             const Matrix& dX);
cudaError_t grad_shrink(const Matrix& X, const GradShrinkLayer* layers, int count, const Matrix& dX,
                        void* workspace, cudaStream_t stream);

// dX = m∘(dS A) alone; what dX was is added where it `adds`.
size_t grad_input_workspace(const Matrix& A, const Matrix& dX);
cudaError_t grad_input(const float* dS, const Matrix& A, const uint8_t* mask, const Matrix& dX,
                       bool adds, void* workspace, cudaStream_t stream);

// dW = c B_g A_g on the rows of adapted block g, 0 on the others.
// A: (R, K), B: (adapted features, r), dW: (N, K).
size_t delta_workspace(const Matrix& A, const Matrix& dW);
cudaError_t delta(const Matrix& A, const Matrix& B, Factor c, const Layout& layout,
                  const Matrix& dW, void* workspace, cudaStream_t stream);

// Makes a device the current one of this thread. The runtime is linked statically, so it is to be
// told even where another copy of it was.
cudaError_t set_device(int index);

// What a launch on the current device would fail with, if anything: there is none, say, or one that
// the kernels were not built for.
cudaError_t obstacle();

const char* describe(cudaError_t error);

}  // namespace fastlora::cuda
