// Every stage of every build that this machine runs, against plain loops over doubles.
//
// Operands are small integers and factors powers of two, so that sums are exact in any order and
// all comparisons are for equality. Buffers have exactly the size that the stages may touch, for
// AddressSanitizer to see the first byte beyond; what lies between the elements of a matrix is
// checked here. Prints the builds that were run.

#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

using namespace fastlora::cpu;

namespace {

#define CHECK(condition)                                                                   \
  do {                                                                                     \
    if (condition) break;                                                                  \
    std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, what.c_str(), #condition); \
    std::exit(1);                                                                          \
  } while (false)

// what is being tested: build, dtype, stage, sizes
std::string what;
const Kernels* kernels;

// ---- numbers ------------------------------------------------------------------------------------

const Dtype kDtypes[] = {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16};
const char* name_of(Dtype dtype) {
  const char* names[] = {"f32", "f64", "bf16", "f16"};
  return names[int(dtype)];
}

int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
Dtype wide(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }
int64_t lanes(Dtype dtype) { return kernels->vector_bytes / size_of(dtype); }
int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct Format {
  int mantissa, exponent;
};
Format format_of(Dtype dtype) { return dtype == Dtype::bf16 ? Format{7, 8} : Format{10, 5}; }

double decode(Dtype dtype, uint16_t bits) {
  const auto [mantissa, exponent] = format_of(dtype);
  const int e = (bits >> mantissa) & ((1 << exponent) - 1), m = bits & ((1 << mantissa) - 1);
  const int bias = (1 << (exponent - 1)) - 1;
  double x = std::ldexp(m + (e ? 1 << mantissa : 0), (e ? e : 1) - bias - mantissa);
  if (e == (1 << exponent) - 1)
    x = m ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  return bits >> 15 ? -x : x;
}

// the nearest number of the dtype, of two the even one
double rounded(Dtype dtype, double x) {
  if (dtype == Dtype::f64) return x;
  if (dtype == Dtype::f32) return float(x);
  if (std::isnan(x) || std::isinf(x) || x == 0) return x;
  const auto [mantissa, exponent] = format_of(dtype);
  const int least = 2 - (1 << (exponent - 1));
  const int quantum = std::max(std::ilogb(x), least) - mantissa;
  x = std::ldexp(std::nearbyint(std::ldexp(x, -quantum)), quantum);
  return std::ilogb(x) > 1 - least ? std::copysign(HUGE_VAL, x) : x;
}

double read(Dtype dtype, const void* p) {
  uint16_t bits;
  float f;
  double d;
  switch (dtype) {
    case Dtype::f64:
      std::memcpy(&d, p, 8);
      return d;
    case Dtype::f32:
      std::memcpy(&f, p, 4);
      return f;
    default:
      std::memcpy(&bits, p, 2);
      return decode(dtype, bits);
  }
}

void write(Dtype dtype, void* p, double x) {
  const float f = float(x);
  if (dtype == Dtype::f64) std::memcpy(p, &x, 8);
  if (dtype == Dtype::f32) std::memcpy(p, &f, 4);
  if (size_of(dtype) > 2) return;
  // of integers as small as these, all but a few bits of a float are zero
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint16_t half = uint16_t(bits >> 16);
  if (dtype == Dtype::f16 && x != 0)
    half = uint16_t((half & 0x8000) | (((bits & 0x7FFFFFFF) - (112u << 23)) >> 13));
  std::memcpy(p, &half, 2);
}

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

std::mt19937 generator;
int draw(int least, int most) { return std::uniform_int_distribution<int>(least, most)(generator); }

// ---- matrices -----------------------------------------------------------------------------------

constexpr char kCanary = char(0xA5);

enum Layout { kDense, kGaps, kTransposed, kSpread, kBackwards, kLayouts, kOneRow = kLayouts };

// A matrix in memory of its own, all of which that is no element must keep its canary.
struct Grid {
  Dtype dtype;
  int64_t rows, cols, row_stride, col_stride, first = 0;
  std::vector<char> bytes;

