// Every stage of csrc/cuda on the emulated device, against plain loops over doubles.
//
// Operands are small integers and factors powers of two, so that sums are exact in any order and
// comparisons are for equality; how sums of other numbers are rounded is tested at the end. All
// that is no element of an operand is NaN, and stays what it was. Buffers have the size that a
// stage may touch, for AddressSanitizer to see the first byte beyond. Each stage runs twice, as
// threads come in another order each time. Prints what was run.

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "fastlora/dropout.cuh"
#include "fastlora/fused.h"
#include "fastlora/merge.h"
#include "fastlora/numbers.cuh"
#include "fastlora/quad.cuh"
#include "fastlora/stack.cuh"
#include "fastlora/stages.h"

using namespace fastlora::cuda;

namespace {

#define CHECK(condition)                                                                   \
  do {                                                                                     \
    if (condition) break;                                                                  \
    std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, what.c_str(), #condition); \
    std::exit(1);                                                                          \
  } while (false)

// what is being tested: stage, dtypes, sizes
std::string what;
std::mt19937 generator;
int draw_integer(int least, int most) {
  return std::uniform_int_distribution<int>(least, most)(generator);
}
// of the device, too, so that the order of threads is another
const auto& fiber_device = fastlora::emulation::device;

// ---- numbers ------------------------------------------------------------------------------------

int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }
const char* name_of(Dtype dtype) {
  const char* names[] = {"f32", "bf16", "f16"};
  return names[int(dtype)];
}

double read(Dtype dtype, const void* p) { return load(p, dtype, 0); }
void write(Dtype dtype, void* p, double x) { store(p, dtype, 0, float(x)); }
double rounded(Dtype dtype, double x) {
  float place;
  write(dtype, &place, x);
  return read(dtype, &place);
}
bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// ---- matrices -----------------------------------------------------------------------------------

// NaN in every dtype
constexpr char kCanary = char(0xFF);

enum Strides { kDense, kPadded, kOdd, kTransposed, kSpread, kBackwards, kLayouts };

// A matrix in memory of its own.
struct Grid {
  Dtype dtype;
  int64_t rows, cols, row_stride, col_stride, first = 0;
  std::vector<char> bytes;

  Grid(Dtype dtype, int64_t rows, int64_t cols, int layout = kDense)
      : dtype(dtype), rows(rows), cols(cols), row_stride(cols), col_stride(1) {
    if (layout == kPadded) row_stride = cols + 8, first = 8;
    if (layout == kOdd) row_stride = cols + 3, first = 1;
    if (layout == kTransposed) row_stride = 1, col_stride = rows;
    if (layout == kSpread) row_stride = 3 * cols + 2, col_stride = 3;
    if (layout == kBackwards)
      row_stride = -cols, col_stride = -1, first = std::max<int64_t>(0, rows * cols - 1);
    const int64_t last = std::max<int64_t>(0, (rows - 1) * row_stride + (cols - 1) * col_stride);
    bytes.assign(rows && cols ? (first + 1 + last) * size_of(dtype) : 0, kCanary);
  }

  char* data() { return bytes.empty() ? nullptr : bytes.data() + first * size_of(dtype); }
  char* place(int64_t i, int64_t j) {
    return data() + (i * row_stride + j * col_stride) * size_of(dtype);
  }
  double at(int64_t i, int64_t j) { return read(dtype, place(i, j)); }
  Matrix view() { return {data(), dtype, rows, cols, row_stride, col_stride}; }
  float* floats() { return reinterpret_cast<float*>(data()); }

  Grid& fill(const std::function<double(int64_t, int64_t)>& value) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) write(dtype, place(i, j), value(i, j));
    return *this;
  }
  Grid& fill_with_integers(int most = 2) {
    return fill([=](int64_t, int64_t) { return draw_integer(-most, most); });
  }

  // that the elements are these values, each rounded once, and that nothing else was written
  void check(const std::function<double(int64_t, int64_t)>& expected) {
    std::vector<char> rest = bytes;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) {
        CHECK(same(at(i, j), rounded(dtype, expected(i, j))));
        std::memset(rest.data() + (place(i, j) - bytes.data()), kCanary, size_of(dtype));
      }
    for (const char byte : rest) CHECK(byte == kCanary);
  }
};

// Runs a stage on outputs that it has not seen, twice; the bits must be the same.
void twice(const std::vector<Grid*>& outputs, size_t workspace,
           const std::function<cudaError_t(void* workspace)>& stage) {
  std::vector<std::vector<char>> fresh, bits;
  for (Grid* out : outputs) fresh.push_back(out->bytes);
  for (int run = 0; run < 2; ++run) {
    std::vector<char> room(workspace, kCanary);
    for (size_t i = 0; i < outputs.size(); ++i) outputs[i]->bytes = fresh[i];
    CHECK(stage(room.data()) == cudaSuccess);
    for (size_t i = 0; i < outputs.size(); ++i)
      if (run)
        CHECK(outputs[i]->bytes == bits[i]);
      else
        bits.push_back(outputs[i]->bytes);
  }
}

// ---- dropout ------------------------------------------------------------------------------------

constexpr int64_t kSeed = 0x123456789ABCDEF0;
const uint32_t kThresholds[] = {0, 6554, 32768, 65536};

// As the paper has it, one word at a time.
struct Words {
  uint32_t w[4];
};
Words plain_philox(Words c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 7; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53) * c.w[0], p1 = uint64_t(0xCD9E8D57) * c.w[2];
    c = {{uint32_t(p1 >> 32) ^ c.w[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.w[3] ^ k1,
          uint32_t(p0)}};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c;
}

uint8_t plain_byte(uint64_t index, int64_t seed, uint32_t t) {
  const Words words = plain_philox({{uint32_t(index), uint32_t(index >> 32), 0, 0}}, uint32_t(seed),
                                   uint32_t(uint64_t(seed) >> 32));
  uint8_t byte = 0;
  for (int b = 0; b < 8; ++b) byte |= (words.w[b / 2] >> 16 * (b % 2) & 0xFFFF) >= t ? 1 << b : 0;
  return byte;
}

// The packed mask, as fastlora/dropout.py describes it.
struct Bits {
  int64_t M, K, row_bytes;
  std::vector<uint8_t> bytes;

  Bits(int64_t M, int64_t K, uint32_t t, int64_t seed = kSeed)
      : M(M), K(K), row_bytes(mask_bytes(K)) {
    for (int64_t i = 0; i < M * row_bytes; ++i) {
      const int64_t inside = std::min<int64_t>(8, std::max<int64_t>(0, K - i % row_bytes * 8));
      bytes.push_back(plain_byte(uint64_t(i), seed, t) & ((1 << inside) - 1));
    }
  }
  bool at(int64_t i, int64_t k) const { return bytes[i * row_bytes + k / 8] >> k % 8 & 1; }
};

