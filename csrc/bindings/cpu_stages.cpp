// The stages on CPU tensors, as operators.
//
// csrc/cpu works on ranges of rows; here threads, buffers and the base products are added. A base
// product is added in place, to what a stage has left there.

#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu.h"

namespace fastlora::cpu {

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

namespace {

// a multiple of every register tile's rows
constexpr int64_t kRowStep = 8;
// rows of X that layers in turn work on while they are in cache
constexpr int64_t kSharedRows = 64;

// `count` rows of t from `first` on
Matrix rows_of(const Tensor& t, int64_t first, int64_t count) {
  return block_of(t, first, count, 0, t.size(1));
}

// `count` columns of t from `first` on
Matrix columns_of(const Tensor& t, int64_t first, int64_t count) {
  return block_of(t, 0, t.size(0), first, count);
}

Matrix transposed(const Matrix& m) {
  return {m.data, m.dtype, m.cols, m.rows, m.col_stride, m.row_stride};
}

// the mask of the columns from `column` on, a multiple of 8
Mask mask_of(const optional<Tensor>& mask, int64_t column) {
  return mask ? Mask{mask->data_ptr<uint8_t>() + column / 8, mask->size(1)} : Mask{};
}

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
  template <class Stage>
  static void run_one(const std::vector<Stage>& stages, int64_t part, int64_t begin, int64_t end) {
    for (const Stage& stage : stages) run_one(stage, part, begin, end);
  }
};

// Blocks of fastlora/blocks.py, spelled out
struct Layout {
  std::vector<Span> spans;
  int64_t groups = 0, rows_of_B = 0, packed = 0;

  Layout(at::IntArrayRef splits, const c10::List<bool>& enabled, int64_t interleave) {
    check_blocks(splits, enabled, interleave);
    int64_t pattern = 0;
    for (const int64_t n : splits) pattern += n / interleave;
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

  // one block that is all of the output
  explicit Layout(int64_t N) : Layout({N}, one_block(), 1) {}

  int64_t N = 0;
  Spans view() const { return {groups, spans.data(), int64_t(spans.size())}; }
};

double times(double c, const optional<Tensor>& scale) {
  return scale ? c * scale->item<double>() : c;
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
    const Checks check("X", X, at::kCPU);
    check.factor("A", A, R, X.size(1));
    check.dropout(t, seed);
    S = at::empty({X.size(0), R}, X.options().dtype(check.wide));
    mask = at::empty({t ? X.size(0) : 0, mask_bytes(X.size(1))}, X.options().dtype(at::kByte));
    At = pack_transposed(A, check.wide);
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
    const Checks check("X", X, at::kCPU);
    check.operand("W", W, layout.N, X.size(1));
    check.factor("B", B, layout.rows_of_B, r);
    check.sums("S", S, X.size(0), layout.groups * r);
    if (bias) check.bias(*bias, layout.N);
    Y = at::empty({X.size(0), layout.N}, X.options());
    Bt = pack_spans(B, layout, check.wide);
    // read as vectors from any column on
    if (bias) b = pack_rows(bias->unsqueeze(0), check.wide, kPadding);
  }

  void run(int64_t, int64_t begin, int64_t end) const {
    const Packed row = b ? packed(*b) : Packed{};
    stages_for(Y).expand(packed(S), r, packed(Bt), b ? &row : nullptr, layout.view(), matrix(Y),
                         begin, end);
  }

