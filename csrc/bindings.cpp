// The one file that knows torch: the stages as operators, and what the extension says of itself.
//
// csrc/cpu works on ranges of rows; here threads, buffers and the base products are added. The base
// product is added in place by torch's own BLAS, so that it costs what the frozen layer costs.

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/extension.h>

#include <array>
#include <cstring>
#include <functional>
#include <iterator>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace fastlora {
namespace {

using at::Tensor;
using std::optional;

// elements of a factor that a thread is woken for
constexpr int64_t kFactorElements = 1 << 16;
// a multiple of every register tile's rows
constexpr int64_t kRowStep = 8;
// elements every row of a Packed that is read as vectors is padded to
constexpr int64_t kPadding = 16;

// the widest build that torch, too, would use here (ATEN_CPU_CAPABILITY lowers both)
const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return avx512;
    if (capability == "AVX2") return avx2;
#endif
    return baseline;
  }();
  return chosen;
}

Dtype dtype_of(at::ScalarType type) {
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

const Stages& stages_for(const Tensor& t) { return kernels().of(dtype_of(t.scalar_type())); }

at::ScalarType accumulation_type(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Matrix matrix(const Tensor& t) {
  return {t.data_ptr(), dtype_of(t.scalar_type()), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

// `count` rows of t from `first` on
Matrix rows_of(const Tensor& t, int64_t first, int64_t count) {
  char* data = static_cast<char*>(t.data_ptr()) + first * t.stride(0) * t.element_size();
  return {data, dtype_of(t.scalar_type()), count, t.size(1), t.stride(0), t.stride(1)};
}

// `count` columns of t from `first` on
Matrix columns_of(const Tensor& t, int64_t first, int64_t count) {
  char* data = static_cast<char*>(t.data_ptr()) + first * t.stride(1) * t.element_size();
  return {data, dtype_of(t.scalar_type()), t.size(0), count, t.stride(0), t.stride(1)};
}

Matrix transposed(const Matrix& m) {
  return {m.data, m.dtype, m.cols, m.rows, m.col_stride, m.row_stride};
}

// the columns from `column` on of part `part` of a contiguous tensor
Packed packed(const Tensor& t, int64_t column = 0, int64_t part = 0) {
  const int64_t offset = (t.dim() > 2 ? part * t.stride(0) : part) + column;
  return {static_cast<char*>(t.data_ptr()) + offset * t.element_size(), t.size(-1)};
}

// the mask of the columns from `column` on, a multiple of 8
Mask mask_of(const optional<Tensor>& mask, int64_t column) {
  return mask ? Mask{mask->data_ptr<uint8_t>() + column / 8, mask->size(1)} : Mask{};
}

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

int64_t mask_bytes(int64_t K) { return round_up(K, 32) / 8; }

// How n rows or columns are shared out among threads: always the same for one size and one number
// of threads, so that sums over rows come out the same.
struct Parts {
  int64_t n, size, count;

  // A part that sums over rows keeps `sums` rows of its own: it gets as many to sum at least, so
  // that all sums together are no larger than what is summed.
  static Parts of_rows(int64_t M, int64_t sums = 0) {
    return Parts(M, M / std::max(kRowStep, sums), kRowStep);
  }

  // columns of M rows: sums over rows are whole in each part
  static Parts of_columns(int64_t n, int64_t M) { return Parts(n, M / kRowStep, kPadding); }

  // all stages on one part, then on the next
  template <class... Stage>
  void run(const Stage&... stages) const {
    at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        const int64_t begin = part * size, end = std::min(n, begin + size);
        (run_one(stages, part, begin, end), ...);
      }
    });
  }

 private:
  Parts(int64_t n, int64_t most, int64_t step) : n(n) {
    most = std::clamp<int64_t>(most, 1, at::get_num_threads());
    size = round_up(std::max<int64_t>(1, (n + most - 1) / most), step);
    count = (n + size - 1) / size;
  }

  template <class Stage>
  static void run_one(const Stage& stage, int64_t part, int64_t begin, int64_t end) {
    stage.run(part, begin, end);
  }
  template <class Stage>
  static void run_one(const optional<Stage>& stage, int64_t part, int64_t begin, int64_t end) {
    if (stage) stage->run(part, begin, end);
  }
};

// Blocks of fastlora/blocks.py, spelled out
struct Layout {
  std::vector<Span> spans;
  int64_t groups = 0, rows_of_B = 0, packed = 0;

  Layout(at::IntArrayRef splits, const c10::List<bool>& enabled, int64_t interleave) {
    TORCH_CHECK_VALUE(splits.size() == enabled.size() && interleave > 0, "blocks: got ",
                      splits.size(), " sizes, ", enabled.size(),
                      " switches, interleave=", interleave);
    int64_t pattern = 0;
    for (const int64_t n : splits) {
      TORCH_CHECK_VALUE(n > 0 && n <= INT32_MAX && n % interleave == 0, "splits: got ", splits,
                        ", expected positive multiples of interleave=", interleave);
      pattern += n / interleave;
    }
    for (int64_t repeat = 0; repeat < interleave; ++repeat) {
      int64_t g = 0, column = repeat * pattern, row = 0;
      for (size_t i = 0; i < splits.size(); ++i) {
        const int64_t width = splits[i] / interleave;
        if (enabled[i]) {
          spans.push_back({g++, column, width, row + repeat * width, packed});
          packed += round_up(width, kPadding);
          row += splits[i];
        }
        column += width;
      }
      groups = g;
      rows_of_B = row;
    }
    N = pattern * interleave;
  }

  int64_t N = 0;
  Spans view() const { return {groups, spans.data(), int64_t(spans.size())}; }
};

void check(bool fits, const char* name, const Tensor& t, at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(fits, name, ": got shape ", t.sizes(), ", expected ", expected);
}

void check_matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) {
  check(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name, t, {rows, cols});
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, ": got device ", t.device(), ", expected cpu");
}

