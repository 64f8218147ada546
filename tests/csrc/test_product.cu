// The fused products, compiled for a GPU, and on the host what is asked of its driver: descriptions
// of the operands that are to be copied. A driver that is none takes them down here.
#define CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cutlass/expand.cu"
#include "../../csrc/cutlass/grad_input.cu"

#define CHECK(condition)                                                 \
  do {                                                                   \
    if (condition) break;                                                \
    std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    std::exit(1);                                                        \
  } while (false)

struct Description {
  void* address;
  // columns, rows, and one more, of one
  std::vector<uint64_t> sizes, strides;
  std::vector<uint32_t> box;
};
std::vector<Description> described;
bool refuses = false;

extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type,
                                           cuuint32_t rank, void* address, const cuuint64_t* sizes,
                                           const cuuint64_t* strides, const cuuint32_t* box,
                                           const cuuint32_t* steps, CUtensorMapInterleave,
                                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                           CUtensorMapFloatOOBfill fill) {
  if (refuses) return CUDA_ERROR_INVALID_VALUE;
  CHECK(rank == 3 && type == CU_TENSOR_MAP_DATA_TYPE_UINT16);
  // what is beyond an operand counts as zero
  CHECK(fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  CHECK(swizzle == CU_TENSOR_MAP_SWIZZLE_128B && 2 * box[0] == 128);
  for (int i = 0; i < 3; ++i) {
    CHECK(steps[i] == 1 && 0 < box[i] && box[i] <= 256);
    CHECK(0 < sizes[i] && sizes[i] <= uint64_t(1) << 32);
  }
  for (int i = 0; i < 2; ++i) CHECK(strides[i] % 16 == 0 && strides[i] < uint64_t(1) << 40);
  CHECK(reinterpret_cast<uintptr_t>(address) % 16 == 0);
  described.push_back({address, {sizes, sizes + 3}, {strides, strides + 2}, {box, box + 3}});
  map->opaque[0] = 1;
  return CUDA_SUCCESS;
}

using namespace fastlora::cuda;

void* place(int i) { return reinterpret_cast<void*>(uintptr_t(i) << 20); }

// Left (M, L); right (N, L), or (L, N) where `Input`.
template <class T, bool Input>
void test(int64_t M, int64_t N, int64_t L, int64_t padding) {
  using Product = hopper::Product<T, Input>;
  const Dtype dtype = std::is_same_v<T, __half> ? Dtype::f16 : Dtype::bf16;
  const int64_t rows = Input ? L : N, cols = Input ? N : L;
  const Matrix left = {place(1), dtype, M, L, L + padding, 1};
  const Matrix right = {place(2), dtype, rows, cols, cols + padding, 1};
  described.clear();
  CHECK(Product::is_described(Product::operands(left, right, M, N)));
  const Matrix expected[] = {left, right};
  CHECK(described.size() == 2);
  for (int i = 0; i < 2; ++i) {
    const Description& d = described[i];
    const Matrix& m = expected[i];
    CHECK(d.address == m.data && d.sizes[0] == uint64_t(m.cols) && d.sizes[1] == uint64_t(m.rows));
    CHECK(d.sizes[2] == 1 && d.strides[0] == 2 * uint64_t(m.row_stride));
  }
  // half of a tile of the right operand for each of the pair, who then has all of both
  CHECK(described[0].box[1] == hopper::kRows);
  const int boxes = Input ? hopper::kCols / 64 : 1;
  CHECK(int(described[1].box[1]) == (Input ? hopper::kDepth : hopper::kCols) / hopper::kPair);
  const int halves = hopper::kPair * boxes * int(described[1].box[0] * described[1].box[1]);
  CHECK(2 * (hopper::kRows * hopper::kDepth + halves) == Product::Mainloop::TmaTransactionBytes);
}

template <class T>
void test_all() {
  for (const int64_t M : {1, 1000})
    for (const int64_t N : {8, 4096})
      for (const int64_t L : {8, 40, 14336})
        for (const int64_t padding : {0, 8}) {
          test<T, false>(M, N, L, padding);
          test<T, true>(M, N, L, padding);
        }
  test<T, false>(1 << 28, 64, 8192, 0);
}

int main() {
  test_all<__nv_bfloat16>();
  test_all<__half>();
  refuses = true;
  using Product = hopper::Product<__half, false>;
  const Matrix some = {place(1), Dtype::f16, 8, 8, 8, 1};
  CHECK(!Product::is_described(Product::operands(some, some, 8, 8)));
}
