// What merging checks and decides on every device.
#pragma once

#include <array>
#include <iterator>

#include "checks.h"

namespace fastlora {

// how many bits a code of a correction may have
constexpr int kWidths[] = {0, 2, 4, 8};
// of each width, how many distances there are to list, as no code holds them
using Outside = std::array<int64_t, std::size(kWidths)>;

inline at::ScalarType integer_type(const Tensor& t) {
  return t.element_size() == 2 ? at::kShort : t.element_size() == 4 ? at::kInt : at::kLong;
}

inline int64_t code_bytes(int64_t n, int64_t bits) { return (n * bits + 7) / 8; }

// The index of the width that takes the fewest bytes, or -1 where the values themselves take no
// more.
inline int best_width(const Outside& outside, const Tensor& exact) {
  int best = -1;
  int64_t least = exact.numel() * exact.element_size();
  for (size_t b = 0; b < outside.size(); ++b) {
    const int64_t size =
        exact.numel() * kWidths[b] / 8 + outside[b] * (4 + int64_t(exact.element_size()));
    if (size < least) best = int(b), least = size;
  }
  return best;
}

inline void check_low_rank(const Checks& check, const Tensor& base, const Tensor& left,
                           const Tensor& right, const Tensor& row_scale,
                           const optional<Tensor>& column_scale) {
  const int64_t n = base.size(0), k = base.size(1);
  check.matrix("left", left, n, left.size(-1));
  check.matrix("right", right, left.size(-1), k);
  check.matrix("row_scale", row_scale, n, 1);
  if (column_scale) check.matrix("column_scale", *column_scale, 1, k);
  for (const Tensor* t : {&left, &right, &row_scale, column_scale ? &*column_scale : &right})
    TORCH_CHECK_TYPE(t->scalar_type() == at::kDouble, "factors and scales: got dtype ",
                     t->scalar_type(), ", expected float64");
}

inline void check_pair(const Tensor& predicted, const Tensor& exact) {
  check(predicted.sizes() == exact.sizes() && predicted.scalar_type() == exact.scalar_type() &&
            predicted.device() == exact.device(),
        "predicted", predicted, exact.sizes());
  TORCH_CHECK_VALUE(exact.numel() <= INT32_MAX, "exact: got ", exact.numel(),
                    " elements, expected at most ", INT32_MAX);
}

inline void check_correction(const Tensor& predicted, int64_t bits, const Tensor& codes,
                             const Tensor& escaped, const Tensor& values) {
  const int64_t bytes = code_bytes(predicted.numel(), bits), escapes = escaped.numel();
  TORCH_CHECK_VALUE(bits == 0 || bits == 2 || bits == 4 || bits == 8, "bits: got ", bits,
                    ", expected 0, 2, 4 or 8");
  check(codes.numel() == bytes, "codes", codes, {bytes});
  check(values.numel() == escapes, "values", values, {escapes});
  TORCH_CHECK_TYPE(values.scalar_type() == integer_type(predicted), "values: got dtype ",
                   values.scalar_type(), ", expected ", integer_type(predicted));
  for (const auto& [name, t] :
       {std::pair("codes", &codes), std::pair("escaped", &escaped), std::pair("values", &values)})
    TORCH_CHECK_VALUE(t->device() == predicted.device(), name, ": got device ", t->device(),
                      ", expected ", predicted.device());
}

}  // namespace fastlora