  Grid(Dtype dtype, int64_t rows, int64_t cols, Layout layout = kDense)
      : dtype(dtype), rows(rows), cols(cols), row_stride(cols), col_stride(1) {
    if (layout == kGaps) row_stride = cols + 3, first = 1;
    if (layout == kTransposed) row_stride = 1, col_stride = rows;
    if (layout == kSpread) row_stride = 3 * cols + 2, col_stride = 3;
    if (layout == kBackwards)
      row_stride = -cols, col_stride = -1, first = std::max<int64_t>(0, rows * cols - 1);
    if (layout == kOneRow) row_stride = 0;
    const int64_t last = std::max<int64_t>(0, (rows - 1) * row_stride + (cols - 1) * col_stride);
    bytes.assign(rows && cols ? (first + 1 + last) * size_of(dtype) : 0, kCanary);
  }

  char* data() { return bytes.empty() ? nullptr : bytes.data() + first * size_of(dtype); }
  char* place(int64_t i, int64_t j) {
    return data() + (i * row_stride + j * col_stride) * size_of(dtype);
  }
  double at(int64_t i, int64_t j) { return read(dtype, place(i, j)); }
  Matrix view() { return {data(), dtype, rows, cols, row_stride, col_stride}; }
  Packed packed() { return {data(), row_stride}; }

