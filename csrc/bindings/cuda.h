// Tensors as csrc/cuda takes them, and where its work goes.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <tuple>

#include "checks.h"
#include "fastlora/stages.h"

// tests/csrc builds these files for an emulated device, whose memory is that of the CPU
#if defined(FASTLORA_EMULATED)
#define FASTLORA_NAMESPACE fastlora_emulated
#define FASTLORA_KEY CPU
#else
#define FASTLORA_NAMESPACE fastlora
#define FASTLORA_KEY CUDA
#endif

namespace fastlora {

constexpr at::DeviceType kDevice = at::DeviceType::FASTLORA_KEY;

inline void check_launch(const char* stage, cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, "fastlora::", stage, ": ", cuda::describe(error));
}

// Asked of c10, which has it from whatever part of torch serves the device: the extension is linked
// to none of CUDA's, and can be built beside a torch without them.
inline cudaStream_t current_stream([[maybe_unused]] at::Device device) {
#if defined(FASTLORA_EMULATED)
  return nullptr;
#else
  const c10::impl::VirtualGuardImpl guard(device.type());
  return static_cast<cudaStream_t>(guard.getStream(device).native_handle());
#endif
}

// Where the work of a call goes: the device of its first tensor and the stream that is current
// there.
class Place {
 public:
  Place(const char* stage, const char* name, const Tensor& t)
      : check(name, t, kDevice), stage(stage), guard(t.device()) {
    TORCH_CHECK_TYPE(
        check.dtype == at::kFloat || check.dtype == at::kBFloat16 || check.dtype == at::kHalf, name,
        ": got ", check.dtype, ", expected Float, BFloat16 or Half");
    check_launch(stage, cuda::set_device(t.device().index()));
    stream = current_stream(t.device());
  }

  Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) const {
    return at::empty(sizes, at::TensorOptions().device(check.device).dtype(dtype));
  }

  // starts a stage that needs so many bytes
  template <class Start>
  void run(size_t workspace, const Start& start) const {
    const Tensor bytes = empty({int64_t(workspace)}, at::kByte);
    check_launch(stage, start(workspace ? bytes.data_ptr() : nullptr, stream));
  }

  const Checks check;

 private:
  const char* stage;
  c10::DeviceGuard guard;
  cudaStream_t stream;
};

inline cuda::Dtype dtype_of(at::ScalarType type) {
  return type == at::kFloat      ? cuda::Dtype::f32
         : type == at::kBFloat16 ? cuda::Dtype::bf16
                                 : cuda::Dtype::f16;
}

inline cuda::Matrix matrix(const Tensor& t) {
  return {t.data_ptr(), dtype_of(t.scalar_type()), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

inline const uint8_t* data_of(const optional<Tensor>& mask) {
  return mask ? mask->data_ptr<uint8_t>() : nullptr;
}

}  // namespace fastlora

// The operators of cuda_stages.cpp, for those that are made of them.
namespace fastlora::stages {

std::tuple<Tensor, Tensor> shrink(const Tensor& X, const Tensor& A, double c,
                                  const optional<Tensor>& scale, int64_t t,
                                  const optional<Tensor>& seed);

using Expand = Tensor(const Tensor& X, const Tensor& W, const optional<Tensor>& bias,
                      const Tensor& S, const Tensor& B, at::IntArrayRef splits,
                      const c10::List<bool>& enabled, int64_t interleave);
Expand expand;

std::tuple<Tensor, Tensor> grad_expand(const Tensor& dY, const optional<Tensor>& S, const Tensor& B,
                                       double c, const optional<Tensor>& scale,
                                       at::IntArrayRef splits, const c10::List<bool>& enabled,
                                       int64_t interleave, bool need_dS, bool need_dB);

Tensor grad_shrink(const Tensor& dS, const Tensor& X, const optional<Tensor>& mask,
                   const Tensor& A);

Tensor grad_input(const Tensor& dY, const Tensor& W, const optional<Tensor>& dS, const Tensor& A,
                  const optional<Tensor>& mask);

Tensor delta(const Tensor& A, const Tensor& B, double scaling, const optional<Tensor>& scale,
             at::IntArrayRef splits, const c10::List<bool>& enabled, int64_t interleave);

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dY, const optional<Tensor>& X,
                                            const optional<Tensor>& W, const optional<Tensor>& A,
                                            const Tensor& B, const optional<Tensor>& S,
                                            const optional<Tensor>& mask, double c,
                                            const optional<Tensor>& scale, at::IntArrayRef splits,
                                            const c10::List<bool>& enabled, int64_t interleave,
                                            bool need_dX, bool need_dA, bool need_dB);

// The operator multi_forward, whose outputs are those of `expand`.
struct MultiForward {
  Expand* expand;

  std::tuple<Tensors, Tensors, Tensors> operator()(const Tensor& X, at::TensorList W,
                                                   const OptionalTensors& bias, at::TensorList A,
                                                   at::TensorList B, at::ArrayRef<double> c,
                                                   const OptionalTensors& scale, at::IntArrayRef t,
                                                   const OptionalTensors& seed) const;
};

std::tuple<Tensor, Tensors, Tensors> multi_backward(
    at::TensorList dY, const optional<Tensor>& X, const OptionalTensors& W,
    const OptionalTensors& A, at::TensorList B, const OptionalTensors& S,
    const OptionalTensors& mask, at::ArrayRef<double> c, const OptionalTensors& scale, bool need_dX,
    const c10::List<bool>& need_dA, const c10::List<bool>& need_dB);

}  // namespace fastlora::stages