void check_operand(const char* name, const Tensor& t, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.dim() == 2 && t.device().is_cpu(), name, ": got shape ", t.sizes(), " on ",
                    t.device(), ", expected two dimensions on cpu");
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, ": got ", t.scalar_type(), ", expected ", dtype);
}

void check_factor(const char* name, const Tensor& t, int64_t rows, int64_t cols,
                  at::ScalarType dtype) {
  check_matrix(name, t, rows, cols);
  const bool fits =
      t.scalar_type() == dtype || (t.scalar_type() == at::kFloat && dtype != at::kDouble);
  TORCH_CHECK_TYPE(fits, name, ": got ", t.scalar_type(), ", expected ", dtype,
                   " or Float over 16 bits");
}

// what an earlier stage made: S or dS
void check_sums(const char* name, const Tensor& t, int64_t rows, int64_t cols,
                at::ScalarType dtype) {
  check_matrix(name, t, rows, cols);
  TORCH_CHECK_VALUE(t.is_contiguous() && t.scalar_type() == dtype, name, ": got ", t.scalar_type(),
                    " with strides ", t.strides(), ", expected contiguous ", dtype);
}

void check_mask(const optional<Tensor>& mask, int64_t M, int64_t K) {
  if (!mask) return;
  check_matrix("mask", *mask, M, mask_bytes(K));
  TORCH_CHECK_VALUE(mask->is_contiguous() && mask->scalar_type() == at::kByte, "mask: got ",
                    mask->scalar_type(), " with strides ", mask->strides(),
                    ", expected contiguous Byte");
}

double times(double c, const optional<Tensor>& scale) {
  return scale ? c * scale->item<double>() : c;
}

// ---- factors ------------------------------------------------------------------------------------

// f(begin, end) over rows of `cols` elements
template <class F>
void for_factor_rows(int64_t rows, int64_t cols, const F& f) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kFactorElements / std::max<int64_t>(1, cols)), f);
}

