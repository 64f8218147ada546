// The stages with the fused products: the base product and the low-rank term in one kernel.
//
// What csrc/cutlass does not take runs as in cuda_stages.cpp, and so does every other stage. The
// single stages `expand` and `grad_input` are fused wherever that is possible, the passes of layers
// only where the product's tiles fill the device: cuBLAS has other tiles for other sizes.

#include <torch/library.h>

#include <tuple>

#include "cuda.h"
#include "fastlora/fused.h"

namespace fastlora::fused {
namespace {

namespace kernels = cuda::fused;

// Whether a product with W takes the low-rank term of this factor along. What is wrong with any of
// them is said elsewhere.
bool takes(const Tensor& left, const Tensor& W, const Tensor& factor,
           const optional<Tensor>& mask = {}) {
  for (const Tensor& t : {left, W, factor})
    if (t.dim() != 2 || t.device() != left.device() || t.layout() != at::kStrided) return false;
  const at::ScalarType type = left.scalar_type(), of = factor.scalar_type();
  return (type == at::kBFloat16 || type == at::kHalf) && W.scalar_type() == type &&
         (of == type || of == at::kFloat) &&
         kernels::takes(matrix(left), matrix(W), matrix(factor),
                        mask && mask->scalar_type() == at::kByte ? data_of(mask) : nullptr);
}

// Whether a product of so many columns is worth it, too; `left` has two dimensions.
bool fills(const Tensor& left, int64_t columns) {
  return cuda::hopper::fills(left.size(0), columns, left.device().index());
}

Tensor expand(const Tensor& X, const Tensor& W, const optional<Tensor>& bias, const Tensor& S,
              const Tensor& B, at::IntArrayRef splits, const c10::List<bool>& enabled,
              int64_t interleave) {
  // all of the output is adapted, by one pair of factors
  const bool whole = splits.size() == 1 && enabled.size() == 1 && enabled[0];
  if (!whole || !takes(X, W, B))
    return stages::expand(X, W, bias, S, B, splits, enabled, interleave);
  check_blocks(splits, enabled, interleave);
  const Place at("expand", "X", X);
  const int64_t M = X.size(0), N = splits[0];
  at.check.operand("W", W, N, X.size(1));
  at.check.factor("B", B, N, B.size(1));
  at.check.sums("S", S, M, B.size(1));
  if (bias) at.check.bias(*bias, N);
  const cuda::Matrix b = bias ? matrix(bias->unsqueeze(0)) : cuda::Matrix{};
  const Tensor Y = at.empty({M, N}, X.scalar_type());
  at.run(kernels::expand_workspace(matrix(X), matrix(B), b),
         [&](void* workspace, cudaStream_t stream) {
           return kernels::expand(matrix(X), matrix(W), S.data_ptr<float>(), matrix(B), b,
                                  matrix(Y), workspace, stream);
         });
  return Y;
}

// As the passes have it.
Tensor expand_filling(const Tensor& X, const Tensor& W, const optional<Tensor>& bias,
                      const Tensor& S, const Tensor& B, at::IntArrayRef splits,
                      const c10::List<bool>& enabled, int64_t interleave) {
  stages::Expand& chosen = takes(X, W, B) && fills(X, W.size(0)) ? expand : stages::expand;
  return chosen(X, W, bias, S, B, splits, enabled, interleave);
}

Tensor grad_input(const Tensor& dY, const Tensor& W, const optional<Tensor>& dS, const Tensor& A,
                  const optional<Tensor>& mask) {
  if (!dS || !takes(dY, W, A, mask)) return stages::grad_input(dY, W, dS, A, mask);
  const Place at("grad_input", "dY", dY);
  const int64_t M = dY.size(0), K = A.size(1);
  at.check.operand("W", W, dY.size(1), K);
  at.check.sums("dS", *dS, M, A.size(0));
  at.check.factor("A", A, A.size(0), K);
  at.check.mask(mask, M, K);
  const Tensor dX = at.empty({M, K}, dY.scalar_type());
  at.run(kernels::grad_input_workspace(matrix(dY), matrix(A)),
         [&](void* workspace, cudaStream_t stream) {
           return kernels::grad_input(matrix(dY), matrix(W), dS->data_ptr<float>(), matrix(A),
                                      data_of(mask), matrix(dX), workspace, stream);
         });
  return dX;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& X, const Tensor& W,
                                           const optional<Tensor>& bias, const Tensor& A,
                                           const Tensor& B, double c, const optional<Tensor>& scale,
                                           int64_t t, const optional<Tensor>& seed,
                                           at::IntArrayRef splits, const c10::List<bool>& enabled,
                                           int64_t interleave) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const auto [S, mask] = stages::shrink(X, A, c, scale, t, seed);
  return {expand_filling(X, W, bias, S, B, splits, enabled, interleave), S, mask};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dY, const optional<Tensor>& X,
                                            const optional<Tensor>& W, const optional<Tensor>& A,
                                            const Tensor& B, const optional<Tensor>& S,
                                            const optional<Tensor>& mask, double c,
                                            const optional<Tensor>& scale, at::IntArrayRef splits,
                                            const c10::List<bool>& enabled, int64_t interleave,
                                            bool need_dX, bool need_dA, bool need_dB) {
  at::AutoDispatchBelowADInplaceOrView guard;
  if (!need_dX || !W || !A || (need_dA && !X) || !takes(dY, *W, *A, mask) || !fills(dY, W->size(1)))
    return stages::backward(dY, X, W, A, B, S, mask, c, scale, splits, enabled, interleave, need_dX,
                            need_dA, need_dB);
  const auto [dS, dB] =
      stages::grad_expand(dY, S, B, c, scale, splits, enabled, interleave, true, need_dB);
  const Tensor dA = need_dA ? stages::grad_shrink(dS, *X, mask, *A) : at::empty({0}, B.options());
  return {grad_input(dY, *W, dS, *A, mask), dA, dB};
}

}  // namespace

#if defined(FASTLORA_EMULATED)
TORCH_LIBRARY_IMPL(fastlora_emulated_cutlass, CPU, m) {
#else
TORCH_LIBRARY_IMPL(fastlora_cutlass, CUDA, m) {
#endif
  m.impl("forward", forward);
  m.impl("backward", backward);
  m.impl("multi_forward", stages::MultiForward{expand_filling});
  m.impl("multi_backward", stages::multi_backward);
  m.impl("shrink", stages::shrink);
  m.impl("expand", expand);
  m.impl("grad_expand", stages::grad_expand);
  m.impl("grad_shrink", stages::grad_shrink);
  m.impl("grad_input", grad_input);
  m.impl("delta", stages::delta);
}

}  // namespace fastlora::fused
