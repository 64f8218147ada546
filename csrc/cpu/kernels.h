// The stages of a LoRA linear layer on a CPU: what csrc/bindings calls. No torch header here or
// below.
//
// Every function works on a range of rows, so that the caller decides about threads. Sizes as in
// docs/math.md: M tokens, K in_features, N out_features, r rank, R = G * r.
#pragma once

#include <cstdint>

namespace fastlora::cpu {

enum class Dtype { f32, f64, bf16, f16 };

// A 2-D operand; strides in elements, any sign of order, 0 for an expanded dimension.
struct Matrix {
  void* data;
  Dtype dtype;
  int64_t rows, cols;
  int64_t row_stride, col_stride;
};

// Packed keep mask, bit b of byte j of a row for element 8j + b; no data: everything is kept.
struct Mask {
  uint8_t* data = nullptr;
  int64_t row_bytes = 0;
  uint8_t* row(int64_t i) const { return data ? data + i * row_bytes : nullptr; }
};

// Columns [column, column + width) of Y, adapted by block g and rows [row, row + width) of B, which
// lie in columns [packed, packed + width) of a packed Bᵀ. In order of their columns.
struct Span {
  int64_t g, column, width, row, packed;
};

struct Spans {
  int64_t groups;
  const Span* data;
  int64_t count;
  const Span* begin() const { return data; }
  const Span* end() const { return data + count; }
};

// A factor, S, or a sum over rows, in the dtype sums are kept in: f64 for f64, else f32. Rows lie
// `stride` elements apart. Where a row is read as vectors it is padded with zeros to whole vectors.
struct Packed {
  void* data;
  int64_t stride;
};

// The terms that a base product adds at a time: those of a few rows of P stay in the first-level
// cache, those of kBaseColumns columns of Q in the second.
constexpr int64_t kBaseTerms = 256, kBaseColumns = 512;

// Widths of the codes that a correction of a merged weight may have.
constexpr int kCodeBits[] = {0, 2, 4, 8};

// The stages for one dtype of X.
struct Stages {
  // out = factor, or its transpose; [begin, end): rows of the factor
  void (*pack)(const Matrix& factor, bool transpose, Packed out, int64_t begin, int64_t end);

  // S = c (m∘X) Aᵀ, drawing m where t > 0; At: (K, R), mask: written
  void (*shrink)(const Matrix& X, Packed At, double c, uint32_t t, uint64_t seed, Mask mask,
                 Packed S, int64_t R, int64_t begin, int64_t end);

  // Y = bias + S_g B_gᵀ on the adapted columns, bias or 0 elsewhere; Bt: (r, n), bias: (1, N)
  void (*expand)(Packed S, int64_t r, Packed Bt, const Packed* bias, Spans spans, const Matrix& Y,
                 int64_t begin, int64_t end);

  // dS = c dY_g B_g and dBt = (dY_gᵀ S_g)ᵀ over these rows, either left out where its data is
  // null; B: (n, r)
  void (*grad_expand)(const Matrix& dY, Packed S, int64_t r, Packed B, double c, Spans spans,
                      Packed dS, Packed dBt, int64_t begin, int64_t end);

  // dA = dSᵀ (m∘X) over these rows
  void (*grad_shrink)(Packed dS, int64_t R, const Matrix& X, Mask mask, Packed dA, int64_t begin,
                      int64_t end);

  // dX = m∘(dS A), or dX += that where `add` is set; the product with W is the caller's; A: (R, K)
  void (*grad_input)(Packed dS, int64_t R, Packed A, Mask mask, bool add, const Matrix& dX,
                     int64_t begin, int64_t end);

  // out += P Q; buffer: min(Q.rows, kBaseTerms) times its columns, rounded up to two vectors, of
  // elements. Null for 16-bit dtypes.
  void (*add_base_product)(const Matrix& P, const Matrix& Q, const Matrix& out, void* buffer);

  // out = sum of `count` parts that lie `distance` elements apart, or of their transposes;
  // [begin, end): rows of out
  void (*add_parts)(Packed parts, int64_t count, int64_t distance, bool transpose,
                    const Matrix& out, int64_t begin, int64_t end);

  // dW = scaling B_g A_g for the rows of one span of the output; B: (n, r), A: (r, K)
  void (*delta)(Packed B, int64_t r, Packed A, double scaling, const Matrix& dW, int64_t begin,
                int64_t end);

  // out = base + row_scale (left right) column_scale in f64, rounded once; left: (rows, r), right:
  // (r, cols), column_scale: as right, or null for 1
  void (*add_low_rank)(const Matrix& base, Packed left, int64_t r, Packed right,
                       const double* row_scale, const double* column_scale, const Matrix& out,
                       int64_t begin, int64_t end);

  // outside[b] += how many distances from predicted to exact a code of kCodeBits[b] cannot hold;
  // here and in the next two, begin is a multiple of 8
  void (*count_distances)(const void* predicted, const void* exact, int64_t begin, int64_t end,
                          int64_t* outside);

  // codes of the distances, and from `escaped` and `values` on those that no code holds
  void (*encode_correction)(const void* predicted, const void* exact, int64_t begin, int64_t end,
                            int bits, uint8_t* codes, int32_t* escaped, void* values);

  // out = predicted moved by its distances; escapes outside [begin, end) are ignored
  void (*decode_correction)(const void* predicted, int64_t begin, int64_t end, int bits,
                            const uint8_t* codes, const int32_t* escaped, const void* values,
                            int64_t escapes, void* out);

  // the sum of the bits of elements [begin, end), as signed integers, each times its place: 2i + 1
  int64_t (*checksum)(const void* data, int64_t begin, int64_t end);
};

// One build of the stages, for one instruction set.
struct Kernels {
  const char* name;
  int vector_bytes;
  Stages f32, f64, bf16, f16;

  const Stages& of(Dtype dtype) const {
    switch (dtype) {
      case Dtype::f64:
        return f64;
      case Dtype::bf16:
        return bf16;
      case Dtype::f16:
        return f16;
      default:
        return f32;
    }
  }
};

extern const Kernels baseline;
#if defined(__x86_64__)
extern const Kernels avx2;
extern const Kernels avx512;
#endif

}  // namespace fastlora::cpu