// The factor as (rows, padded cols), widened: itself where it is that already.
Tensor pack_rows(const Tensor& factor, at::ScalarType wide, int64_t padding = 0) {
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

// Aᵀ: (K, R padded)
Tensor pack_transposed(const Tensor& A, at::ScalarType wide) {
  const int64_t R = A.size(0), K = A.size(1), stride = round_up(R, kPadding);
  const auto options = A.options().dtype(wide);
  Tensor out = stride == R ? at::empty({K, stride}, options) : at::zeros({K, stride}, options);
  for_factor_rows(K, R, [&](int64_t begin, int64_t end) {
    stages_for(A).pack(transposed(matrix(A)), false, packed(out), begin, end);
  });
  return out;
}

// Bᵀ: (r, packed columns), each span padded
Tensor pack_spans(const Tensor& B, const Layout& layout, at::ScalarType wide) {
  Tensor out = at::empty({B.size(1), layout.packed}, B.options().dtype(wide));
  if (layout.packed != layout.rows_of_B) out.zero_();
  for (const Span& span : layout.spans) {
    const Matrix B_g = rows_of(B, span.row, span.width);
    for_factor_rows(span.width, B.size(1), [&](int64_t begin, int64_t end) {
      stages_for(B).pack(B_g, true, packed(out, span.packed), begin, end);
    });
  }
  return out;
}

void add_parts(const Tensor& parts, bool transpose, int64_t column, const Stages& stages,
               const Matrix& out) {
  for_factor_rows(out.rows, out.cols, [&](int64_t begin, int64_t end) {
    stages.add_parts(packed(parts, column), parts.size(0), parts.size(1) * parts.size(2), transpose,
                     out, begin, end);
  });
}

// ---- stages -------------------------------------------------------------------------------------
//
// Each is checked and packed when it is made, then run on parts of the rows, or of X's columns
// where it can. These depend on no others, so stages that follow each other share one visit of the
// threads: waking them costs microseconds, and a whole time slice where something else has taken a
// core.

struct Shrink {
  Tensor S, mask;

  Shrink(const Tensor& X, const Tensor& A, double c, const optional<Tensor>& scale, int64_t t,
         const optional<Tensor>& seed)
      : X(X), c(times(c, scale)), t(t), R(A.size(0)) {
    check_operand("X", X, X.scalar_type());
    check_factor("A", A, R, X.size(1), X.scalar_type());
    TORCH_CHECK_VALUE(0 <= t && t <= 65536, "t: got ", t, ", expected 0 to 65536");
    TORCH_CHECK_VALUE(!t || (seed && seed->numel() == 1 && seed->scalar_type() == at::kLong),
                      "seed: got none or no single Long, expected one where t > 0");
    const auto wide = accumulation_type(X);
    S = at::empty({X.size(0), R}, X.options().dtype(wide));
    mask = at::empty({t ? X.size(0) : 0, mask_bytes(X.size(1))}, X.options().dtype(at::kByte));
    At = pack_transposed(A, wide);
    key = t ? uint64_t(seed->item<int64_t>()) : 0;
  }

  void run(int64_t, int64_t begin, int64_t end) const {
    stages_for(X).shrink(matrix(X), packed(At), c, uint32_t(t), key,
                         t ? Mask{mask.data_ptr<uint8_t>(), mask.size(1)} : Mask{}, packed(S), R,
                         begin, end);
  }

 private:
  const Tensor& X;
  Tensor At;
  double c;
  int64_t t, R;
  uint64_t key;
};

struct Expand {
  Tensor Y;

  Expand(const Tensor& X, const Tensor& W, const optional<Tensor>& bias, const Tensor& S,
         const Tensor& B, const Layout& layout)
      : S(S), layout(layout), r(B.size(1)) {
    check_operand("X", X, X.scalar_type());
    check_operand("W", W, X.scalar_type());
    check_matrix("W", W, layout.N, X.size(1));
    check_factor("B", B, layout.rows_of_B, r, X.scalar_type());
    const auto wide = accumulation_type(X);
    check_sums("S", S, X.size(0), layout.groups * r, wide);
    Y = at::empty({X.size(0), layout.N}, X.options());
    Bt = pack_spans(B, layout, wide);
    if (!bias) return;
    check(bias->dim() == 1 && bias->numel() == layout.N, "bias", *bias, {layout.N});
    check_operand("bias", bias->unsqueeze(0), X.scalar_type());
    // read as vectors from any column on
    b = pack_rows(bias->unsqueeze(0), wide, kPadding);
  }

  void run(int64_t, int64_t begin, int64_t end) const {
    const Packed row = b ? packed(*b) : Packed{};
    stages_for(Y).expand(packed(S), r, packed(Bt), b ? &row : nullptr, layout.view(), matrix(Y),
                         begin, end);
  }

  Tensor add_base(const Tensor& X, const Tensor& W) { return Y.addmm_(X, W.t()); }

 private:
  const Tensor& S;
  const Layout& layout;
  Tensor Bt;
  optional<Tensor> b;
  int64_t r;
};

struct GradExpand {
  Tensor dS, dB;

  GradExpand(const Tensor& dY, const optional<Tensor>& S, const Tensor& B, double c,
             const optional<Tensor>& scale, const Layout& layout, const Parts& parts, bool need_dS,
             bool need_dB)
      : dY(dY), S(S), layout(layout), c(times(c, scale)), r(B.size(1)) {
    const int64_t M = dY.size(0), R = layout.groups * r;
    check_operand("dY", dY, dY.scalar_type());
    check_matrix("dY", dY, M, layout.N);
    check_factor("B", B, layout.rows_of_B, r, dY.scalar_type());
    const auto wide = accumulation_type(dY);
    TORCH_CHECK_VALUE(S || !need_dB, "S: got none, expected it for dB");
    if (S) check_sums("S", *S, M, R, wide);
    const auto options = dY.options().dtype(wide);
    dS = need_dS ? at::empty({M, R}, options) : at::empty({0}, options);
    dB = at::empty(need_dB ? B.sizes() : at::IntArrayRef{0}, B.options());
    if (need_dS) B_rows = pack_rows(B, wide);
    if (need_dB) sums = at::empty({parts.count, r, layout.packed}, options);
  }

  void run(int64_t part, int64_t begin, int64_t end) const {
    stages_for(dY).grad_expand(matrix(dY), sums ? packed(*S) : Packed{}, r,
                               B_rows ? packed(*B_rows) : Packed{}, c, layout.view(),
                               B_rows ? packed(dS) : Packed{},
                               sums ? packed(*sums, 0, part) : Packed{}, begin, end);
  }

  Tensor add_up() const {
    if (sums)
      for (const Span& span : layout.spans)
        add_parts(*sums, true, span.packed, stages_for(dB), rows_of(dB, span.row, span.width));
    return dB;
  }

 private:
  const Tensor& dY;
  const optional<Tensor>& S;
  const Layout& layout;
  optional<Tensor> B_rows, sums;
  double c;
  int64_t r;
};

// Runs on columns: sums over rows in parts would each be as large as dA.
struct GradShrink {
  GradShrink(const Tensor& dS, const Tensor& X, const optional<Tensor>& mask, const Tensor& A)
      : dS(dS), X(X), mask(mask), R(A.size(0)) {
    check_operand("X", X, X.scalar_type());
    const int64_t M = X.size(0), K = X.size(1), stride = round_up(K, kPadding);
    check_sums("dS", dS, M, R, accumulation_type(X));
    check_factor("A", A, R, K, X.scalar_type());
    check_mask(mask, M, K);
    dA = at::empty({R, K}, A.options());
    const bool direct = stride == K && dA.scalar_type() == dS.scalar_type();
    sums = direct ? dA.unsqueeze(0) : at::empty({1, R, stride}, dS.options());
  }

  void run(int64_t, int64_t begin, int64_t end) const {
    stages_for(X).grad_shrink(packed(dS), R, columns_of(X, begin, end - begin),
                              mask_of(mask, begin), packed(sums, begin), 0, X.size(0));
  }

  Tensor narrowed() const {
    if (!sums.is_alias_of(dA)) add_parts(sums, false, 0, stages_for(dA), matrix(dA));
    return dA;
  }

 private:
  const Tensor &dS, &X;
  const optional<Tensor>& mask;
  Tensor dA, sums;
  int64_t R;
};

// Runs on columns, in the visit of GradShrink.
struct GradInput {
  GradInput(const Tensor& dY, const Tensor& W, const Tensor& dS, const Tensor& A,
            const optional<Tensor>& mask)
      : dS(dS), mask(mask), R(A.size(0)) {
    check_operand("dY", dY, dY.scalar_type());
    check_operand("W", W, dY.scalar_type());
    const int64_t M = dY.size(0), K = W.size(1);
    check_matrix("W", W, dY.size(1), K);
    check_sums("dS", dS, M, R, accumulation_type(dY));
    check_factor("A", A, R, K, dY.scalar_type());
    check_mask(mask, M, K);
    dX = at::empty({M, K}, dY.options());
    A_rows = pack_rows(A, dS.scalar_type());
  }

  void run(int64_t, int64_t begin, int64_t end) const {
    stages_for(dX).grad_input(packed(dS), R, packed(A_rows, begin), mask_of(mask, begin),
                              columns_of(dX, begin, end - begin), 0, dX.size(0));
  }

  Tensor add_base(const Tensor& dY, const Tensor& W) {
    // MKL's path for so few rows is up to 1.4 times less accurate (rms) when it adds in place
    if (dX.size(0) < 4 && dX.scalar_type() == dS.scalar_type()) return dX.add_(dY.mm(W));
    return dX.addmm_(dY, W);
  }

 private:
  const Tensor& dS;
  const optional<Tensor>& mask;
  Tensor dX, A_rows;
  int64_t R;
};

// ---- operators: one stage -----------------------------------------------------------------------

std::tuple<Tensor, Tensor> shrink(const Tensor& X, const Tensor& A, double c,
                                  const optional<Tensor>& scale, int64_t t,
                                  const optional<Tensor>& seed) {
  const Shrink stage(X, A, c, scale, t, seed);
  Parts::of_rows(X.size(0)).run(stage);
  return {stage.S, stage.mask};
}

Tensor expand(const Tensor& X, const Tensor& W, const optional<Tensor>& bias, const Tensor& S,
              const Tensor& B, at::IntArrayRef splits, const c10::List<bool>& enabled,
              int64_t interleave) {
  const Layout layout(splits, enabled, interleave);
  Expand stage(X, W, bias, S, B, layout);
  Parts::of_rows(X.size(0)).run(stage);
  return stage.add_base(X, W);
}

std::tuple<Tensor, Tensor> grad_expand(const Tensor& dY, const optional<Tensor>& S, const Tensor& B,
                                       double c, const optional<Tensor>& scale,
                                       at::IntArrayRef splits, const c10::List<bool>& enabled,
                                       int64_t interleave, bool need_dS, bool need_dB) {
  const Layout layout(splits, enabled, interleave);
  const auto parts = Parts::of_rows(dY.size(0), B.size(1));
  const GradExpand stage(dY, S, B, c, scale, layout, parts, need_dS, need_dB);
  parts.run(stage);
  return {stage.dS, stage.add_up()};
}

Tensor grad_shrink(const Tensor& dS, const Tensor& X, const optional<Tensor>& mask,
                   const Tensor& A) {
  const GradShrink stage(dS, X, mask, A);
  Parts::of_columns(X.size(1), X.size(0)).run(stage);
  return stage.narrowed();
}

Tensor grad_input(const Tensor& dY, const Tensor& W, const optional<Tensor>& dS, const Tensor& A,
                  const optional<Tensor>& mask) {
  if (!dS) return dY.mm(W);
  GradInput stage(dY, W, *dS, A, mask);
  Parts::of_columns(W.size(1), dY.size(0)).run(stage);
  return stage.add_base(dY, W);
}

Tensor delta(const Tensor& A, const Tensor& B, double scaling, const optional<Tensor>& scale,
             at::IntArrayRef splits, const c10::List<bool>& enabled, int64_t interleave) {
  const Layout layout(splits, enabled, interleave);
  check_operand("B", B, B.scalar_type());
  check_operand("A", A, B.scalar_type());
  const int64_t r = B.size(1), K = A.size(1);
  check_matrix("B", B, layout.rows_of_B, r);
  check_matrix("A", A, layout.groups * r, K);
  const auto wide = accumulation_type(B);
  Tensor dW = at::zeros({layout.N, K}, B.options());
  const Tensor A_rows = pack_rows(A, wide), B_rows = pack_rows(B, wide);
  const double factor = times(scaling, scale);
  for (const Span& span : layout.spans) {
    const Packed B_g = packed(B_rows, span.row * B_rows.size(1));
    const Packed A_g = packed(A_rows, span.g * r * A_rows.size(1));
    const Matrix rows = rows_of(dW, span.column, span.width);
    for_factor_rows(span.width, K, [&](int64_t begin, int64_t end) {
      stages_for(B).delta(B_g, r, A_g, factor, rows, begin, end);
    });
  }
  return dW;
}

// ---- operators: one direction -------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& X, const Tensor& W,
                                           const optional<Tensor>& bias, const Tensor& A,
                                           const Tensor& B, double c, const optional<Tensor>& scale,
                                           int64_t t, const optional<Tensor>& seed,
                                           at::IntArrayRef splits, const c10::List<bool>& enabled,
                                           int64_t interleave) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Layout layout(splits, enabled, interleave);
  const Shrink shrink(X, A, c, scale, t, seed);
  Expand expand(X, W, bias, shrink.S, B, layout);
  Parts::of_rows(X.size(0)).run(shrink, expand);
  return {expand.add_base(X, W), shrink.S, shrink.mask};
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
  // its sums and packed factor are gone before anything else is allocated
  const auto [dS, dB] =
      grad_expand(dY, S, B, c, scale, splits, enabled, interleave, need_dX || need_dA, need_dB);
  optional<GradShrink> shrink;
  optional<GradInput> input;
  if (need_dA) shrink.emplace(dS, *X, mask, *A);
  if (need_dX) input.emplace(dY, *W, dS, *A, mask);
  if (shrink || input) Parts::of_columns(A->size(1), dY.size(0)).run(shrink, input);
  return {input ? input->add_base(dY, *W) : at::empty({0}, dY.options()),
          shrink ? shrink->narrowed() : at::empty({0}, B.options()), dB};
}

