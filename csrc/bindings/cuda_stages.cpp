// The stages on CUDA tensors, as operators.
//
// csrc/cuda enqueues work and allocates nothing; here the device, its current stream, buffers from
// torch's allocator and the base products are added.

#include <torch/library.h>

#include <tuple>
#include <vector>

#include "cuda.h"

namespace fastlora::stages {
namespace {

// dX += dY W
Tensor add_product(Tensor dX, const Tensor& dY, const Tensor& W) {
  // of nothing, for which ATen would read and write all of dX
  if (!dY.size(1)) return dX;
#if defined(FASTLORA_EMULATED)
  if (is_thin(dX)) return dX.add_(dY.mm(W));
#endif
  return dX.addmm_(dY, W);
}

// c times scale, which is read where it is.
struct Factor {
  Factor(double c, const optional<Tensor>& scale, at::Device device) : factor{float(c)} {
    if (!scale) return;
    TORCH_CHECK_VALUE(scale->numel() == 1, "scale: got shape ", scale->sizes(),
                      ", expected one element");
    if (scale->device() == device) {
      on_device = scale->to(at::kFloat);
      factor.scale = on_device.data_ptr<float>();
    } else {
      factor.c = float(c * scale->item<double>());
    }
  }

  cuda::Factor factor;
  Tensor on_device;
};

// Blocks of fastlora/blocks.py, one repeat of their pattern
struct Layout {
  std::vector<cuda::Block> blocks;
  int64_t N = 0, groups = 0, rows_of_B = 0;
  int period = 0, repeats = 0;

  Layout(at::IntArrayRef splits, const c10::List<bool>& enabled, int64_t interleave)
      : repeats(int(interleave)) {
    check_blocks(splits, enabled, interleave);
    for (size_t i = 0; i < splits.size(); ++i) {
      const int width = int(splits[i] / interleave);
      const bool on = enabled[i];
      blocks.push_back({period, width, on ? int(rows_of_B) : -1, on ? int(groups) : -1});
      period += width;
      N += splits[i];
      groups += on;
      if (on) rows_of_B += splits[i];
      TORCH_CHECK_VALUE(N <= INT32_MAX, "splits: got ", splits, ", expected a sum below 2**31");
    }
  }

