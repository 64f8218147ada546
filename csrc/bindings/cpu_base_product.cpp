// The product with the frozen weight on CPU tensors: torch's BLAS, or csrc/cpu/base_product.h.

#include <algorithm>
#include <atomic>

#include "cpu.h"

namespace fastlora {

namespace {

// rows and columns of a product that are worth a thread, or what comes before one
constexpr int64_t kLeastRows = 64, kLeastColumns = 128;

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
  const int64_t M = out.size(0), N = out.size(1), L = P.size(1);
  if (!own() || out.scalar_type() != at::kFloat || M < kLeastRows || N < kLeastColumns ||
      L < kLeastColumns || !exact()) {
    out.addmm_(P, Q);
    return;
  }
  // each thread packs what it needs of Q, so that they share columns first
  const int64_t threads = at::get_num_threads();
  const int64_t columns = std::min(threads, N / kLeastColumns);
  const int64_t rows = std::min(threads / columns, M / kLeastRows);
  const int64_t step = 2 * kernels().vector_bytes / out.element_size();
  const int64_t steps = (N + step - 1) / step;
  const int64_t width = std::min(kBaseColumns, (steps + columns - 1) / columns * step);
  const Tensor panels = at::empty({columns * rows, width, std::min(L, kBaseTerms)}, out.options());
  at::parallel_for(0, columns * rows, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t c = part % columns, r = part / columns;
      const int64_t i = M * r / rows, height = M * (r + 1) / rows - i;
      const int64_t end = std::min(N, steps * (c + 1) / columns * step);
      for (int64_t j = steps * c / columns * step; j < end; j += width) {
        const int64_t n = std::min(width, end - j);
        stages_for(out).add_base_product(block_of(P, i, height, 0, L), block_of(Q, 0, L, j, n),
                                         block_of(out, i, height, j, n),
                                         packed(panels, 0, part).data);
      }
    }
  });
}

}  // namespace fastlora