// ---- merging ------------------------------------------------------------------------------------

// elements of a weight that a thread is woken for; whole pieces of csrc/cpu/merge.h
constexpr int64_t kChunk = 1 << 14;

Tensor add_low_rank(const Tensor& base, const Tensor& left, const Tensor& right,
                    const Tensor& row_scale, const optional<Tensor>& column_scale) {
  const int64_t n = base.size(0), k = base.size(1), r = left.size(1);
  check_matrix("base", base, n, k);
  check_matrix("left", left, n, r);
  check_matrix("right", right, r, k);
  check_matrix("row_scale", row_scale, n, 1);
  if (column_scale) check_matrix("column_scale", *column_scale, 1, k);
  for (const Tensor* t : {&left, &right, &row_scale, column_scale ? &*column_scale : &right})
    TORCH_CHECK_TYPE(t->scalar_type() == at::kDouble, "factors and scales: got dtype ",
                     t->scalar_type(), ", expected float64");
  const Tensor rows = left.contiguous(), columns = pack_rows(right, at::kDouble);
  const Tensor of_rows = row_scale.contiguous();
  optional<Tensor> of_columns;
  if (column_scale) of_columns = pack_rows(*column_scale, at::kDouble);
  Tensor out = at::empty({n, k}, base.options());
  at::parallel_for(0, n, std::max<int64_t>(1, kChunk / std::max<int64_t>(1, k)),
                   [&](int64_t begin, int64_t end) {
                     stages_for(base).add_low_rank(
                         matrix(base), packed(rows), r, packed(columns), of_rows.data_ptr<double>(),
                         of_columns ? of_columns->data_ptr<double>() : nullptr, matrix(out), begin,
                         end);
                   });
  return out;
}