void test_known_answers() {
  what = "philox";
  const uint32_t ones = 0xFFFFFFFF;
  const struct {
    Words counter;
    uint32_t k0, k1;
    Words words;
  } published[] = {
      {{{0, 0, 0, 0}}, 0, 0, {{0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48}}},
      {{{ones, ones, ones, ones}}, ones, ones, {{0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662}}},
      {{{0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344}},
       0xA4093822,
       0x299F31D0,
       {{0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A}}},
  };
  for (const auto& [c, k0, k1, words] : published) {
    const uint4 found = philox({c.w[0], c.w[1], c.w[2], c.w[3]}, {k0, k1});
    const Words plain = plain_philox(c, k0, k1);
    CHECK(found.x == words.w[0] && found.y == words.w[1]);
    CHECK(found.z == words.w[2] && found.w == words.w[3]);
    CHECK(!std::memcmp(&plain, &words, sizeof plain));
  }
}

void test_bytes_of_the_mask() {
  what = "bytes of the mask";
  const uint4 ones = {0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF};
  const auto check = [&](const Dropped& dropped, uint8_t byte) {
    CHECK(uint8_t(byte_of(dropped)) == byte);
    const uint4 kept = dropped.keep(ones);
    const uint32_t words[] = {kept.x, kept.y, kept.z, kept.w};
    for (int b = 0; b < 8; ++b)
      CHECK((words[b / 2] >> 16 * (b % 2) & 0xFFFF) == (byte >> b & 1 ? 0xFFFF : 0));
  };
  for (int byte = 0; byte < 256; ++byte) check(dropped_by(byte), uint8_t(byte));
  // on both sides of where the index takes more than 32 bits
  const uint64_t boundary = uint64_t(1) << 32;
  for (const uint32_t t : {0u, 1u, 6554u, 32767u, 32768u, 32769u, 65535u, 65536u})
    for (uint64_t index = boundary - 500; index < boundary + 500; ++index)
      check(draw(index, halves(uint64_t(kSeed)), limit_of(t)), plain_byte(index, kSeed, t));
  // a lane that is the threshold itself is kept
  for (int b = 0; b < 8; ++b) {
    const uint32_t lane = plain_philox({}, 0, 0).w[b / 2] >> 16 * (b % 2) & 0xFFFF;
    CHECK(byte_of(draw(0, {}, limit_of(lane))) >> b & 1);
    CHECK(!(byte_of(draw(0, {}, limit_of(lane + 1))) >> b & 1));
  }
}

// ---- stages -------------------------------------------------------------------------------------

struct Dtypes {
  Dtype X, factors;
};
const Dtypes kDtypes[] = {{Dtype::bf16, Dtype::bf16},
                          {Dtype::f16, Dtype::f16},
                          {Dtype::f32, Dtype::f32},
                          {Dtype::bf16, Dtype::f32},
                          {Dtype::f16, Dtype::f32}};

// a factor's integers: where it is float32, so large that one number of 16 bits does not hold them
int most_of(Dtypes dtypes) { return dtypes.factors == Dtype::f32 ? 3000 : 2; }

constexpr float kC = 0.5f, kScale = 4;
const Factor kFactor = {kC, &kScale};

size_t shrink_workspace(const Matrix& X, const ShrinkLayer& layer) {
  return shrink_workspace(X, &layer, 1);
}
cudaError_t shrink(const Matrix& X, const ShrinkLayer& layer, void* workspace) {
  return shrink(X, &layer, 1, workspace, nullptr);
}
size_t grad_shrink_workspace(const Matrix& X, const GradShrinkLayer& layer, const Matrix& dX) {
  return grad_shrink_workspace(X, &layer, 1, dX);
}
cudaError_t grad_shrink(const Matrix& X, const GradShrinkLayer& layer, const Matrix& dX,
                        void* workspace) {
  return grad_shrink(X, &layer, 1, dX, workspace, nullptr);
}

void test_shrink(Dtypes dtypes, int64_t M, int64_t K, int64_t R, uint32_t t, int layout) {
  Grid X(dtypes.X, M, K, layout), A(dtypes.factors, R, K, layout), S(Dtype::f32, M, R);
  X.fill_with_integers();
  A.fill_with_integers(most_of(dtypes));
  const Bits bits(M, K, t);
  // one float for four bytes of the mask
  Grid mask(Dtype::f32, t ? M : 0, bits.row_bytes / 4);
  if (t >= 65536 && M && K) write(dtypes.X, X.place(0, 0), NAN);
  const auto layer = [&]() -> ShrinkLayer {
    return {A.view(), kFactor, t, &kSeed, reinterpret_cast<uint8_t*>(mask.data()), S.floats()};
  };
  twice({&S, &mask}, shrink_workspace(X.view(), layer()),
        [&](void* workspace) { return shrink(X.view(), layer(), workspace); });
  S.check([&](int64_t i, int64_t r) {
    double sum = 0;
    for (int64_t k = 0; k < K; ++k)
      if (!t || bits.at(i, k)) sum += X.at(i, k) * A.at(r, k);
    return kC * kScale * sum;
  });
  const auto drawn = mask.bytes.begin();
  CHECK(!t || std::equal(bits.bytes.begin(), bits.bytes.end(), drawn,
                         [](uint8_t a, char b) { return a == uint8_t(b); }));
}

std::string sizes(std::initializer_list<int64_t> numbers) {
  std::string text;
  for (const int64_t n : numbers) text += " " + std::to_string(n);
  return text;
}

// Few for float16, and no more than these below: it differs from bfloat16 in little.
std::vector<int64_t> ranks_for(Dtypes dtypes) {
  if (dtypes.X == Dtype::f16) return {3, 33};
  return {1, 3, 8, 16, 33, 64, 100};
}

void test_shrinks() {
  const auto run = [](Dtypes dtypes, int64_t M, int64_t K, int64_t R, uint32_t t, int layout) {
    what = std::string("shrink ") + name_of(dtypes.X) + " " + name_of(dtypes.factors) +
           " M, K, R, t, layout:" + sizes({M, K, R, t, layout});
    test_shrink(dtypes, M, K, R, t, layout);
  };
  for (const Dtypes& dtypes : kDtypes) {
    for (const int64_t R : ranks_for(dtypes)) run(dtypes, 37, 136, R, 6554, kDense);
    if (dtypes.X == Dtype::f16) continue;
    for (const int64_t K : {0, 8, 24, 33, 1032, 2184}) run(dtypes, 5, K, 9, 32768, kDense);
    for (const int64_t M : {0, 1, 32, 70}) run(dtypes, M, 160, 24, 6554, kPadded);
    for (const uint32_t t : kThresholds)
      for (const int layout : {kDense, kPadded}) run(dtypes, 33, 264, 16, t, layout);
    for (int layout = 0; layout < kLayouts; ++layout) run(dtypes, 19, 40, 5, 6554, layout);
    run(dtypes, 9, 40, 0, 6554, kDense);
  }
}