  cuda::Layout view() const { return {blocks.data(), int(blocks.size()), period, repeats}; }
};

}  // namespace

// ---- one stage ----------------------------------------------------------------------------------

// S and masks of layers that share X
std::tuple<Tensors, Tensors> shrink_layers(const Tensor& X, at::TensorList A,
                                           at::ArrayRef<double> c, const OptionalTensors& scale,
                                           at::IntArrayRef t, const OptionalTensors& seed) {
  const Place at("shrink", "X", X);
  const int64_t M = X.size(0), K = X.size(1);
  Tensors S, mask;
  std::vector<Factor> factors;
  std::vector<cuda::ShrinkLayer> layers;
  for (size_t i = 0; i < A.size(); ++i) {
    const optional<Tensor> seed_i = seed.get(i);
    at.check.factor("A", A[i], A[i].size(0), K);
    at.check.dropout(t[i], seed_i);
    factors.emplace_back(c[i], scale.get(i), X.device());
    S.push_back(at.empty({M, A[i].size(0)}, at::kFloat));
    mask.push_back(at.empty({t[i] ? M : 0, mask_bytes(K)}, at::kByte));
    layers.push_back({matrix(A[i]), factors[i].factor, uint32_t(t[i]),
                      t[i] ? seed_i->data_ptr<int64_t>() : nullptr, mask[i].data_ptr<uint8_t>(),
                      S[i].data_ptr<float>()});
  }
  const int count = int(layers.size());
  at.run(cuda::shrink_workspace(matrix(X), layers.data(), count),
         [&](void* workspace, cudaStream_t stream) {
           return cuda::shrink(matrix(X), layers.data(), count, workspace, stream);
         });
  return {S, mask};
}

std::tuple<Tensor, Tensor> shrink(const Tensor& X, const Tensor& A, double c,
                                  const optional<Tensor>& scale, int64_t t,
                                  const optional<Tensor>& seed) {
  const auto [S, mask] =
      shrink_layers(X, A, c, OptionalTensors({scale}), t, OptionalTensors({seed}));
  return {S[0], mask[0]};
}

Tensor expand(const Tensor& X, const Tensor& W, const optional<Tensor>& bias, const Tensor& S,
              const Tensor& B, at::IntArrayRef splits, const c10::List<bool>& enabled,
              int64_t interleave) {
  const Layout layout(splits, enabled, interleave);
  const Place at("expand", "X", X);
  const int64_t M = X.size(0), r = B.size(1);
  at.check.operand("W", W, layout.N, X.size(1));
  at.check.factor("B", B, layout.rows_of_B, r);
  at.check.sums("S", S, M, layout.groups * r);
  if (bias) at.check.bias(*bias, layout.N);
  Tensor Y = at.empty({M, layout.N}, X.scalar_type());
  at.run(cuda::expand_workspace(matrix(B), matrix(Y)), [&](void* workspace, cudaStream_t stream) {
    return cuda::expand(S.data_ptr<float>(), matrix(B),
                        bias ? matrix(bias->unsqueeze(0)) : cuda::Matrix{}, layout.view(),
                        matrix(Y), workspace, stream);
  });
  return Y.addmm_(X, W.t());
}

std::tuple<Tensor, Tensor> grad_expand(const Tensor& dY, const optional<Tensor>& S, const Tensor& B,
                                       double c, const optional<Tensor>& scale,
                                       at::IntArrayRef splits, const c10::List<bool>& enabled,
                                       int64_t interleave, bool need_dS, bool need_dB) {
  const Layout layout(splits, enabled, interleave);
  const Place at("grad_expand", "dY", dY);
  const int64_t M = dY.size(0), r = B.size(1), R = layout.groups * r;
  at.check.matrix("dY", dY, M, layout.N);
  at.check.factor("B", B, layout.rows_of_B, r);
  TORCH_CHECK_VALUE(S || !need_dB, "S: got none, expected it for dB");
  if (S) at.check.sums("S", *S, M, R);
  const Factor factor(c, scale, dY.device());
  const Tensor dS = need_dS ? at.empty({M, R}, at::kFloat) : at.empty({0}, at::kFloat);
  const Tensor dB = at.empty(need_dB ? B.sizes() : at::IntArrayRef{0}, B.scalar_type());
  at.run(cuda::grad_expand_workspace(matrix(dY), matrix(B), layout.view()),
         [&](void* workspace, cudaStream_t stream) {
           return cuda::grad_expand(matrix(dY), need_dB ? S->data_ptr<float>() : nullptr, matrix(B),
                                    factor.factor, layout.view(),
                                    need_dS ? dS.data_ptr<float>() : nullptr,
                                    need_dB ? matrix(dB) : cuda::Matrix{}, workspace, stream);
         });
  return {dS, dB};
}

// dA of layers that share X, and the sum of m∘(dS A) into dX if it has two dimensions
Tensors grad_shrink_into(const Tensor& dX, const Place& at, at::TensorList dS, const Tensor& X,
                         const OptionalTensors& mask, at::TensorList A) {
  const int64_t M = X.size(0), K = X.size(1);
  at.check.operand("X", X, M, K);
  Tensors dA;
  std::vector<cuda::GradShrinkLayer> layers;
  for (size_t i = 0; i < A.size(); ++i) {
    const optional<Tensor> mask_i = mask.get(i);
    at.check.sums("dS", dS[i], M, A[i].size(0));
    at.check.factor("A", A[i], A[i].size(0), K);
    at.check.mask(mask_i, M, K);
    dA.push_back(at.empty(A[i].sizes(), A[i].scalar_type()));
    layers.push_back({dS[i].data_ptr<float>(), data_of(mask_i), matrix(A[i]), matrix(dA[i])});
  }
  const cuda::Matrix out = dX.dim() == 2 ? matrix(dX) : cuda::Matrix{};
  const int count = int(layers.size());
  at.run(cuda::grad_shrink_workspace(matrix(X), layers.data(), count, out),
         [&](void* workspace, cudaStream_t stream) {
           return cuda::grad_shrink(matrix(X), layers.data(), count, out, workspace, stream);
         });
  return dA;
}

Tensor grad_shrink(const Tensor& dS, const Tensor& X, const optional<Tensor>& mask,
                   const Tensor& A) {
  const Place at("grad_shrink", "X", X);
  return grad_shrink_into(at.empty({0}, X.scalar_type()), at, dS, X, OptionalTensors({mask}), A)[0];
}

// m∘(dS A) into dX, or added to it
void grad_input_into(const Tensor& dX, const Place& at, const Tensor& dS, const Tensor& A,
                     const optional<Tensor>& mask, bool adds = false) {
  const int64_t M = dX.size(0), K = dX.size(1);
  at.check.sums("dS", dS, M, A.size(0));
  at.check.factor("A", A, A.size(0), K);
  at.check.mask(mask, M, K);
  at.run(cuda::grad_input_workspace(matrix(A), matrix(dX)),
         [&](void* workspace, cudaStream_t stream) {
           return cuda::grad_input(dS.data_ptr<float>(), matrix(A), data_of(mask), matrix(dX), adds,
                                   workspace, stream);
         });
}

Tensor grad_input(const Tensor& dY, const Tensor& W, const optional<Tensor>& dS, const Tensor& A,
                  const optional<Tensor>& mask) {
  if (!dS) return dY.mm(W);
  const Place at("grad_input", "dY", dY);
  at.check.operand("W", W, dY.size(1), A.size(1));
  Tensor dX = at.empty({dY.size(0), A.size(1)}, dY.scalar_type());
  grad_input_into(dX, at, *dS, A, mask);
  return add_product(dX, dY, W);
}

Tensor delta(const Tensor& A, const Tensor& B, double scaling, const optional<Tensor>& scale,
             at::IntArrayRef splits, const c10::List<bool>& enabled, int64_t interleave) {
  const Layout layout(splits, enabled, interleave);
  const Place at("delta", "B", B);
  const int64_t r = B.size(1), K = A.size(1);
  at.check.matrix("B", B, layout.rows_of_B, r);
  at.check.operand("A", A, layout.groups * r, K);
  const Factor factor(scaling, scale, B.device());
  const Tensor dW = at.empty({layout.N, K}, B.scalar_type());
  at.run(cuda::delta_workspace(matrix(A), matrix(dW)), [&](void* workspace, cudaStream_t stream) {
    return cuda::delta(matrix(A), matrix(B), factor.factor, layout.view(), matrix(dW), workspace,
                       stream);
  });
  return dW;
}

// ---- one direction ------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& X, const Tensor& W,
                                           const optional<Tensor>& bias, const Tensor& A,
                                           const Tensor& B, double c, const optional<Tensor>& scale,
                                           int64_t t, const optional<Tensor>& seed,
                                           at::IntArrayRef splits, const c10::List<bool>& enabled,
                                           int64_t interleave) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const auto [S, mask] = shrink(X, A, c, scale, t, seed);
  return {expand(X, W, bias, S, B, splits, enabled, interleave), S, mask};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dY, const optional<Tensor>& X,
                                            const optional<Tensor>& W, const optional<Tensor>& A,
                                            const Tensor& B, const optional<Tensor>& S,
                                            const optional<Tensor>& mask, double c,
                                            const optional<Tensor>& scale, at::IntArrayRef splits,
                                            const c10::List<bool>& enabled, int64_t interleave,
                                            bool need_dX, bool need_dA, bool need_dB) {
  at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK_VALUE((X || !need_dA) && (W || !need_dX) && (A || !(need_dA || need_dX)),
                    "X, W, A: got none, expected X for dA, W for dX and A for either");
  const auto [dS, dB] =
      grad_expand(dY, S, B, c, scale, splits, enabled, interleave, need_dX || need_dA, need_dB);
  const Place at("backward", "dY", dY);
  Tensor dX = at.empty({0}, dY.scalar_type()), dA = at.empty({0}, B.scalar_type());
  if (need_dX) {
    at.check.operand("W", *W, dY.size(1), A->size(1));
    dX = at.empty({dY.size(0), A->size(1)}, dY.scalar_type());
  }
  if (need_dA) dA = grad_shrink_into(dX, at, dS, *X, OptionalTensors({mask}), *A)[0];
  if (need_dX && !need_dA) grad_input_into(dX, at, dS, *A, mask);
  if (need_dX) add_product(dX, dY, *W);
  return {dX, dA, dB};
}