at::ScalarType integer_type(const Tensor& t) {
  return t.element_size() == 2 ? at::kShort : t.element_size() == 4 ? at::kInt : at::kLong;
}

template <class F>
void for_each_chunk(int64_t n, const F& f) {
  at::parallel_for(0, (n + kChunk - 1) / kChunk, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk)
      f(chunk, chunk * kChunk, std::min(n, (chunk + 1) * kChunk));
  });
}

std::tuple<int64_t, Tensor, Tensor, Tensor> encode_correction(const Tensor& predicted,
                                                              const Tensor& exact) {
  check(predicted.sizes() == exact.sizes() && predicted.scalar_type() == exact.scalar_type(),
        "predicted", predicted, exact.sizes());
  const int64_t n = exact.numel();
  TORCH_CHECK_VALUE(n <= INT32_MAX, "exact: got ", n, " elements, expected at most ", INT32_MAX);
  const Tensor p = predicted.contiguous(), e = exact.contiguous();
  const Stages& stages = stages_for(e);

  // of each chunk and width of code, how many distances there are to list
  std::vector<std::array<int64_t, std::size(kCodeBits)>> outside((n + kChunk - 1) / kChunk);
  for_each_chunk(n, [&](int64_t chunk, int64_t begin, int64_t end) {
    stages.count_distances(p.data_ptr(), e.data_ptr(), begin, end, outside[chunk].data());
  });
  size_t best = 0;
  int64_t least = INT64_MAX;
  for (size_t b = 0; b < std::size(kCodeBits); ++b) {
    int64_t size = n * kCodeBits[b] / 8;
    for (const auto& of_chunk : outside) size += of_chunk[b] * (4 + exact.element_size());
    if (size < least) best = b, least = size;
  }
  const auto integers = exact.options().dtype(integer_type(exact));
  if (least >= n * exact.element_size()) {
    const Tensor none = at::empty({0}, integers);
    return {-1, none, none, e.is_same(exact) ? e.clone() : e};
  }

  const int bits = kCodeBits[best];
  std::vector<int64_t> offset(outside.size() + 1);
  for (size_t i = 0; i < outside.size(); ++i) offset[i + 1] = offset[i] + outside[i][best];
  const int64_t escapes = offset.back();
  Tensor codes = at::empty({(n * bits + 7) / 8}, exact.options().dtype(at::kByte));
  Tensor escaped = at::empty({escapes}, exact.options().dtype(at::kInt));
  Tensor values = at::empty({escapes}, integers);
  for_each_chunk(n, [&](int64_t chunk, int64_t begin, int64_t end) {
    stages.encode_correction(
        p.data_ptr(), e.data_ptr(), begin, end, bits, codes.data_ptr<uint8_t>(),
        escaped.data_ptr<int32_t>() + offset[chunk],
        static_cast<char*>(values.data_ptr()) + offset[chunk] * values.element_size());
  });
  return {bits, codes, escaped, values};
}