void test_grad_input(Dtypes dtypes, int64_t M, int64_t K, int64_t R, uint32_t t, int layout) {
  Grid dS(Dtype::f32, M, R), A(dtypes.factors, R, K, layout), dX(dtypes.X, M, K, layout);
  dS.fill_with_integers(3000);
  A.fill_with_integers();
  const Bits bits(M, K, t);
  const bool adds = (M + K + R) % 2;
  if (adds) dX.fill_with_integers();
  Grid before = dX;
  twice({&dX}, grad_input_workspace(A.view(), dX.view()), [&](void* workspace) {
    return grad_input(dS.floats(), A.view(), t ? bits.bytes.data() : nullptr, dX.view(), adds,
                      workspace, nullptr);
  });
  dX.check([&](int64_t i, int64_t k) {
    double sum = 0;
    for (int64_t r = 0; r < R; ++r) sum += dS.at(i, r) * A.at(r, k);
    return (t && !bits.at(i, k) ? 0 : sum) + (adds ? before.at(i, k) : 0);
  });
}

void test_grad_shrink(Dtypes dtypes, int64_t M, int64_t K, int64_t R, uint32_t t, int layout,
                      bool with_dX) {
  Grid dS(Dtype::f32, M, R), X(dtypes.X, M, K, layout), A(dtypes.factors, R, K, layout);
  Grid dA(dtypes.factors, R, K, layout), dX(dtypes.X, M, K, layout);
  dS.fill_with_integers(3000);
  X.fill_with_integers();
  A.fill_with_integers();
  const Bits bits(M, K, t);
  if (t >= 65536 && M && K) write(dtypes.X, X.place(M - 1, K - 1), NAN);
  const auto layer = [&]() -> GradShrinkLayer {
    return {dS.floats(), t ? bits.bytes.data() : nullptr, A.view(), dA.view()};
  };
  const auto out = [&] { return with_dX ? dX.view() : Matrix{}; };
  twice({&dA, &dX}, grad_shrink_workspace(X.view(), layer(), out()),
        [&](void* workspace) { return grad_shrink(X.view(), layer(), out(), workspace); });
  dA.check([&](int64_t r, int64_t k) {
    double sum = 0;
    for (int64_t i = 0; i < M; ++i)
      if (!t || bits.at(i, k)) sum += dS.at(i, r) * X.at(i, k);
    return sum;
  });
  if (!with_dX) return;
  dX.check([&](int64_t i, int64_t k) {
    double sum = 0;
    for (int64_t r = 0; r < R; ++r) sum += dS.at(i, r) * A.at(r, k);
    return t && !bits.at(i, k) ? 0 : sum;
  });
}

void test_grad_shrinks() {
  for (const Dtypes& dtypes : kDtypes) {
    const auto run = [&](int64_t M, int64_t K, int64_t R, uint32_t t, int layout) {
      const std::string of = std::string(name_of(dtypes.X)) + " " + name_of(dtypes.factors) +
                             " M, K, R, t, layout:" + sizes({M, K, R, t, layout});
      for (const bool with_dX : {false, true}) {
        what = "grad_shrink " + of + (with_dX ? " and dX" : "");
        test_grad_shrink(dtypes, M, K, R, t, layout, with_dX);
      }
      what = "grad_input " + of;
      test_grad_input(dtypes, M, K, R, t, layout);
    };
    for (const int64_t R : ranks_for(dtypes)) run(37, 136, R, 6554, kDense);
    if (dtypes.X == Dtype::f16) continue;
    for (const int64_t K : {0, 8, 24, 33, 264}) run(40, K, 9, 32768, kDense);
    for (const int64_t M : {0, 1, 32, 130}) run(M, 64, 24, 6554, kPadded);
    for (const uint32_t t : kThresholds) run(33, 72, 16, t, kDense);
    for (int layout = 0; layout < kLayouts; ++layout) run(19, 40, 5, 6554, layout);
  }
}

// Layers that share X, each of a rank, threshold and seed of its own.
void test_layers_of_one_input(Dtypes dtypes, int64_t M, int64_t K, const std::vector<int>& ranks,
                              int layout) {
  what = std::string("layers of one input ") + name_of(dtypes.X) + " " + name_of(dtypes.factors) +
         " M, K, layout:" + sizes({M, K, layout}) + ", ranks:";
  for (const int R : ranks) what += " " + std::to_string(R);
  const int count = int(ranks.size());
  Grid X(dtypes.X, M, K, layout), dX(dtypes.X, M, K, layout);
  X.fill_with_integers();
  std::vector<int64_t> seeds;
  std::vector<uint32_t> t;
  std::vector<Grid> A, S, mask, dS, dA;
  std::vector<Bits> bits;
  for (int l = 0; l < count; ++l) {
    seeds.push_back(kSeed + l);
    t.push_back(kThresholds[(ranks[l] + l) % 3]);
    bits.emplace_back(M, K, t[l], seeds[l]);
    A.push_back(Grid(dtypes.factors, ranks[l], K, layout).fill_with_integers());
    S.emplace_back(Dtype::f32, M, ranks[l]);
    mask.emplace_back(Dtype::f32, t[l] ? M : 0, bits[l].row_bytes / 4);
    dS.push_back(Grid(Dtype::f32, M, ranks[l]).fill_with_integers());
    dA.emplace_back(dtypes.factors, ranks[l], K, layout);
  }
  const auto pointers = [](std::vector<Grid>& grids, std::vector<Grid*> with) {
    for (Grid& grid : grids) with.push_back(&grid);
    return with;
  };
  const auto forward = [&] {
    std::vector<ShrinkLayer> layers;
    for (int l = 0; l < count; ++l)
      layers.push_back({A[l].view(), kFactor, t[l], &seeds[l],
                        reinterpret_cast<uint8_t*>(mask[l].data()), S[l].floats()});
    return layers;
  };
  twice(pointers(S, pointers(mask, {})), shrink_workspace(X.view(), forward().data(), count),
        [&](void* workspace) {
          return shrink(X.view(), forward().data(), count, workspace, nullptr);
        });
  const auto kept = [&](int l, int64_t i, int64_t k) { return !t[l] || bits[l].at(i, k); };
  for (int l = 0; l < count; ++l) {
    S[l].check([&](int64_t i, int64_t r) {
      double sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += kept(l, i, k) ? X.at(i, k) * A[l].at(r, k) : 0;
      return kC * kScale * sum;
    });
    CHECK(!t[l] || !std::memcmp(mask[l].data(), bits[l].bytes.data(), bits[l].bytes.size()));
  }

  const auto backward = [&] {
    std::vector<GradShrinkLayer> layers;
    for (int l = 0; l < count; ++l)
      layers.push_back(
          {dS[l].floats(), t[l] ? bits[l].bytes.data() : nullptr, A[l].view(), dA[l].view()});
    return layers;
  };
  for (const bool with_dX : {true, false}) {
    const Matrix out = with_dX ? dX.view() : Matrix{};
    twice(pointers(dA, {&dX}), grad_shrink_workspace(X.view(), backward().data(), count, out),
          [&](void* workspace) {
            return grad_shrink(X.view(), backward().data(), count, with_dX ? dX.view() : Matrix{},
                               workspace, nullptr);
          });
    for (int l = 0; l < count; ++l)
      dA[l].check([&](int64_t r, int64_t k) {
        double sum = 0;
        for (int64_t i = 0; i < M; ++i) sum += kept(l, i, k) ? dS[l].at(i, r) * X.at(i, k) : 0;
        return sum;
      });
  }
  // so small that no sum of some layers is rounded
  dX.check([&](int64_t i, int64_t k) {
    double sum = 0;
    for (int l = 0; l < count; ++l)
      for (int64_t r = 0; r < ranks[l]; ++r)
        sum += kept(l, i, k) ? dS[l].at(i, r) * A[l].at(r, k) : 0;
    return sum;
  });
}