  Grid& fill(const std::function<double(int64_t, int64_t)>& value) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) write(dtype, place(i, j), value(i, j));
    return *this;
  }
  Grid& fill_with_integers() {
    return fill([](int64_t, int64_t) { return draw(-2, 2); });
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

// Rows that are read or written as vectors, padded to whole ones: `of` columns, of `cols` in all.
Grid padded(Dtype dtype, int64_t rows, int64_t cols) {
  return Grid(dtype, rows, round_up(cols, lanes(dtype)));
}

Grid zero_padded(Dtype dtype, int64_t rows, int64_t cols) {
  Grid grid = padded(dtype, rows, cols);
  return grid.fill([=](int64_t, int64_t j) { return j < cols ? draw(-2, 2) : 0; });
}

// Calls a stage on the rows in two parts.
template <class F>
void in_parts(int64_t rows, const F& stage) {
  const int64_t cut = rows / 3;
  stage(0, cut);
  stage(cut, rows);
}

// ---- masks --------------------------------------------------------------------------------------

struct Words {
  uint32_t w[4];
};

Words philox(Words c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 7; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53) * c.w[0], p1 = uint64_t(0xCD9E8D57) * c.w[2];
    c = {{uint32_t(p1 >> 32) ^ c.w[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.w[3] ^ k1,
          uint32_t(p0)}};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c;
}

uint32_t lane_of(const Words& words, int64_t b) {
  return (words.w[b / 2] >> (b % 2 * 16)) & 0xFFFF;
}

uint8_t mask_byte(uint64_t seed, uint32_t t, uint64_t index, int64_t bits_left) {
  const Words words = philox({{uint32_t(index), uint32_t(index >> 32), 0, 0}}, uint32_t(seed),
                             uint32_t(seed >> 32));
  uint8_t byte = 0;
  for (int b = 0; b < 8; ++b) byte |= (lane_of(words, b) >= t && b < bits_left) << b;
  return byte;
}

struct Drawn {
  int64_t row_bytes;
  std::vector<uint8_t> bytes;

  Drawn(int64_t M, int64_t K, uint32_t t, uint64_t seed)
      : row_bytes(round_up(K, 32) / 8), bytes(t ? M * row_bytes : 0) {
    for (size_t i = 0; i < bytes.size(); ++i)
      bytes[i] = mask_byte(seed, t, i, K - int64_t(i) % row_bytes * 8);
  }
  bool keeps(int64_t i, int64_t k) const {
    return bytes.empty() || (bytes[i * row_bytes + k / 8] >> (k % 8) & 1);
  }
  Mask mask() { return {bytes.empty() ? nullptr : bytes.data(), row_bytes}; }
};

// Random123's known answers for 7 rounds: of no counter and key at all, of ones, of digits of pi.
void test_known_answers() {
  what = "philox";
  const auto is = [](const Words& words, Words expected) {
    for (int i = 0; i < 4; ++i) CHECK(words.w[i] == expected.w[i]);
  };
  const Words zeros = {{0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48}};
  const uint32_t ones = 0xFFFFFFFF;
  is(philox({{0, 0, 0, 0}}, 0, 0), zeros);
  is(philox({{ones, ones, ones, ones}}, ones, ones),
     {{0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662}});
  is(philox({{0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344}}, 0xA4093822, 0x299F31D0),
     {{0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A}});

  // the first of them is that of the first byte of a mask: the stages know its lanes
  what = std::string(kernels->name) + " philox";
  Grid X(Dtype::f32, 1, 8), At = padded(Dtype::f32, 8, 1), S(Dtype::f32, 1, 1);
  X.fill_with_integers();
  At.fill_with_integers();
  for (int64_t b = 0; b < 8; ++b)
    for (uint32_t above = 0; above < 2; ++above) {
      std::vector<uint8_t> mask(4);
      kernels->f32.shrink(X.view(), At.packed(), 1, lane_of(zeros, b) + above, 0, {mask.data(), 4},
                          S.packed(), 1, 0, 1);
      CHECK((mask[0] >> b & 1) == !above);
    }
}

// Bytes whose index takes more than 32 bits, at the end of 4 GiB of addresses without memory.
void test_high_word_of_the_counter() {
  constexpr int64_t boundary = int64_t(1) << 32, end = 4 * 4096;
  char* region = static_cast<char*>(
      mmap(nullptr, boundary + end, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  what = "mmap";
  CHECK(region != MAP_FAILED);
  CHECK(!mprotect(region + boundary - end, 2 * end, PROT_READ | PROT_WRITE));
  for (const int64_t K : {20, 40, 80, 600}) {
    const int64_t row_bytes = round_up(K, 32) / 8, first = boundary / row_bytes - 40, M = 80;
    what = std::string(kernels->name) + " high word, K=" + std::to_string(K);
    Grid X(Dtype::f32, first + M, K, kOneRow), At = padded(Dtype::f32, K, 1);
    Grid S(Dtype::f32, first + M, 1, kOneRow);
    At.fill_with_integers();
    std::memset(X.bytes.data(), 0, X.bytes.size());
    uint8_t* mask = reinterpret_cast<uint8_t*>(region);
    kernels->f32.shrink(X.view(), At.packed(), 1, 20000, 77, {mask, row_bytes}, S.packed(), 1,
                        first, first + M);
    for (int64_t index = first * row_bytes; index < (first + M) * row_bytes; ++index)
      CHECK(mask[index] == mask_byte(77, 20000, index, K - index % row_bytes * 8));
  }
  munmap(region, boundary + end);
}

// ---- the stages ---------------------------------------------------------------------------------

struct Case {
  int64_t M, K, N, r;
};
const Case kCases[] = {{0, 5, 6, 2},       {1, 1, 1, 1},       {5, 7, 12, 3},
                       {31, 33, 40, 8},    {32, 128, 128, 16}, {33, 127, 129, 9},
                       {70, 260, 200, 65}, {17, 96, 64, 130}};
// of a base product: one of everything; a row less than the registers hold, and one more; terms
// and columns to the last one and beyond
const int64_t kProducts[][3] = {{1, 1, 1},      {5, 7, 12},     {13, 16, 31}, {14, 128, 64},
                                {15, 129, 100}, {43, 257, 130}, {6, 600, 33}};
const uint32_t kThresholds[] = {0, 6554, 32768, 65536};
constexpr double c = 0.5;

// Y cut into blocks of three sizes, of which two are adapted, twice if its width allows
struct Layout3 {
  std::vector<Span> spans;
  std::vector<int64_t> group, row;  // of each column: its block or -1, and its row of B
  int64_t groups = 0, n = 0, packed = 0;

  Layout3(int64_t N, Dtype dtype) : group(N, -1), row(N, -1) {
    const int64_t repeats = N >= 12 ? 2 : 1, pattern = N / repeats;
    const int64_t widths[] = {std::max<int64_t>(1, pattern / 2), pattern / 4, pattern / 5};
    groups = widths[2] ? 2 : 1;
    for (int64_t repeat = 0; repeat < repeats; ++repeat)
      for (const int64_t g : {0, 1}) {
        if (g == groups) continue;
        const int64_t width = widths[2 * g], first = g ? widths[0] * repeats : 0;
        const int64_t column = repeat * pattern + (g ? widths[0] + widths[1] : 0);
        spans.push_back({g, column, width, first + repeat * width, packed});
        for (int64_t j = 0; j < width; ++j)
          group[column + j] = g, row[column + j] = first + repeat * width + j;
        n += width;
        packed += round_up(width, lanes(dtype));
      }
  }
  Spans view() const { return {groups, spans.data(), int64_t(spans.size())}; }
  // of a row of B its column in a packed Bᵀ
  int64_t packed_column(int64_t of) const {
    for (const Span& span : spans)
      if (of >= span.row && of < span.row + span.width) return span.packed + of - span.row;
    std::abort();
  }
};

void test_pack(const Stages& stages, Dtype dtype, const Case& of, Layout layout) {
  for (const bool transpose : {false, true}) {
    Grid factor(dtype, of.r, of.K, layout);
    factor.fill_with_integers();
    // the padding is the caller's
    Grid out(wide(dtype), transpose ? of.K : of.r, (transpose ? of.r : of.K), kGaps);
    in_parts(of.r, [&](int64_t begin, int64_t end) {
      stages.pack(factor.view(), transpose, out.packed(), begin, end);
    });
    out.check([&](int64_t i, int64_t j) { return transpose ? factor.at(j, i) : factor.at(i, j); });
  }
}

void test_shrink(const Stages& stages, Dtype dtype, const Case& of, Layout layout, uint32_t t) {
  const auto [M, K, N, r] = of;
  const uint64_t seed = 0x123456789ABCDEF0 + N;
  Grid X(dtype, M, K, layout), At = zero_padded(wide(dtype), K, r), S(wide(dtype), M, r, kGaps);
  if (M) X.fill_with_integers();
  Drawn drawn(M, K, t, seed), mask(M, K, t, ~seed);
  in_parts(M, [&](int64_t begin, int64_t end) {
    stages.shrink(X.view(), At.packed(), c, t, seed, mask.mask(), S.packed(), r, begin, end);
  });
  CHECK(mask.bytes == drawn.bytes);
  S.check([&, K = K](int64_t i, int64_t j) {
    double sum = 0;
    for (int64_t k = 0; k < K; ++k) sum += drawn.keeps(i, k) * X.at(i, k) * At.at(k, j);
    return c * sum;
  });
}

void test_expand(const Stages& stages, Dtype dtype, const Case& of, Layout layout) {
  const auto [M, K, N, r] = of;
  const Layout3 blocks(N, wide(dtype));
  Grid S(wide(dtype), M, blocks.groups * r), Bt = zero_padded(wide(dtype), r, blocks.packed);
  // read as vectors from any column on
  Grid bias(wide(dtype), 1, N + lanes(wide(dtype)) - 1);
  bias.fill_with_integers();
  if (M) S.fill_with_integers();
  for (const bool with_bias : {false, true}) {
    Grid Y(dtype, M, N, layout);
    const Packed row = bias.packed();
    in_parts(M, [&](int64_t begin, int64_t end) {
      stages.expand(S.packed(), r, Bt.packed(), with_bias ? &row : nullptr, blocks.view(), Y.view(),
                    begin, end);
    });
    Y.check([&, r = r](int64_t i, int64_t j) {
      double sum = with_bias ? bias.at(0, j) : 0;
      const int64_t g = blocks.group[j];
      for (int64_t l = 0; g >= 0 && l < r; ++l)
        sum += S.at(i, g * r + l) * Bt.at(l, blocks.packed_column(blocks.row[j]));
      return sum;
    });
  }
}

void test_grad_expand(const Stages& stages, Dtype dtype, const Case& of, Layout layout) {
  const auto [M, K, N, r] = of;
  const Layout3 blocks(N, wide(dtype));
  Grid dY(dtype, M, N, layout), S(wide(dtype), M, blocks.groups * r);
  Grid B = zero_padded(wide(dtype), blocks.n, r);
  if (M) dY.fill_with_integers(), S.fill_with_integers();
  for (const int need : {1, 2, 3}) {
    Grid dS(wide(dtype), M, blocks.groups * r, kGaps);
    Grid dBt = padded(wide(dtype), r, blocks.packed);
    in_parts(M, [&](int64_t begin, int64_t end) {
      stages.grad_expand(dY.view(), need & 2 ? S.packed() : Packed{}, r,
                         need & 1 ? B.packed() : Packed{}, c, blocks.view(),
                         need & 1 ? dS.packed() : Packed{}, need & 2 ? dBt.packed() : Packed{},
                         begin, end);
      if (!(need & 2)) return;
      // of these rows alone
      for (int64_t j = 0; j < N && end > begin; ++j) {
        const int64_t g = blocks.group[j];
        for (int64_t l = 0; g >= 0 && l < r; ++l) {
          double sum = 0;
          for (int64_t i = begin; i < end; ++i) sum += dY.at(i, j) * S.at(i, g * r + l);
          CHECK(dBt.at(l, blocks.packed_column(blocks.row[j])) == sum);
        }
      }
    });
    if (need & 1)
      dS.check([&, N = N, r = r](int64_t i, int64_t l) {
        double sum = 0;
        for (int64_t j = 0; j < N; ++j)
          if (blocks.group[j] == l / r) sum += dY.at(i, j) * B.at(blocks.row[j], l % r);
        return c * sum;
      });
  }
}

void test_grad_shrink(const Stages& stages, Dtype dtype, const Case& of, Layout layout,
                      uint32_t t) {
  const auto [M, K, N, r] = of;
  Grid dS(wide(dtype), M, r, kGaps), X(dtype, M, K, layout), dA = padded(wide(dtype), r, K);
  if (M) dS.fill_with_integers(), X.fill_with_integers();
  Drawn drawn(M, K, t, N);
  in_parts(M, [&, K = K, r = r](int64_t begin, int64_t end) {
    stages.grad_shrink(dS.packed(), r, X.view(), drawn.mask(), dA.packed(), begin, end);
    for (int64_t l = 0; l < r; ++l)
      for (int64_t k = 0; k < K; ++k) {
        double sum = 0;
        for (int64_t i = begin; i < end; ++i) sum += dS.at(i, l) * drawn.keeps(i, k) * X.at(i, k);
        CHECK(dA.at(l, k) == sum);
      }
  });
}

void test_grad_input(const Stages& stages, Dtype dtype, const Case& of, Layout layout, uint32_t t) {
  const auto [M, K, N, r] = of;
  Grid dS(wide(dtype), M, r, kGaps), A = zero_padded(wide(dtype), r, K), dX(dtype, M, K, layout);
  if (M) dS.fill_with_integers();
  Drawn drawn(M, K, t, N);
  for (const int times : {1, 2}) {
    in_parts(M, [&, r = r](int64_t begin, int64_t end) {
      stages.grad_input(dS.packed(), r, A.packed(), drawn.mask(), times > 1, dX.view(), begin, end);
    });
    dX.check([&, r = r](int64_t i, int64_t k) {
      double sum = 0;
      for (int64_t l = 0; l < r; ++l) sum += dS.at(i, l) * A.at(l, k);
      return drawn.keeps(i, k) ? times * sum : 0;
    });
  }
}

void test_add_base_product(const Stages& stages, Dtype dtype, int64_t M, int64_t L, int64_t N,
                           Layout of_P, Layout of_Q, Layout of_out) {
  if (size_of(dtype) == 2) {
    CHECK(!stages.add_base_product);
    return;
  }
  Grid P(dtype, M, L, of_P), Q(dtype, L, N, of_Q), out(dtype, M, N, of_out);
  P.fill_with_integers(), Q.fill_with_integers(), out.fill_with_integers();
  Grid before = out;
  // of exactly the size that is asked for
  const int64_t columns = round_up(N, 2 * lanes(dtype));
  std::vector<char> buffer(std::min(L, kBaseTerms) * columns * size_of(dtype));
  stages.add_base_product(P.view(), Q.view(), out.view(), buffer.data());
  out.check([&](int64_t i, int64_t j) {
    double sum = before.at(i, j);
    for (int64_t l = 0; l < L; ++l) sum += P.at(i, l) * Q.at(l, j);
    return sum;
  });
}

void test_add_parts(const Stages& stages, Dtype dtype, const Case& of, Layout layout) {
  for (const bool transpose : {false, true})
    for (const int64_t count : {0, 1, 3}) {
      const int64_t rows = transpose ? of.K : of.r, cols = transpose ? of.r : of.K;
      Grid parts(wide(dtype), count * rows, cols, kGaps), out(dtype, of.r, of.K, layout);
      if (count) parts.fill_with_integers();
      in_parts(of.r, [&](int64_t begin, int64_t end) {
        stages.add_parts(parts.packed(), count, rows * parts.row_stride, transpose, out.view(),
                         begin, end);
      });
      out.check([&](int64_t i, int64_t j) {
        double sum = 0;
        for (int64_t part = 0; part < count; ++part)
          sum += transpose ? parts.at(part * rows + j, i) : parts.at(part * rows + i, j);
        return sum;
      });
    }
}

void test_delta(const Stages& stages, Dtype dtype, const Case& of, Layout layout) {
  Grid B = zero_padded(wide(dtype), of.N, of.r), A = zero_padded(wide(dtype), of.r, of.K);
  Grid dW(dtype, of.N, of.K, layout);
  in_parts(of.N, [&](int64_t begin, int64_t end) {
    stages.delta(B.packed(), of.r, A.packed(), c, dW.view(), begin, end);
  });
  dW.check([&](int64_t i, int64_t k) {
    double sum = 0;
    for (int64_t l = 0; l < of.r; ++l) sum += B.at(i, l) * A.at(l, k);
    return c * sum;
  });
}

void test_add_low_rank(const Stages& stages, Dtype dtype, const Case& of, Layout layout) {
  Grid base(dtype, of.N, of.K, layout), left(Dtype::f64, of.N, of.r), scales(Dtype::f64, 1, of.N);
  Grid right = zero_padded(Dtype::f64, of.r, of.K), columns = zero_padded(Dtype::f64, 1, of.K);
  base.fill_with_integers();
  scales.fill_with_integers();
  // so little that most sums lie between two numbers of 32 bits
  left.fill([](int64_t, int64_t) { return std::ldexp(draw(-99, 99), -26); });
  for (const bool with_columns : {false, true}) {
    Grid out(dtype, of.N, of.K, layout);
    in_parts(of.N, [&](int64_t begin, int64_t end) {
      stages.add_low_rank(base.view(), left.packed(), of.r, right.packed(),
                          static_cast<const double*>(scales.view().data),
                          with_columns ? static_cast<const double*>(columns.view().data) : nullptr,
                          out.view(), begin, end);
    });
    out.check([&](int64_t i, int64_t k) {
      double sum = 0;
      for (int64_t l = 0; l < of.r; ++l) sum += left.at(i, l) * right.at(l, k);
      return base.at(i, k) + sum * scales.at(0, i) * (with_columns ? columns.at(0, k) : 1);
    });
  }
}

// Rows read and stored as vectors and one by one, of every number that 16 bits hold.
void test_conversions(const Stages& stages, Dtype dtype) {
  constexpr int64_t n = 1 << 16;
  Grid X(dtype, 1, n), one(Dtype::f32, 1, 1), dA = padded(Dtype::f32, 1, n);
  Grid spread(dtype, 1, n, kSpread);
  for (int64_t k = 0; k < n; ++k) {
    const uint16_t bits = uint16_t(k);
    std::memcpy(X.place(0, k), &bits, 2);
    std::memcpy(spread.place(0, k), &bits, 2);
  }
  one.fill([](int64_t, int64_t) { return 1; });
  for (Grid* from : {&X, &spread}) {
    stages.grad_shrink(one.packed(), 1, from->view(), {}, dA.packed(), 0, 1);
    for (int64_t k = 0; k < n; ++k) CHECK(same(dA.at(0, k), decode(dtype, uint16_t(k))));
  }

  // and back: each number, the middle between it and the next, and what is next to the middle
  Grid floats(Dtype::f32, 1, 4 * n + 16);
  for (int64_t k = 0; k < 4 * n; ++k) {
    const uint16_t bits = uint16_t(k / 4);
    const double x = decode(dtype, bits), next = decode(dtype, uint16_t(bits + 1));
    const float middle = float((x + next) / 2);
    const float values[] = {float(x), middle, std::nextafterf(middle, 0),
                            std::nextafterf(middle, middle > 0 ? HUGE_VALF : -HUGE_VALF)};
    std::memcpy(floats.place(0, k), &values[k % 4], 4);
    // the first and the last of each sign: what rounding must not carry to Inf or to zero
    const uint32_t not_numbers[] = {0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF};
    if (std::isnan(x)) std::memcpy(floats.place(0, k), &not_numbers[k % 4], 4);
  }
  const Packed row = floats.packed();
  Grid zero_bits(Dtype::f32, 0, 0);
  for (const Layout layout : {kDense, kSpread}) {
    Grid Y(dtype, 1, 4 * n, layout), sums(dtype, 1, 4 * n, layout);
    stages.expand(zero_bits.packed(), 0, zero_bits.packed(), &row, {0, nullptr, 0}, Y.view(), 0, 1);
    Y.check([&](int64_t, int64_t j) { return floats.at(0, j); });
    stages.add_parts(floats.packed(), 1, 0, false, sums.view(), 0, 1);
    sums.check([&](int64_t, int64_t j) { return floats.at(0, j); });
  }
}

// From what was predicted to what is exact and back, for any bits.
void test_corrections(const Stages& stages, Dtype dtype) {
  const int64_t size = size_of(dtype);
  for (const int64_t n : {0, 1, 7, 8, 1000, 1024, 1025, 5000})
    for (const bool near : {false, true}) {
      std::vector<char> predicted(n * size), exact(n * size);
      uint64_t sum = 0;
      for (int64_t i = 0; i < n; ++i) {
        int64_t bits = int64_t(generator()) << 32 | generator();
        std::memcpy(predicted.data() + i * size, &bits, size);
        bits = near && i % 5 ? bits + draw(-200, 200) % (1 << draw(0, 8))
                             : int64_t(generator()) << 32 | generator();
        std::memcpy(exact.data() + i * size, &bits, size);
        const int unused = int(64 - 8 * size);
        sum += uint64_t(int64_t(uint64_t(bits) << unused) >> unused) * uint64_t(2 * i + 1);
      }
      const int64_t cut = n / 2 / 8 * 8;
      CHECK(uint64_t(stages.checksum(exact.data(), 0, cut)) +
                uint64_t(stages.checksum(exact.data(), cut, n)) ==
            sum);
      const int64_t ranges[][2] = {{0, cut}, {cut, n}};
      int64_t outside[2][4] = {};
      for (const int half : {0, 1})
        stages.count_distances(predicted.data(), exact.data(), ranges[half][0], ranges[half][1],
                               outside[half]);
      CHECK(outside[1][3] <= outside[1][0]);
      for (int b = 0; b < 4; ++b) {
        const int64_t escapes = outside[0][b] + outside[1][b];
        std::vector<uint8_t> codes((n * kCodeBits[b] + 7) / 8);
        std::vector<int32_t> escaped(escapes);
        std::vector<char> values(escapes * size), out(n * size);
        for (const int half : {0, 1}) {
          const int64_t before = half ? outside[0][b] : 0;
          stages.encode_correction(predicted.data(), exact.data(), ranges[half][0], ranges[half][1],
                                   kCodeBits[b], codes.data(), escaped.data() + before,
                                   values.data() + before * size);
        }
        for (const int half : {0, 1})
          stages.decode_correction(predicted.data(), ranges[half][0], ranges[half][1], kCodeBits[b],
                                   codes.data(), escaped.data(), values.data(), escapes,
                                   out.data());
        CHECK(out == exact);
      }
    }
}

void run(const Kernels& build) {
  kernels = &build;
  test_known_answers();
  test_high_word_of_the_counter();
  for (const Dtype dtype : kDtypes) {
    const Stages& stages = build.of(dtype);
    const std::string prefix = std::string(build.name) + " " + name_of(dtype) + " ";
    for (const Case& of : kCases)
      for (int layout = 0; layout < kLayouts; ++layout) {
        const Layout in = Layout(layout);
        const auto next = [&](const char* stage) {
          what = prefix + stage + " M=" + std::to_string(of.M) + " K=" + std::to_string(of.K) +
                 " N=" + std::to_string(of.N) + " r=" + std::to_string(of.r) +
                 " layout=" + std::to_string(layout);
        };
        for (const uint32_t t : kThresholds) {
          if (in != kDense && t != kThresholds[layout % 4]) continue;
          next("shrink"), test_shrink(stages, dtype, of, in, t);
          next("grad_shrink"), test_grad_shrink(stages, dtype, of, in, t);
          next("grad_input"), test_grad_input(stages, dtype, of, in, t);
        }
        next("pack"), test_pack(stages, dtype, of, in);
        next("expand"), test_expand(stages, dtype, of, in);
        next("grad_expand"), test_grad_expand(stages, dtype, of, in);
        next("add_parts"), test_add_parts(stages, dtype, of, in);
        next("delta"), test_delta(stages, dtype, of, in);
        next("add_low_rank"), test_add_low_rank(stages, dtype, of, in);
      }
    for (const auto& [M, L, N] : kProducts)
      for (int layout = 0; layout < kLayouts; ++layout) {
        const Layout in = Layout(layout);
        what = prefix + "add_base_product M=" + std::to_string(M) + " L=" + std::to_string(L) +
               " N=" + std::to_string(N) + " layout=" + std::to_string(layout);
        test_add_base_product(stages, dtype, M, L, N, in, kDense, kGaps);
        test_add_base_product(stages, dtype, M, L, N, kDense, in, kDense);
        test_add_base_product(stages, dtype, M, L, N, kOneRow, kTransposed, in);
      }
    what = prefix + "conversions";
    if (size_of(dtype) == 2) test_conversions(stages, dtype);
    what = prefix + "corrections";
    test_corrections(stages, dtype);
  }
  std::printf("%s\n", build.name);
}

}  // namespace

int main() {
  run(baseline);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) run(avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    run(avx512);
#endif
}