Tensor decode_correction(const Tensor& predicted, int64_t bits, const Tensor& codes,
                         const Tensor& escaped, const Tensor& values) {
  const int64_t n = predicted.numel(), escapes = escaped.numel();
  TORCH_CHECK_VALUE(bits == 0 || bits == 2 || bits == 4 || bits == 8, "bits: got ", bits,
                    ", expected 0, 2, 4 or 8");
  check(codes.numel() == (n * bits + 7) / 8, "codes", codes, {(n * bits + 7) / 8});
  check(values.numel() == escapes, "values", values, {escapes});
  TORCH_CHECK_TYPE(values.scalar_type() == integer_type(predicted), "values: got dtype ",
                   values.scalar_type(), ", expected ", integer_type(predicted));
  const Tensor p = predicted.contiguous(), c = codes.contiguous();
  const Tensor places = escaped.contiguous(), v = values.contiguous();
  Tensor out = at::empty(predicted.sizes(), predicted.options());
  const int32_t* place = places.data_ptr<int32_t>();
  for_each_chunk(n, [&](int64_t, int64_t begin, int64_t end) {
    // in order of their places
    const int64_t first = std::lower_bound(place, place + escapes, begin) - place;
    const int64_t last = std::lower_bound(place + first, place + escapes, end) - place;
    stages_for(p).decode_correction(
        p.data_ptr(), begin, end, int(bits), c.data_ptr<uint8_t>(), place + first,
        static_cast<const char*>(v.data_ptr()) + first * v.element_size(), last - first,
        out.data_ptr());
  });
  return out;
}

