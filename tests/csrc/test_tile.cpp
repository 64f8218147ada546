// The parts of csrc/cutlass/tile.cuh, on the host: which tiles there are, and which elements of
// one a thread has.
#include <cutlass/numeric_types.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/cutlass/tile.cuh"

using namespace fastlora::cuda;
using namespace fastlora::cuda::hopper;

namespace {

#define CHECK(condition)                                                 \
  do {                                                                   \
    if (condition) break;                                                \
    std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    std::exit(1);                                                        \
  } while (false)

// Each tile is taken once, whatever is left over; tiles that come soon after another are near.
void test_tiles() {
  for (const int64_t M : {1, 128, 129, 256, 257, 2304, 5000, 1 << 20})
    for (const int64_t N : {8, 256, 264, 4096, 14336}) {
      const Tiles tiles(M, N);
      const int rows = int((M + 255) / 256), cols = int((N + 255) / 256);
      CHECK(tiles.count() == rows * cols);
      std::vector<bool> seen(tiles.count());
      for (int i = 0; i < tiles.count(); ++i) {
        const Tiles::Place place = tiles[i];
        CHECK(0 <= place.row && place.row < rows && 0 <= place.col && place.col < cols);
        CHECK(!seen[place.row * cols + place.col]);
        seen[place.row * cols + place.col] = true;
        if (rows >= 8 && i < 8 * cols) CHECK(place.row == i % 8 && place.col == i / 8);
      }
    }
}

// Of what the device could do in the time of the fullest multiprocessor, the part that is of use.
void test_filled() {
  for (const int64_t M : {1, 255, 256, 2304, 5000, 8192})
    for (const int64_t N : {8, 256, 1000, 4096, 14336})
      for (const int multiprocessors : {2, 78, 114, 132}) {
        const int pairs = Tiles(M, N).count();
        int waves = 0;
        for (int taken = 0; taken < pairs; ++waves) taken += multiprocessors / kPair;
        const double possible = double(waves) * multiprocessors * kRows * kCols;
        CHECK(std::fabs(filled(M, N, multiprocessors) * possible / (double(M) * N) - 1) < 1e-12);
      }
  // all, none left over; and on a device of 132, as many tiles as make it wait and as do not
  CHECK(filled(256, 256, 2) == 1 && filled(2304, 4096, 8) == 1);
  CHECK(filled(2304, 4096, 132) < 0.73 && filled(8192, 4096, 132) > 0.96);
  CHECK(!(filled(0, 4096, 132) >= kFilled) && !(filled(4096, 0, 132) >= kFilled));
}

// Of all threads together, each element of the tile once; a quad's vectors are what they are said
// to be.
template <class Mma>
void test_places() {
  std::vector<int> seen(kRows * kCols);
  for (int thread = 0; thread < kMultipliers; ++thread) {
    const auto places = places_of<Mma>(thread);
    // as large as the sums of a product
    CHECK(cute::size(places) == cute::size(cute::partition_fragment_C(
                                    Mma{}, cute::Shape<cute::Int<kRows>, cute::Int<kCols>>{})));
    const int q = thread % 4;
    for (int i = 0; i < 2; ++i)
      for (int group = 0; group < kCols / 8; ++group)
        for (int j = 0; j < 2; ++j) {
          const int row = cute::get<0>(places(j, i, group)),
                    col = cute::get<1>(places(j, i, group));
          CHECK(0 <= row && row < kRows && 0 <= col && col < kCols);
          ++seen[row * kCols + col];
          CHECK(row == cute::get<0>(places(0, 0, 0)) + i * kRowStep);
        }
    // after transposing, word k of thread q is word q of thread k, of pairs of columns
    for (int k = 0; k < 4; ++k) {
      const auto other = places_of<Mma>(thread - q + k);
      for (int i = 0; i < 2; ++i)
        for (int group = 0; group < kCols / 8; group += 4)
          for (int j = 0; j < 2; ++j) {
            CHECK(cute::get<1>(other(j, i, group + q)) == vector_column(group, q) + 2 * k + j);
            CHECK(cute::get<0>(other(j, i, group + q)) == cute::get<0>(places(0, i, 0)));
          }
    }
  }
  for (const int times : seen) CHECK(times == 1);
}

// Every element of `out` is kept or dropped by its own bit, and no bit beyond the mask is read.
template <class Mma>
void test_mask(int64_t M, int64_t N) {
  std::mt19937 generator(0);
  const int64_t row_bytes = (N + 31) / 32 * 4;
  // of its own size, for AddressSanitizer
  std::vector<uint32_t> mask(M * row_bytes / 4);
  for (uint32_t& word : mask) word = generator();
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(mask.data());
  for (int64_t row = 0; row < M; row += kRows)
    for (int64_t col = 0; col < N; col += kCols)
      for (int thread = 0; thread < kMultipliers; ++thread) {
        const auto places = places_of<Mma>(thread);
        auto sum =
            cute::partition_fragment_C(Mma{}, cute::Shape<cute::Int<kRows>, cute::Int<kCols>>{});
        for (int i = 0; i < cute::size(sum); ++i) sum(i) = i % 2 ? NAN : 1 + i;
        const Kept kept(mask.data(), places, row, col, M, N);
        kept.apply(places, sum);
        for (int i = 0; i < cute::size(sum); ++i) {
          // the place that CuTe itself gives this element
          const int64_t m = row + cute::get<0>(places(i)), n = col + cute::get<1>(places(i));
          if (m >= M || n >= N) continue;
          const bool bit = bytes[m * row_bytes + n / 8] >> n % 8 & 1;
          CHECK(bit ? (i % 2 ? std::isnan(sum(i)) : sum(i) == 1 + i) : sum(i) == 0);
        }
      }
}

template <class E, cute::GMMA::Major Along>
void test_elements() {
  using Mma = hopper::Mma<E, Along>;
  test_places<Mma>();
  for (const int64_t M : {1, 130})
    for (const int64_t N : {8, 264, 488}) test_mask<Mma>(M, N);
}

}  // namespace

int main() {
  test_tiles();
  test_filled();
  test_elements<cutlass::bfloat16_t, cute::GMMA::Major::MN>();
  test_elements<cutlass::bfloat16_t, cute::GMMA::Major::K>();
}