  // A block that is not adapted has the bits of the plain layer: it is torch's product.
  Tensor add_base(const Tensor& X, const Tensor& W) {
    if (layout.rows_of_B < layout.N)
      Y.addmm_(X, W.t());
    else
      add_base_product(Y, X, W.t());
    return Y;
  }

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
    const Checks check("dY", dY, at::kCPU);
    check.matrix("dY", dY, M, layout.N);
    check.factor("B", B, layout.rows_of_B, r);
    TORCH_CHECK_VALUE(S || !need_dB, "S: got none, expected it for dB");
    if (S) check.sums("S", *S, M, R);
    const auto options = dY.options().dtype(check.wide);
    dS = need_dS ? at::empty({M, R}, options) : at::empty({0}, options);
    dB = at::empty(need_dB ? B.sizes() : at::IntArrayRef{0}, B.options());
    if (need_dS) B_rows = pack_rows(B, check.wide);
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
    const Checks check("X", X, at::kCPU);
    const int64_t M = X.size(0), K = X.size(1), stride = round_up(K, kPadding);
    check.sums("dS", dS, M, R);
    check.factor("A", A, R, K);
    check.mask(mask, M, K);
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

// Runs on columns, in the visit of GradShrink: fills dX, or adds to it.
struct GradInput {
  GradInput(const Tensor& dX, bool add, const Tensor& dS, const Tensor& A,
            const optional<Tensor>& mask)
      : dS(dS), mask(mask), dX(dX), add(add), R(A.size(0)) {
    const Checks check("dX", dX, at::kCPU);
    const int64_t M = dX.size(0), K = dX.size(1);
    check.sums("dS", dS, M, R);
    check.factor("A", A, R, K);
    check.mask(mask, M, K);
    A_rows = pack_rows(A, dS.scalar_type());
  }

  void run(int64_t, int64_t begin, int64_t end) const {
    stages_for(dX).grad_input(packed(dS), R, packed(A_rows, begin), mask_of(mask, begin), add,
                              columns_of(dX, begin, end - begin), 0, dX.size(0));
  }