// Three of few ranks are one launch, and their sums one more.
void test_launches_of_one_input() {
  what = "launches of one input";
  const int64_t M = 37, K = 136, R = 16;
  Grid X(Dtype::bf16, M, K), A(Dtype::bf16, R, K), S(Dtype::f32, M, R), dA(Dtype::bf16, R, K);
  for (Grid* grid : {&X, &A, &S}) grid->fill_with_integers();
  std::vector<uint8_t> mask(M * mask_bytes(K));
  const std::vector<ShrinkLayer> forward(3, {A.view(), {}, 9, &kSeed, mask.data(), S.floats()});
  const std::vector<GradShrinkLayer> backward(3, {S.floats(), mask.data(), A.view(), dA.view()});
  std::vector<char> room(1 << 20);
  int64_t before = fiber_device.launches;
  CHECK(!shrink(X.view(), forward.data(), 3, room.data(), nullptr));
  CHECK(fiber_device.launches - before == 1);
  before = fiber_device.launches;
  CHECK(!grad_shrink(X.view(), backward.data(), 3, X.view(), room.data(), nullptr));
  CHECK(fiber_device.launches - before == 1 + 1);
}

void test_layers_of_one_input() {
  for (const Dtypes& dtypes : kDtypes)
    for (const auto& ranks :
         std::vector<std::vector<int>>{{16, 16, 16}, {3, 5}, {4, 40, 8, 8, 8, 8, 16}})
      test_layers_of_one_input(dtypes, 37, 136, ranks, ranks.size() > 3 ? kPadded : kDense);
  for (const int layout : {kDense, kOdd})
    test_layers_of_one_input(kDtypes[0], 5, 2184, {16, 7, 2}, layout);
  test_layers_of_one_input(kDtypes[0], 130, 296, {16, 7, 2}, kDense);
}

// Blocks of these widths in each of `repeats` repeats; a negative width: not adapted.
struct Pattern {
  std::vector<Block> blocks;
  int period = 0, repeats, adapted = 0, groups = 0;

  Pattern(std::vector<int> widths, int repeats) : repeats(repeats) {
    for (const int width : widths) {
      const int n = std::abs(width);
      blocks.push_back({period, n, width > 0 ? adapted : -1, width > 0 ? groups++ : -1});
      if (width > 0) adapted += n * repeats;
      period += n;
    }
  }
  Layout layout() const { return {blocks.data(), int(blocks.size()), period, repeats}; }
  int N() const { return period * repeats; }

  const Block& block_of(int64_t n) const {
    const int place = int(n % period);
    return *std::find_if(blocks.begin(), blocks.end(), [=](const Block& b) {
      return b.offset <= place && place < b.offset + b.width;
    });
  }
  // the row of B that adapts a feature
  int64_t row_of(int64_t n) const {
    const Block& b = block_of(n);
    return b.row + n / period * b.width + n % period - b.offset;
  }
  // the feature that a row of B adapts
  int64_t feature_of(int64_t row) const {
    int64_t n = 0;
    while (block_of(n).group < 0 || row_of(n) != row) ++n;
    return n;
  }
};

void test_expand(Dtypes dtypes, int64_t M, const Pattern& of, int64_t r, int layout, bool bias) {
  const int64_t N = of.N();
  Grid S(Dtype::f32, M, of.groups * r), B(dtypes.factors, of.adapted, r, layout);
  Grid b(dtypes.X, 1, N, layout), Y(dtypes.X, M, N, layout);
  S.fill_with_integers(3000);
  B.fill_with_integers();
  b.fill_with_integers();
  twice({&Y}, expand_workspace(B.view(), Y.view()), [&](void* workspace) {
    return expand(S.floats(), B.view(), bias ? b.view() : Matrix{}, of.layout(), Y.view(),
                  workspace, nullptr);
  });
  Y.check([&](int64_t i, int64_t n) {
    double sum = bias ? b.at(0, n) : 0;
    const int g = of.block_of(n).group;
    for (int64_t l = 0; g >= 0 && l < r; ++l) sum += S.at(i, g * r + l) * B.at(of.row_of(n), l);
    return sum;
  });
}

void test_delta(Dtypes dtypes, int64_t K, const Pattern& of, int64_t r, int layout) {
  Grid A(dtypes.factors, of.groups * r, K, layout), B(dtypes.factors, of.adapted, r, layout);
  Grid dW(dtypes.X, of.N(), K, layout);
  A.fill_with_integers();
  B.fill_with_integers();
  twice({&dW}, delta_workspace(A.view(), dW.view()), [&](void* workspace) {
    return delta(A.view(), B.view(), kFactor, of.layout(), dW.view(), workspace, nullptr);
  });
  dW.check([&](int64_t n, int64_t k) {
    double sum = 0;
    const int g = of.block_of(n).group;
    for (int64_t l = 0; g >= 0 && l < r; ++l) sum += B.at(of.row_of(n), l) * A.at(g * r + l, k);
    return kC * kScale * sum;
  });
}

