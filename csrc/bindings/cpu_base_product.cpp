// The product with the frozen weight on CPU tensors: torch's BLAS, or csrc/cpu/base_product.h.

#include <algorithm>
#include <atomic>

#include "cpu.h"

namespace fastlora::cpu {

namespace {

// what a product has at least of each dimension to be ours
constexpr int64_t kLeastRows = 64, kLeast = 128;

// Where ours was measured to be the faster one: on AMD's CPUs with AVX-512, of which MKL makes
// less.
bool faster() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return &kernels() == &avx512 && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

std::atomic<bool>& own() {
  static std::atomic<bool> own = faster();
  return own;
}

// whether float32 products are to be computed in float32
bool exact() {
  const auto precision =
      at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  return precision != at::Float32Precision::BF16 && precision != at::Float32Precision::TF32;
}

}  // namespace

bool own_base_products() { return own(); }
void set_own_base_products(bool chosen) { own() = chosen; }

void add_base_product(Tensor& out, const Tensor& P, const Tensor& Q) {
  const int64_t M = out.size(0), N = out.size(1), L = P.size(1), threads = at::get_num_threads();
  // each thread packs its own columns of Q, and enough of them
  if (!own() || out.scalar_type() != at::kFloat || M < kLeastRows || L < kLeast ||
      N < kLeast * threads || !exact()) {
    out.addmm_(P, Q);
    return;
  }
  const int64_t sliver = 2 * kernels().vector_bytes / out.element_size();
  const int64_t slivers = (N + sliver - 1) / sliver;
  const int64_t width = std::min(kBaseColumns, (slivers + threads - 1) / threads * sliver);
  const Tensor panels = at::empty({threads, width, std::min(L, kBaseTerms)}, out.options());
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t end = std::min(N, slivers * (part + 1) / threads * sliver);
      for (int64_t j = slivers * part / threads * sliver; j < end; j += width) {
        const int64_t n = std::min(width, end - j);
        stages_for(out).add_base_product(matrix(P), block_of(Q, 0, L, j, n),
                                         block_of(out, 0, M, j, n), packed(panels, 0, part).data);
      }
    }
  });
}

}  // namespace fastlora::cpu