 private:
  const Tensor& dS;
  const optional<Tensor>& mask;
  Tensor dX, A_rows;
  bool add;
  int64_t R;
};

Tensor empty_dX(const Tensor& dY, const Tensor& W) {
  const Checks check("dY", dY, at::kCPU);
  check.operand("W", W, dY.size(1), W.size(-1));
  return at::empty({dY.size(0), W.size(1)}, dY.options());
}

void add_base(Tensor& dX, const Tensor& dY, const Tensor& W) {
  if (is_thin(dX))
    dX.add_(dY.mm(W));
  else
    add_base_product(dX, dY, W);
}

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
  Tensor dX = empty_dX(dY, W);
  const GradInput stage(dX, false, *dS, A, mask);
  Parts::of_columns(W.size(1), dY.size(0)).run(stage);
  add_base(dX, dY, W);
  return dX;
}

Tensor delta(const Tensor& A, const Tensor& B, double scaling, const optional<Tensor>& scale,
             at::IntArrayRef splits, const c10::List<bool>& enabled, int64_t interleave) {
  const Layout layout(splits, enabled, interleave);
  const Checks check("B", B, at::kCPU);
  const int64_t r = B.size(1), K = A.size(1);
  check.matrix("B", B, layout.rows_of_B, r);
  check.operand("A", A, layout.groups * r, K);
  Tensor dW = at::zeros({layout.N, K}, B.options());
  const Tensor A_rows = pack_rows(A, check.wide), B_rows = pack_rows(B, check.wide);
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

// Stays where it is made: what is in it refers to it.
struct Forward {
  const Layout layout;
  const Shrink shrink;
  Expand expand;

  Forward(const Tensor& X, const Tensor& W, const optional<Tensor>& bias, const Tensor& A,
          const Tensor& B, double c, const optional<Tensor>& scale, int64_t t,
          const optional<Tensor>& seed, const Layout& layout)
      : layout(layout),
        shrink(X, A, c, scale, t, seed),
        expand(X, W, bias, shrink.S, B, this->layout) {}
  Forward(const Forward&) = delete;

  void run(int64_t part, int64_t begin, int64_t end) const {
    shrink.run(part, begin, end);
    expand.run(part, begin, end);
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& X, const Tensor& W,
                                           const optional<Tensor>& bias, const Tensor& A,
                                           const Tensor& B, double c, const optional<Tensor>& scale,
                                           int64_t t, const optional<Tensor>& seed,
                                           at::IntArrayRef splits, const c10::List<bool>& enabled,
                                           int64_t interleave) {
  at::AutoDispatchBelowADInplaceOrView guard;
  Forward layer(X, W, bias, A, B, c, scale, t, seed, Layout(splits, enabled, interleave));
  Parts::of_rows(X.size(0)).run(layer);
  return {layer.expand.add_base(X, W), layer.shrink.S, layer.shrink.mask};
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
  Tensor dX = need_dX ? empty_dX(dY, *W) : at::empty({0}, dY.options());
  optional<GradShrink> shrink;
  optional<GradInput> input;
  if (need_dA) shrink.emplace(dS, *X, mask, *A);
  if (need_dX) input.emplace(dX, false, dS, *A, mask);
  if (shrink || input) Parts::of_columns(A->size(1), dY.size(0)).run(shrink, input);
  if (need_dX) add_base(dX, dY, *W);
  return {dX, shrink ? shrink->narrowed() : at::empty({0}, B.options()), dB};
}

// ---- operators: one direction of layers that share X --------------------------------------------

struct ForwardAll {
  std::vector<optional<Forward>> layers;

  void run(int64_t part, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; i += kSharedRows)
      for (const auto& layer : layers)
        if (layer) layer->run(part, i, std::min(end, i + kSharedRows));
  }
};

std::tuple<Tensors, Tensors, Tensors> multi_forward(const Tensor& X, at::TensorList W,
                                                    const OptionalTensors& bias, at::TensorList A,
                                                    at::TensorList B, at::ArrayRef<double> c,
                                                    const OptionalTensors& scale, at::IntArrayRef t,
                                                    const OptionalTensors& seed) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const size_t count = W.size();
  check_counts(count, bias, A, B, c, scale, t, seed);
  ForwardAll all{std::vector<optional<Forward>>(count)};
  for (size_t i = 0; i < count; ++i)
    if (rank(B[i]))
      all.layers[i].emplace(X, W[i], bias.get(i), A[i], B[i], c[i], scale.get(i), t[i], seed.get(i),
                            Layout(W[i].size(0)));
  Parts::of_rows(X.size(0)).run(all);
  Tensors Y, S, mask;
  for (size_t i = 0; i < count; ++i) {
    auto& layer = all.layers[i];
    Y.push_back(layer ? layer->expand.add_base(X, W[i]) : at::linear(X, W[i], bias.get(i)));
    S.push_back(layer ? layer->shrink.S : no_S(X));
    mask.push_back(layer ? layer->shrink.mask : no_mask(X));
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
  const auto weights = W.vec(), factors = A.vec(), masks = mask.vec();
  Tensor dX = need_dX ? empty_dX(dY[0], given("W", weights[0])) : at::empty({0}, dY[0].options());
  Tensors dS(count), dA(count), dB(count);
  std::vector<optional<GradShrink>> shrinks(count);
  std::vector<optional<GradInput>> inputs(count);
  bool filled = false;
  for (size_t i = 0; i < count; ++i) {
    dA[i] = no_gradient(factors[i], need_dA.get(i), B[i]);
    dB[i] = no_gradient(B[i], need_dB.get(i), B[i]);
    if (!rank(B[i])) continue;
    if (need_dX || need_dA.get(i) || need_dB.get(i))
      std::tie(dS[i], dB[i]) =
          grad_expand(dY[i], S.get(i), B[i], c[i], scale.get(i), {B[i].size(0)}, one_block(), 1,
                      need_dX || need_dA.get(i), need_dB.get(i));
    if (need_dA.get(i)) shrinks[i].emplace(dS[i], given("X", X), masks[i], given("A", factors[i]));
    if (need_dX)
      inputs[i].emplace(dX, std::exchange(filled, true), dS[i], given("A", factors[i]), masks[i]);
  }
  const int64_t K = need_dX ? dX.size(1) : X ? X->size(1) : 0;
  Parts::of_columns(K, dY[0].size(0)).run(shrinks, inputs);
  for (size_t i = 0; i < count; ++i) {
    if (shrinks[i]) dA[i] = shrinks[i]->narrowed();
    if (need_dX && std::exchange(filled, true))
      add_base(dX, dY[i], given("W", weights[i]));
    else if (need_dX)
      at::mm_out(dX, dY[i], given("W", weights[i]));
  }
  return {dX, dA, dB};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("forward", forward);
  m.impl("backward", backward);
  m.impl("multi_forward", multi_forward);
  m.impl("multi_backward", multi_backward);
  m.impl("shrink", shrink);
  m.impl("expand", expand);
  m.impl("grad_expand", grad_expand);
  m.impl("grad_shrink", grad_shrink);
  m.impl("grad_input", grad_input);
  m.impl("delta", delta);
}

}  // namespace fastlora::cpu