// of elements in any order, so that a block without gaps in memory is read where it is
int64_t sum_bits(const Tensor& weight) {
  const Tensor dense = weight.is_non_overlapping_and_dense() ? weight : weight.contiguous();
  const char* data = static_cast<const char*>(dense.data_ptr());
  const auto sum_of = [&](int64_t begin, int64_t end, uint64_t sum) {
    return sum + stages_for(dense).sum_bits(data + begin * dense.element_size(), end - begin);
  };
  return int64_t(
      at::parallel_reduce(0, dense.numel(), kChunk, uint64_t(0), sum_of, std::plus<uint64_t>()));
}

}  // namespace

TORCH_LIBRARY(fastlora, m) {
  m.def(
      "add_low_rank(Tensor base, Tensor left, Tensor right, Tensor row_scale, "
      "Tensor? column_scale) -> Tensor");
  m.def(
      "encode_correction(Tensor predicted, Tensor exact) -> (int bits, Tensor codes, "
      "Tensor escaped, Tensor values)");
  m.def(
      "decode_correction(Tensor predicted, int bits, Tensor codes, Tensor escaped, "
      "Tensor values) -> Tensor");
  m.def("sum_bits(Tensor weight) -> int");
}

TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("forward", forward);
  m.impl("backward", backward);
  m.impl("shrink", shrink);
  m.impl("expand", expand);
  m.impl("grad_expand", grad_expand);
  m.impl("grad_shrink", grad_shrink);
  m.impl("grad_input", grad_input);
  m.impl("delta", delta);
  m.impl("add_low_rank", add_low_rank);
  m.impl("encode_correction", encode_correction);
  m.impl("decode_correction", decode_correction);
  m.impl("sum_bits", sum_bits);
}

}  // namespace fastlora

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
        info["instruction_set"] = fastlora::kernels().name;
        info["vector_bits"] = 8 * fastlora::kernels().vector_bytes;
        return info;
      },
      "What the extension was built with, and which of its builds runs here.");
}