// ---- one direction of layers that share X -------------------------------------------------------

std::tuple<Tensors, Tensors, Tensors> MultiForward::operator()(
    const Tensor& X, at::TensorList W, const OptionalTensors& bias, at::TensorList A,
    at::TensorList B, at::ArrayRef<double> c, const OptionalTensors& scale, at::IntArrayRef t,
    const OptionalTensors& seed) const {
  at::AutoDispatchBelowADInplaceOrView guard;
  const size_t count = W.size();
  check_counts(count, bias, A, B, c, scale, t, seed);
  // of those with ranks
  Tensors A_of;
  std::vector<double> c_of;
  std::vector<int64_t> t_of;
  OptionalTensors scale_of, seed_of;
  for (size_t i = 0; i < count; ++i) {
    if (!rank(B[i])) continue;
    A_of.push_back(A[i]);
    c_of.push_back(c[i]);
    t_of.push_back(t[i]);
    scale_of.push_back(scale.get(i));
    seed_of.push_back(seed.get(i));
  }
  const auto [S_of, mask_of] = shrink_layers(X, A_of, c_of, scale_of, t_of, seed_of);
  Tensors Y(count), S(count), mask(count);
  for (size_t i = 0, of = 0; i < count; ++i) {
    const bool adapted = rank(B[i]);
    S[i] = adapted ? S_of[of] : no_S(X);
    mask[i] = adapted ? mask_of[of++] : no_mask(X);
    Y[i] = adapted ? expand(X, W[i], bias.get(i), S[i], B[i], {B[i].size(0)}, one_block(), 1)
                   : at::linear(X, W[i], bias.get(i));
  }
  return {Y, S, mask};
}