void test_grad_expand(Dtypes dtypes, int64_t M, const Pattern& of, int64_t r, int layout,
                      bool need_dS, bool need_dB) {
  const int64_t N = of.N(), R = of.groups * r;
  Grid dY(dtypes.X, M, N, layout), S(Dtype::f32, M, R), B(dtypes.factors, of.adapted, r, layout);
  Grid dS(Dtype::f32, need_dS ? M : 0, R), dB(dtypes.factors, need_dB ? of.adapted : 0, r, layout);
  dY.fill_with_integers();
  S.fill_with_integers(3000);
  B.fill_with_integers(most_of(dtypes));
  twice({&dS, &dB}, grad_expand_workspace(dY.view(), B.view(), of.layout()), [&](void* workspace) {
    return grad_expand(dY.view(), S.floats(), B.view(), kFactor, of.layout(), dS.floats(),
                       dB.view(), workspace, nullptr);
  });
  dS.check([&](int64_t i, int64_t l) {
    double sum = 0;
    for (int64_t n = 0; n < N; ++n)
      if (of.block_of(n).group == l / r) sum += dY.at(i, n) * B.at(of.row_of(n), l % r);
    return kC * kScale * sum;
  });
  dB.check([&](int64_t row, int64_t l) {
    const int64_t n = of.feature_of(row), g = of.block_of(n).group;
    double sum = 0;
    for (int64_t i = 0; i < M; ++i) sum += dY.at(i, n) * S.at(i, g * r + l);
    return sum;
  });
}

void test_blocks() {
  // whole vectors or not; some not adapted, some of other widths; alternating
  const Pattern one({136}, 1), wide({536}, 1), odd({33}, 1), groups({40, -24, 72, 8}, 1);
  const Pattern odd_groups({5, 7, -3}, 1), alternating({8, -16, 24}, 3), none({-40}, 1);
  for (const Dtypes& dtypes : kDtypes) {
    const auto run = [&](int64_t M, const Pattern& of, int64_t r, int layout) {
      const std::string sizes_of =
          std::string(name_of(dtypes.X)) + " " + name_of(dtypes.factors) +
          " M, N, r, blocks, layout:" + sizes({M, of.N(), r, int64_t(of.blocks.size()), layout});
      what = "expand " + sizes_of;
      test_expand(dtypes, M, of, r, layout, true);
      test_expand(dtypes, M, of, r, layout, false);
      what = "delta, K = M, " + sizes_of;
      test_delta(dtypes, M, of, r, layout);
      what = "grad_expand " + sizes_of;
      test_grad_expand(dtypes, M, of, r, layout, true, true);
      if (layout != kDense) return;
      test_grad_expand(dtypes, M, of, r, layout, true, false);
      test_grad_expand(dtypes, M, of, r, layout, false, true);
    };
    for (const int64_t r : ranks_for(dtypes)) run(40, one, r, kPadded);
    if (dtypes.X == Dtype::f16) continue;
    for (const int64_t M : {0, 1, 32, 136}) run(M, groups, 8, kDense);
    for (const Pattern* of : {&wide, &odd, &odd_groups, &alternating, &none})
      run(37, *of, 9, kDense);
    for (int layout = 0; layout < kLayouts; ++layout) run(24, groups, 4, layout);
  }
}

// ---- rounding -----------------------------------------------------------------------------------

// The error of a stage against that of float32 operands, added up in float32 one after the other
// and rounded once: what is right at best where nothing between is rounded.
struct Errors {
  double ours = 0, plain = 0, most = 0, plain_most = 0;

  void add(Dtype dtype, double found, double exact, float sum) {
    const double x = std::abs(found - exact), y = std::abs(rounded(dtype, sum) - exact);
    ours += x * x, plain += y * y;
    most = std::max(most, x), plain_most = std::max(plain_most, y);
  }
  void check() const {
    CHECK(ours > 0 && plain > 0);
    CHECK(std::sqrt(ours) <= 1.05 * std::sqrt(plain));
    CHECK(most <= 2 * plain_most);
  }
};

// Compares out (i, j) with factor times the sum of left(i, j, l) right(i, j, l) over l.
template <class Left, class Right>
void check_rounding(Grid& out, int64_t L, float factor, const Left& left, const Right& right) {
  Errors errors;
  for (int64_t i = 0; i < out.rows; ++i)
    for (int64_t j = 0; j < out.cols; ++j) {
      double exact = 0;
      float sum = 0;
      for (int64_t l = 0; l < L; ++l) {
        const double a = left(i, j, l), b = right(i, j, l);
        exact += a * b;
        sum = std::fma(float(a), float(b), sum);
      }
      errors.add(out.dtype, out.at(i, j), factor * exact, factor * sum);
    }
  errors.check();
}

