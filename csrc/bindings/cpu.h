// Tensors as csrc/cpu takes them, and which of its builds runs.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "checks.h"
#include "cpu/kernels.h"

namespace fastlora::cpu {

// elements of a factor that a thread is woken for
constexpr int64_t kFactorElements = 1 << 16;
// elements every row of a Packed that is read as vectors is padded to
constexpr int64_t kPadding = 16;

// the widest build that torch, too, would use here (ATEN_CPU_CAPABILITY lowers both)
const Kernels& kernels();

inline Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return Dtype::f32;
    case at::kDouble:
      return Dtype::f64;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      TORCH_CHECK_TYPE(false, "dtype: got ", type, ", expected a floating-point type");
  }
}

inline const Stages& stages_for(const Tensor& t) { return kernels().of(dtype_of(t.scalar_type())); }

// rows [row, row + rows) and columns [column, column + cols) of t
inline Matrix block_of(const Tensor& t, int64_t row, int64_t rows, int64_t column, int64_t cols) {
  const int64_t offset = row * t.stride(0) + column * t.stride(1);
  return {static_cast<char*>(t.data_ptr()) + offset * t.element_size(),
          dtype_of(t.scalar_type()),
          rows,
          cols,
          t.stride(0),
          t.stride(1)};
}

inline Matrix matrix(const Tensor& t) { return block_of(t, 0, t.size(0), 0, t.size(1)); }

// the columns from `column` on of part `part` of a contiguous tensor
inline Packed packed(const Tensor& t, int64_t column = 0, int64_t part = 0) {
  const int64_t offset = (t.dim() > 2 ? part * t.stride(0) : part) + column;
  return {static_cast<char*>(t.data_ptr()) + offset * t.element_size(), t.size(-1)};
}

// out += P Q, where Q is a frozen weight or its transpose
void add_base_product(Tensor& out, const Tensor& P, const Tensor& Q);

// whether that is computed by csrc/cpu where it can, else by torch's BLAS
bool own_base_products();
void set_own_base_products(bool chosen);

// f(begin, end) over rows of `cols` elements
template <class F>
void for_factor_rows(int64_t rows, int64_t cols, const F& f) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kFactorElements / std::max<int64_t>(1, cols)), f);
}

// The factor as (rows, padded cols), widened: itself where it is that already.
inline Tensor pack_rows(const Tensor& factor, at::ScalarType wide, int64_t padding = 0) {
  const int64_t rows = factor.size(0), cols = factor.size(1);
  const int64_t stride = round_up(cols, kPadding) + padding;
  if (factor.scalar_type() == wide && factor.is_contiguous() && stride == cols) return factor;
  const auto options = factor.options().dtype(wide);
  Tensor out =
      stride == cols ? at::empty({rows, stride}, options) : at::zeros({rows, stride}, options);
  for_factor_rows(rows, cols, [&](int64_t begin, int64_t end) {
    stages_for(factor).pack(matrix(factor), false, packed(out), begin, end);
  });
  return out;
}

}  // namespace fastlora::cpu