std::tuple<Tensor, Tensors, Tensors> multi_backward(
    at::TensorList dY, const optional<Tensor>& X, const OptionalTensors& W,
    const OptionalTensors& A, at::TensorList B, const OptionalTensors& S,
    const OptionalTensors& mask, at::ArrayRef<double> c, const OptionalTensors& scale, bool need_dX,
    const c10::List<bool>& need_dA, const c10::List<bool>& need_dB) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const size_t count = dY.size();
  check_counts(count, W, A, B, S, mask, c, scale, need_dA, need_dB);
  const Place at("multi_backward", "dY", dY[0]);
  Tensors dS(count), dA(count), dB(count);
  // those whose dA is asked for
  std::vector<size_t> trained;
  Tensors dS_of, A_of;
  OptionalTensors mask_of;
  for (size_t i = 0; i < count; ++i) {
    dA[i] = no_gradient(A.get(i), need_dA.get(i), B[i]);
    dB[i] = no_gradient(B[i], need_dB.get(i), B[i]);
    if (!rank(B[i]) || !(need_dX || need_dA.get(i) || need_dB.get(i))) continue;
    std::tie(dS[i], dB[i]) = grad_expand(dY[i], S.get(i), B[i], c[i], scale.get(i), {B[i].size(0)},
                                         one_block(), 1, need_dX || need_dA.get(i), need_dB.get(i));
    if (!need_dA.get(i)) continue;
    trained.push_back(i);
    dS_of.push_back(dS[i]);
    A_of.push_back(given("A", A.get(i)));
    mask_of.push_back(mask.get(i));
  }
  Tensor dX = at.empty({0}, dY[0].scalar_type());
  if (need_dX) dX = at.empty({dY[0].size(0), given("W", W.get(0)).size(1)}, dY[0].scalar_type());
  bool started = !trained.empty();
  if (started) {
    const Tensors found = grad_shrink_into(dX, at, dS_of, given("X", X), mask_of, A_of);
    for (size_t i = 0; i < trained.size(); ++i) dA[trained[i]] = found[i];
  }
  for (size_t i = 0; need_dX && i < count; ++i) {
    if (!rank(B[i]) || need_dA.get(i)) continue;
    grad_input_into(dX, at, dS[i], given("A", A.get(i)), mask.get(i), started);
    started = true;
  }
  for (size_t i = 0; need_dX && i < count; ++i, started = true) {
    const Tensor& W_i = given("W", W.get(i));
    dX = started ? add_product(dX, dY[i], W_i) : at::mm_out(dX, dY[i], W_i);
  }
  return {dX, dA, dB};
}

TORCH_LIBRARY_IMPL(FASTLORA_NAMESPACE, FASTLORA_KEY, m) {
  m.impl("forward", forward);
  m.impl("backward", backward);
  m.impl("multi_forward", MultiForward{expand});
  m.impl("multi_backward", multi_backward);
  m.impl("shrink", shrink);
  m.impl("expand", expand);
  m.impl("grad_expand", grad_expand);
  m.impl("grad_shrink", grad_shrink);
  m.impl("grad_input", grad_input);
  m.impl("delta", delta);
}

}  // namespace fastlora::stages
