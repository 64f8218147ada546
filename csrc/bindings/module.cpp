// The extension's shell: what it says of itself. It needs none of torch's large headers, which take
// long to compile.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "cpu/kernels.h"
#if defined(FASTLORA_CUDA)
#include "fastlora/stages.h"
#endif

namespace fastlora::cpu {
const Kernels& kernels();
bool own_base_products();
void set_own_base_products(bool chosen);
}  // namespace fastlora::cpu

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  m.doc() = "fastlora's compiled kernels; the operators are torch.ops.fastlora";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["torch"] = TORCH_VERSION;
        info["compiler"] =
#if defined(__clang__)
            "Clang " __clang_version__;
#else
            "GCC " __VERSION__;
#endif
        info["openmp"] =
#if defined(_OPENMP)
            true;
#else
            false;
#endif
        info["instruction_set"] = fastlora::cpu::kernels().name;
        info["vector_bits"] = 8 * fastlora::cpu::kernels().vector_bytes;
        info["base_products"] = fastlora::cpu::own_base_products() ? "own" : "torch";
#if defined(FASTLORA_CUDA)
        py::dict cuda;
        cuda["toolkit"] = std::to_string(CUDART_VERSION / 1000) + "." +
                          std::to_string(CUDART_VERSION % 1000 / 10);
        cuda["architectures"] = FASTLORA_CUDA;
        info["cuda"] = cuda;
#else
        info["cuda"] = py::none();
#endif
        info["cutlass"] =
#if defined(FASTLORA_CUTLASS)
            true;
#else
            false;
#endif
        return info;
      },
      "What the extension was built with, and which of its builds runs here.");
  m.def(
      "set_base_products",
      [](const std::string& whose) {
        if (whose != "own" && whose != "torch")
          throw py::value_error("base products: got '" + whose + "', expected 'own' or 'torch'");
        fastlora::cpu::set_own_base_products(whose == "own");
      },
      "Which matrix product multiplies with frozen weights on a CPU: 'own' or 'torch'.");
#if defined(FASTLORA_CUDA)
  m.def(
      "cuda_obstacle",
      []() -> std::optional<std::string> {
        const cudaError_t error = fastlora::cuda::obstacle();
        if (!error) return std::nullopt;
        return fastlora::cuda::describe(error);
      },
      "Why the kernels cannot run on the current CUDA device, or None.");
#endif
}