void test_rounding() {
  // as many rows as make one chunk: the longest sums in tensor cores, against short ones
  const int64_t M = 128, K = 520, N = 520, r = 16;
  const uint32_t t = 6554;
  const Bits bits(M, K, t);
  const Pattern whole({int(N)}, 1);
  std::normal_distribution<double> normal;
  const auto random = [&](Dtype dtype, int64_t rows, int64_t cols) {
    return Grid(dtype, rows, cols).fill([&](int64_t, int64_t) { return normal(generator); });
  };
  for (const auto& [dtype, of_factors] : kDtypes) {
    const auto next = [&](const char* output) {
      what =
          std::string("rounding of ") + output + " " + name_of(dtype) + " " + name_of(of_factors);
    };
    Grid X = random(dtype, M, K), A = random(of_factors, r, K), B = random(of_factors, N, r);
    Grid dY = random(dtype, M, N), S = random(Dtype::f32, M, r), dS = random(Dtype::f32, M, r);
    Grid out_S(Dtype::f32, M, r), out_dS(Dtype::f32, M, r), Y(dtype, M, N), dX(dtype, M, K);
    Grid dA(of_factors, r, K), dB(of_factors, N, r), dW(of_factors, N, K);
    std::vector<char> room(
        shrink_workspace(X.view(), {A.view(), {}, t, &kSeed, nullptr, nullptr}) +
        grad_shrink_workspace(X.view(), {nullptr, nullptr, A.view(), {}}, dX.view()) +
        expand_workspace(B.view(), Y.view()) +
        grad_expand_workspace(dY.view(), B.view(), whole.layout()));
    std::vector<uint8_t> mask(bits.bytes.size());
    const auto kept = [&](int64_t i, int64_t k) { return bits.at(i, k) ? X.at(i, k) : 0; };

    next("S");
    CHECK(
        !shrink(X.view(), {A.view(), {1.1f}, t, &kSeed, mask.data(), out_S.floats()}, room.data()));
    check_rounding(
        out_S, K, 1.1f, [&](int64_t i, int64_t, int64_t k) { return kept(i, k); },
        [&](int64_t, int64_t l, int64_t k) { return A.at(l, k); });
    next("Y");
    CHECK(!expand(S.floats(), B.view(), {}, whole.layout(), Y.view(), room.data(), nullptr));
    check_rounding(
        Y, r, 1, [&](int64_t i, int64_t, int64_t l) { return S.at(i, l); },
        [&](int64_t, int64_t n, int64_t l) { return B.at(n, l); });
    CHECK(!grad_expand(dY.view(), S.floats(), B.view(), {1.1f}, whole.layout(), out_dS.floats(),
                       dB.view(), room.data(), nullptr));
    next("dS");
    check_rounding(
        out_dS, N, 1.1f, [&](int64_t i, int64_t, int64_t n) { return dY.at(i, n); },
        [&](int64_t, int64_t l, int64_t n) { return B.at(n, l); });
    next("dB");
    check_rounding(
        dB, M, 1, [&](int64_t n, int64_t, int64_t i) { return dY.at(i, n); },
        [&](int64_t, int64_t l, int64_t i) { return S.at(i, l); });
    CHECK(!grad_shrink(X.view(), {dS.floats(), mask.data(), A.view(), dA.view()}, dX.view(),
                       room.data()));
    next("dA");
    check_rounding(
        dA, M, 1, [&](int64_t l, int64_t, int64_t i) { return dS.at(i, l); },
        [&](int64_t, int64_t k, int64_t i) { return kept(i, k); });
    next("dX");
    check_rounding(
        dX, r, 1, [&](int64_t i, int64_t k, int64_t l) { return bits.at(i, k) ? dS.at(i, l) : 0; },
        [&](int64_t, int64_t k, int64_t l) { return A.at(l, k); });
    next("dW");
    CHECK(!delta(A.view(), B.view(), {1.1f}, whole.layout(), dW.view(), room.data(), nullptr));
    check_rounding(
        dW, r, 1.1f, [&](int64_t n, int64_t, int64_t l) { return B.at(n, l); },
        [&](int64_t, int64_t k, int64_t l) { return A.at(l, k); });
  }
}

// ---- what is no number --------------------------------------------------------------------------

// A NaN is in all that depends on its element, and in nothing else.
void test_not_numbers() {
  const int64_t M = 37, K = 40, N = 72, r = 5, i = 33, k = 17, n = 50;
  const Pattern whole({int(N)}, 1);
  for (const auto& [dtype, of_factors] : kDtypes) {
    what = std::string("NaN ") + name_of(dtype) + " " + name_of(of_factors);
    Grid X(dtype, M, K), A(of_factors, r, K), B(of_factors, N, r), dY(dtype, M, N);
    Grid dS(Dtype::f32, M, r), S(Dtype::f32, M, r), Y(dtype, M, N), dX(dtype, M, K);
    Grid dA(of_factors, r, K), dB(of_factors, N, r);
    for (Grid* grid : {&X, &A, &B, &dY}) grid->fill_with_integers();
    write(dtype, X.place(i, k), NAN);
    write(dtype, dY.place(i, n), NAN);
    std::vector<char> room(1 << 20);
    CHECK(!shrink(X.view(), {A.view(), {}, 0, nullptr, nullptr, S.floats()}, room.data()));
    CHECK(!expand(S.floats(), B.view(), {}, whole.layout(), Y.view(), room.data(), nullptr));
    CHECK(!grad_expand(dY.view(), S.floats(), B.view(), {}, whole.layout(), dS.floats(), dB.view(),
                       room.data(), nullptr));
    const auto only = [](Grid& grid, const auto& expected) {
      for (int64_t a = 0; a < grid.rows; ++a)
        for (int64_t b = 0; b < grid.cols; ++b) CHECK(std::isnan(grid.at(a, b)) == expected(a, b));
    };
    const auto of_row = [=](int64_t row, int64_t) { return row == i; };
    only(S, of_row);
    only(Y, of_row);
    only(dS, of_row);
    // S is NaN there, too
    only(dB, [](int64_t, int64_t) { return true; });
    dS.fill_with_integers();
    CHECK(!grad_shrink(X.view(), {dS.floats(), nullptr, A.view(), dA.view()}, dX.view(),
                       room.data()));
    only(dA, [=](int64_t, int64_t column) { return column == k; });
    only(dX, [](int64_t, int64_t) { return false; });
  }
}

// ---- fused products -----------------------------------------------------------------------------
//
// Their low-rank operands, that is, and what is made of the arguments; tests/csrc/hopper.cpp stands
// in for csrc/cutlass.

void transpose_kernel(uint32_t* words) {
  uint32_t row[4];
  std::memcpy(row, words + 4 * threadIdx.x, sizeof row);
  transpose_in_quad(row);
  std::memcpy(words + 4 * threadIdx.x, row, sizeof row);
}

void test_transposing() {
  what = "transposing in quads";
  std::vector<uint32_t> words(4 * 256);
  std::iota(words.begin(), words.end(), 0);
  CHECK(!launch(transpose_kernel, dim3(1), 256, 0, nullptr, words.data()));
  for (uint32_t thread = 0; thread < 256; ++thread)
    for (uint32_t i = 0; i < 4; ++i)
      CHECK(words[4 * thread + i] == 4 * (thread / 4 * 4 + i) + thread % 4);
}

