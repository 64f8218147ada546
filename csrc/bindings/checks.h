// What the operators of every device check of their tensors before anything is done.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/List.h>

#include <optional>
#include <vector>

namespace fastlora {

using at::Tensor;
using std::optional;

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Bytes in one row of the packed mask.
inline int64_t mask_bytes(int64_t K) { return round_up(K, 32) / 8; }

inline at::ScalarType accumulation_type(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check(bool fits, const char* name, const Tensor& t, at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(fits, name, ": got shape ", t.sizes(), ", expected ", expected);
}

// That the tensors of a call are on one device and fit each other.
class Checks {
 public:
  // of X or what takes its place, which the others are to fit
  Checks(const char* name, const Tensor& t, at::DeviceType kind)
      : device(t.device()), dtype(t.scalar_type()), wide(accumulation_type(t)) {
    TORCH_CHECK_VALUE(t.dim() == 2, name, ": got shape ", t.sizes(), ", expected two dimensions");
    TORCH_CHECK_VALUE(device.type() == kind, name, ": got device ", device, ", expected ", kind);
  }

  void matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) const {
    check(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name, t, {rows, cols});
    TORCH_CHECK_VALUE(t.device() == device, name, ": got device ", t.device(), ", expected ",
                      device);
  }

  void operand(const char* name, const Tensor& t, int64_t rows, int64_t cols) const {
    matrix(name, t, rows, cols);
    TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, ": got ", t.scalar_type(), ", expected ",
                     dtype);
  }

  void factor(const char* name, const Tensor& t, int64_t rows, int64_t cols) const {
    matrix(name, t, rows, cols);
    const bool fits =
        t.scalar_type() == dtype || (t.scalar_type() == at::kFloat && dtype != at::kDouble);
    TORCH_CHECK_TYPE(fits, name, ": got ", t.scalar_type(), ", expected ", dtype,
                     " or Float over 16 bits");
  }

  // what an earlier stage made: S or dS
  void sums(const char* name, const Tensor& t, int64_t rows, int64_t cols) const {
    matrix(name, t, rows, cols);
    contiguous(name, t, wide);
  }

  void mask(const optional<Tensor>& mask, int64_t M, int64_t K) const {
    if (!mask) return;
    matrix("mask", *mask, M, mask_bytes(K));
    contiguous("mask", *mask, at::kByte);
  }

  void bias(const Tensor& bias, int64_t N) const {
    check(bias.dim() == 1, "bias", bias, {N});
    operand("bias", bias.unsqueeze(0), 1, N);
  }

  void dropout(int64_t t, const optional<Tensor>& seed) const {
    TORCH_CHECK_VALUE(0 <= t && t <= 65536, "t: got ", t, ", expected 0 to 65536");
    if (!t) return;
    TORCH_CHECK_VALUE(seed && seed->numel() == 1 && seed->scalar_type() == at::kLong,
                      "seed: got none or no single Long, expected one where t > 0");
    TORCH_CHECK_VALUE(seed->device() == device, "seed: got device ", seed->device(), ", expected ",
                      device);
  }

  const at::Device device;
  const at::ScalarType dtype, wide;

 private:
  static void contiguous(const char* name, const Tensor& t, at::ScalarType expected) {
    TORCH_CHECK_VALUE(t.is_contiguous() && t.scalar_type() == expected, name, ": got ",
                      t.scalar_type(), " with strides ", t.strides(), ", expected contiguous ",
                      expected);
  }
};

inline void check_blocks(at::IntArrayRef splits, const c10::List<bool>& enabled,
                         int64_t interleave) {
  TORCH_CHECK_VALUE(splits.size() == enabled.size() && interleave > 0, "blocks: got ",
                    splits.size(), " sizes, ", enabled.size(),
                    " switches, interleave=", interleave);
  for (const int64_t n : splits)
    TORCH_CHECK_VALUE(n > 0 && n <= INT32_MAX && n % interleave == 0, "splits: got ", splits,
                      ", expected positive multiples of interleave=", interleave);
}

// ---- layers that share X ------------------------------------------------------------------------
//
// Lists have an element for each layer. One whose factors are of rank 0 is its base product alone.

using Tensors = std::vector<Tensor>;
using OptionalTensors = c10::List<optional<Tensor>>;

template <class... Lists>
void check_counts(size_t count, const Lists&... lists) {
  TORCH_CHECK_VALUE(count && ((lists.size() == count) && ...), "layers: got lists of ", count, ", ",
                    at::ArrayRef<size_t>({lists.size()...}),
                    " elements, expected as many in each as there are layers");
}

inline const Tensor& given(const char* name, const optional<Tensor>& t) {
  TORCH_CHECK_VALUE(t, name, ": got none, expected it for a gradient that is asked for");
  return *t;
}

// that of a layer with one output block
inline c10::List<bool> one_block() { return c10::List<bool>({true}); }

// Whether MKL's path for a sum of this shape is less accurate when it adds in place: up to 1.4
// times (rms), for so few rows or columns.
inline bool is_thin(const Tensor& sum) {
  return (sum.size(0) < 4 || sum.size(1) < 16) && sum.scalar_type() == accumulation_type(sum);
}

inline int64_t rank(const Tensor& B) { return B.size(1); }

// What takes the place of S, the mask and a gradient where there is none.
inline Tensor no_S(const Tensor& X) {
  return at::empty({X.size(0), 0}, X.options().dtype(accumulation_type(X)));
}
inline Tensor no_mask(const Tensor& X) {
  return at::empty({0, mask_bytes(X.size(1))}, X.options().dtype(at::kByte));
}
inline Tensor no_gradient(const optional<Tensor>& factor, bool needed, const Tensor& B) {
  return at::empty(needed && factor ? factor->sizes() : at::IntArrayRef{0}, B.options());
}

}  // namespace fastlora