// The low-rank operands: their product is S Fᵀ + bias, and what fills vectors up is 0.
void test_stack(Dtypes dtypes, int64_t M, int64_t N, int64_t r, bool by_rows, bool with_bias) {
  Grid X(dtypes.X, M, 8), S(Dtype::f32, M, r), b(dtypes.X, 1, N, kSpread);
  // A, transposed, has rows that are no rows in memory
  Grid F(dtypes.factors, N, r, by_rows ? kTransposed : kDense);
  S.fill_with_integers(3000);
  F.fill_with_integers(most_of(dtypes));
  b.fill_with_integers();
  const Matrix bias = with_bias ? b.view() : Matrix{};
  const size_t bytes = stack_workspace(X.view(), F.view(), bias);
  std::vector<char> room(bytes + 1, kCanary);
  Stacked out;
  CHECK(!stack(S.floats(), X.view(), F.view(), bias, by_rows, room.data(), &out, nullptr));
  CHECK(is_vectors(out.left) && is_vectors(out.right) && room[bytes] == kCanary);
  const int64_t ranks = (dtypes.X == dtypes.factors ? 2 : 3) * r + with_bias,
                padded = out.left.cols;
  CHECK(out.left.rows == M && padded == (by_rows ? out.right.rows : out.right.cols));
  CHECK(padded >= ranks && padded < ranks + 8 && N == (by_rows ? out.right.cols : out.right.rows));
  const auto right = [&](int64_t n, int64_t l) {
    return load(out.right.data, dtypes.X, by_rows ? l * N + n : n * padded + l);
  };
  const auto left = [&](int64_t i, int64_t l) {
    return load(out.left.data, dtypes.X, i * padded + l);
  };
  for (int64_t l = ranks; l < padded; ++l) {
    for (int64_t i = 0; i < M; ++i) CHECK(left(i, l) == 0);
    for (int64_t n = 0; n < N; ++n) CHECK(right(n, l) == 0);
  }
  for (int64_t i = 0; i < M; ++i)
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0, expected = with_bias ? b.at(0, n) : 0;
      for (int64_t l = 0; l < padded; ++l) sum += double(left(i, l)) * right(n, l);
      for (int64_t l = 0; l < r; ++l) expected += S.at(i, l) * F.at(n, l);
      // what both leave is left out: of 12 bits, at most 4 each
      const double limit = dtypes.X == dtypes.factors ? 0 : r * 8. * 8;
      CHECK(std::fabs(sum - expected) <= limit);
    }
}

void test_fused(Dtypes dtypes, int64_t M, int64_t K, int64_t N, int64_t r, uint32_t t, int layout,
                bool with_bias) {
  Grid X(dtypes.X, M, K, layout), W(dtypes.X, N, K, layout), dY(dtypes.X, M, N, layout);
  Grid A(dtypes.factors, r, K, layout), B(dtypes.factors, N, r, layout), b(dtypes.X, 1, N, layout);
  Grid S(Dtype::f32, M, r), Y(dtypes.X, M, N), dX(dtypes.X, M, K);
  for (Grid* grid : {&X, &W, &dY, &A, &B, &b}) grid->fill_with_integers();
  S.fill_with_integers(500);
  const Bits bits(M, K, t);
  const uint8_t* mask = t ? bits.bytes.data() : nullptr;
  const Matrix bias = with_bias ? b.view() : Matrix{};
  CHECK(fused::takes(X.view(), W.view(), B.view(), nullptr));
  twice({&Y}, fused::expand_workspace(X.view(), B.view(), bias), [&](void* workspace) {
    return fused::expand(X.view(), W.view(), S.floats(), B.view(), bias, Y.view(), workspace,
                         nullptr);
  });
  Y.check([&](int64_t i, int64_t n) {
    double sum = with_bias ? b.at(0, n) : 0;
    for (int64_t k = 0; k < K; ++k) sum += X.at(i, k) * W.at(n, k);
    for (int64_t l = 0; l < r; ++l) sum += S.at(i, l) * B.at(n, l);
    return sum;
  });
  CHECK(fused::takes(dY.view(), W.view(), A.view(), mask));
  twice({&dX}, fused::grad_input_workspace(dY.view(), A.view()), [&](void* workspace) {
    return fused::grad_input(dY.view(), W.view(), S.floats(), A.view(), mask, dX.view(), workspace,
                             nullptr);
  });
  dX.check([&](int64_t i, int64_t k) {
    double sum = 0;
    for (int64_t l = 0; l < r && (!t || bits.at(i, k)); ++l) sum += S.at(i, l) * A.at(l, k);
    for (int64_t n = 0; n < N; ++n) sum += dY.at(i, n) * W.at(n, k);
    return sum;
  });
}

void test_fused_products() {
  test_transposing();
  for (const Dtypes& dtypes : kDtypes) {
    const std::string of = std::string(name_of(dtypes.X)) + " " + name_of(dtypes.factors);
    Grid X(dtypes.X, 5, 16), W(dtypes.X, 24, 16), F(dtypes.factors, 24, 3);
    const bool taken =
        dtypes.X != Dtype::f32 && (dtypes.X == dtypes.factors || dtypes.X == Dtype::bf16);
    what = "what the fused products take " + of;
    CHECK(fused::takes(X.view(), W.view(), F.view(), nullptr) == taken);
    if (!taken) continue;
    for (const int64_t r : ranks_for(dtypes))
      for (const bool by_rows : {false, true})
        for (const bool bias : {false, true}) {
          what = "low-rank operands " + of + sizes({r, by_rows, bias});
          test_stack(dtypes, 19, 40, r, by_rows, bias);
        }
    for (const int64_t r : {1, 16, 33})
      for (const int layout : {kDense, kPadded}) {
        what = "fused products " + of + sizes({r, layout});
        test_fused(dtypes, 37, 24, 40, r, r == 1 ? 0 : 6554, layout, r > 1);
      }
  }
  what = "what the fused products do not take";
  const auto takes = [](Grid X, Grid W, Grid F, size_t of_mask = 0) {
    return fused::takes(X.view(), W.view(), F.view(), reinterpret_cast<uint8_t*>(of_mask));
  };
  const auto sized = [](int64_t rows, int64_t cols, int layout = kDense,
                        Dtype dtype = Dtype::bf16) { return Grid(dtype, rows, cols, layout); };
  const auto X = sized(5, 16), W = sized(24, 16), F = sized(24, 3);
  CHECK(takes(X, W, F) && takes(X, W, F, 4) && !takes(X, W, F, 2));
  CHECK(!takes(sized(5, 12), sized(24, 12), F) && !takes(X, sized(20, 16), sized(20, 3)));
  CHECK(!takes(sized(0, 16), W, F) && !takes(sized(5, 0), sized(24, 0), F));
  CHECK(!takes(X, W, sized(24, 0)) && !takes(X, sized(24, 16, kDense, Dtype::f16), F));
  for (const int layout : {kOdd, kTransposed, kSpread, kBackwards})
    CHECK(!takes(sized(5, 16, layout), W, F) && !takes(X, sized(24, 16, layout), F));
  // all rows in one place
  Grid one = X;
  one.row_stride = 0;
  CHECK(!takes(one, W, F));
}

// ---- merging ------------------------------------------------------------------------------------

// Corrections of n values whose distances are small or, rarely, not: counted, encoded, decoded. How
// they are computed is compared with the reference in Python; this is for what memory is touched.
template <class U>
void test_correction(Dtype dtype, int64_t n, int bits) {
  what = std::string("correction ") + name_of(dtype) + sizes({n, bits});
  const int largest = bits ? (1 << (bits - 1)) - 1 : 0;
  std::vector<U> predicted(n), exact(n), decoded(n);
  std::vector<int32_t> rare;
  for (int64_t i = 0; i < n; ++i) {
    // positive and finite, so that bits are in the order of the numbers
    predicted[i] = U(draw_integer(1000, 20000));
    exact[i] = U(predicted[i] + draw_integer(-largest, largest));
    if (draw_integer(0, 50)) continue;
    exact[i] = U(predicted[i] + largest + 1);
    rare.push_back(int32_t(i));
  }
  const int64_t chunks = blocks_of(n, kChunk);
  std::vector<int32_t> outside(4 * chunks);
  CHECK(!count_distances(predicted.data(), exact.data(), dtype, n, outside.data(), nullptr));
  std::vector<int64_t> first(chunks);
  const int width = bits == 8 ? 3 : bits / 2;
  for (int64_t i = 1; i < chunks; ++i) first[i] = first[i - 1] + outside[4 * (i - 1) + width];
  if (chunks) CHECK(first.back() + outside[4 * (chunks - 1) + width] == int64_t(rare.size()));
  std::vector<uint8_t> codes((n * bits + 7) / 8);
  std::vector<int32_t> escaped(rare.size());
  std::vector<U> values(rare.size());
  CHECK(!encode_correction(predicted.data(), exact.data(), dtype, n, bits, first.data(),
                           codes.data(), escaped.data(), values.data(), nullptr));
  CHECK(escaped == rare);
  CHECK(!decode_correction(predicted.data(), dtype, n, bits, codes.data(), escaped.data(),
                           values.data(), int64_t(rare.size()), decoded.data(), nullptr));
  CHECK(decoded == exact);
  std::vector<int64_t> parts(checksum_parts(n));
  CHECK(!checksum(exact.data(), dtype, n, parts.data(), nullptr));
  uint64_t sum = 0;
  for (const int64_t part : parts) sum += uint64_t(part);
  for (int64_t i = 0; i < n; ++i)
    sum -= uint64_t(int64_t(std::make_signed_t<U>(exact[i]))) * uint64_t(2 * i + 1);
  CHECK(!sum);
}

void test_merging() {
  for (const int64_t n : {0, 1, 15, 4095, 4096, 4097, 9001})
    for (const int bits : {0, 2, 4, 8}) {
      test_correction<uint16_t>(Dtype::bf16, n, bits);
      test_correction<uint32_t>(Dtype::f32, n, bits);
    }
  for (const int layout : {kDense, kOdd, kTransposed, kSpread}) {
    const int64_t n = 19, k = 270, r = 3;
    what = "add_low_rank" + sizes({layout});
    Grid base(Dtype::bf16, n, k, layout), out(Dtype::bf16, n, k);
    base.fill_with_integers();
    std::vector<double> left(n * r, 2), right(r * k, 3), row_scale(n, 0.5), column_scale(k, 4);
    CHECK(!add_low_rank(base.view(), left.data(), right.data(), r, row_scale.data(),
                        column_scale.data(), out.view(), nullptr));
    out.check([&](int64_t i, int64_t j) { return base.at(i, j) + 2 * 3 * r * 0.5 * 4; });
  }
}

// ---- large offsets ------------------------------------------------------------------------------

// Three rows that are more than 2^31 elements apart, in addresses of which few have memory.
struct FarRows {
  int64_t stride, bytes;
  char* region;
  Matrix matrix;

  FarRows(const Grid& dense, int64_t extra) : stride((int64_t(1) << 31) + extra) {
    bytes = (2 * stride + dense.cols) * size_of(dense.dtype);
    region = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    CHECK(region != MAP_FAILED);
    matrix = {region, dense.dtype, 3, dense.cols, stride, 1};
    for (int i = 0; i < 3; ++i)
      std::memcpy(row(i), dense.bytes.data() + i * row_bytes(), row_bytes());
  }
  ~FarRows() { munmap(region, bytes); }
  int64_t row_bytes() const { return matrix.cols * size_of(matrix.dtype); }
  char* row(int i) const { return region + i * stride * size_of(matrix.dtype); }

  void check(const Grid& dense) const {
    for (int i = 0; i < 3; ++i)
      CHECK(!std::memcmp(row(i), dense.bytes.data() + i * row_bytes(), row_bytes()));
  }
};

void test_large_offsets() {
  const int64_t M = 3, K = 40, r = 8;
  const Pattern whole({int(K)}, 1);
  const Bits bits(M, K, 32768);
  for (const int64_t extra : {8, 1}) {
    what = "large offsets" + sizes({extra});
    // rows of A and B cannot be so many
    Grid X(Dtype::bf16, M, K), A(Dtype::bf16, r, K), B(Dtype::bf16, K, r), S(Dtype::f32, M, r);
    for (Grid* grid : {&X, &A, &B, &S}) grid->fill_with_integers();
    Grid Y(Dtype::bf16, M, K), dX(Dtype::bf16, M, K), dA(Dtype::bf16, r, K), dB = B, of_S = S;
    const FarRows far_X(X, extra), far_Y(Y, extra), far_dX(dX, extra);
    std::vector<char> room(1 << 20);
    std::vector<uint8_t> mask(bits.bytes.size());
    Grid far_dA = dA, far_dB = B, far_S = S;
    const auto all = [&](const Matrix& X, const Matrix& Y, const Matrix& dX, Grid& dA, Grid& dB,
                         Grid& of_S) {
      CHECK(!shrink(X, {A.view(), {}, 32768, &kSeed, mask.data(), of_S.floats()}, room.data()));
      CHECK(!expand(S.floats(), B.view(), {}, whole.layout(), Y, room.data(), nullptr));
      CHECK(!grad_expand(X, S.floats(), B.view(), {}, whole.layout(), nullptr, dB.view(),
                         room.data(), nullptr));
      CHECK(!grad_shrink(X, {S.floats(), mask.data(), A.view(), dA.view()}, dX, room.data()));
    };
    all(X.view(), Y.view(), dX.view(), dA, dB, of_S);
    all(far_X.matrix, far_Y.matrix, far_dX.matrix, far_dA, far_dB, far_S);
    far_Y.check(Y);
    far_dX.check(dX);
    CHECK(far_dA.bytes == dA.bytes && far_dB.bytes == dB.bytes && far_S.bytes == of_S.bytes);
  }
}

}  // namespace

int main() {
  test_known_answers();
  test_bytes_of_the_mask();
  test_shrinks();
  test_grad_shrinks();
  test_layers_of_one_input();
  test_launches_of_one_input();
  test_blocks();
  test_rounding();
  test_not_numbers();
  test_fused_products();
  test_merging();
  test_large_offsets();
  std::printf("%lld launches, %lld threads\n", (long long)fiber_device.launches,
              (long long)fiber_device.threads);
}
