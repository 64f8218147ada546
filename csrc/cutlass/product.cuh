// out = left right + S F in one accumulator, or left right + m∘(S F): S and F are a few more
// columns of the left operand and rows of the right one.
//
// The product is that of CUTLASS's collective for Hopper: one warp has tiles of both operands
// copied to shared memory (TMA), two warpgroups multiply them (wgmma). What is added is where the
// copies come from, and that the mask is applied to the sums of the first few of them.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>
#include <cutlass/gemm/gemm.h>

#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_mma_decl.hpp>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/pipeline/pipeline.hpp>
// after those above, which it needs
#include <cutlass/gemm/collective/sm90_mma_tma_gmma_ss_warpspecialized.hpp>

#include "fastlora/quad.cuh"
#include "tile.cuh"

namespace fastlora::cuda::hopper {

constexpr int kStages = 4, kThreads = kMultipliers + 128;
// of a warp that copies and of one that multiplies, of 65536
constexpr int kCopierRegisters = 40, kMultiplierRegisters = 232;

// `Input`: the product is dX's, whose right operands are contiguous along its columns, and whose
// low-rank term is masked, hence first. Else it is Y's.
template <class T, bool Input>
struct Product {
  using Element =
      std::conditional_t<std::is_same_v<T, __nv_bfloat16>, cutlass::bfloat16_t, cutlass::half_t>;
  using LeftStride = cute::Stride<int64_t, cute::_1, int64_t>;
  using RightStride =
      std::conditional_t<Input, cute::Stride<cute::_1, int64_t, int64_t>, LeftStride>;
  using RightAtom = std::conditional_t<Input, cute::GMMA::Layout_MN_SW128_Atom<Element>,
                                       cute::GMMA::Layout_K_SW128_Atom<Element>>;
  using Mma = hopper::Mma<Element, Input ? cute::GMMA::Major::MN : cute::GMMA::Major::K>;
  using Cluster = cute::Shape<cute::Int<kPair>, cute::_1, cute::_1>;
  using Mainloop = cutlass::gemm::collective::CollectiveMma<
      cutlass::gemm::MainloopSm90TmaGmmaWarpSpecialized<
          kStages, Cluster, cutlass::gemm::KernelTmaWarpSpecializedCooperative>,
      Tile, Element, LeftStride, Element, RightStride, Mma, cute::SM90_TMA_LOAD,
      cute::GMMA::Layout_K_SW128_Atom<Element>, void, cute::identity, cute::SM90_TMA_LOAD_MULTICAST,
      RightAtom, void, cute::identity>;
  using Operands = typename Mainloop::Params;
  using Pipeline = typename Mainloop::MainloopPipeline;
  using State = typename Mainloop::PipelineState;

  // of out (M, N), left (M, L) and S (M, ranks)
  struct Params {
    Operands base, low_rank;
    int M, N, L, ranks;
    const uint32_t* mask;
    T* out;
    int64_t out_stride;
  };

  struct alignas(1024) Shared {
    typename Mainloop::TensorStorage tensors;
    typename Mainloop::PipelineStorage pipeline;
  };
  static_assert(sizeof(Shared) <= 227 << 10, "more shared memory than a block can have");

  // ---- the warp that copies

  // All copies for one tile of `out` after the other.
  static __device__ void copy(const Params& p, Pipeline& pipeline, Shared& shared) {
    const int lane = threadIdx.x % 32, block = int(cute::block_rank_in_cluster());
    Mainloop mainloop;
    State state = cutlass::make_producer_start_state<Pipeline>();
    const auto base = mainloop.load_init(cute::make_shape(p.M, p.N, p.L, 1), p.base);
    const auto low_rank = mainloop.load_init(cute::make_shape(p.M, p.N, p.ranks, 1), p.low_rank);
    const Tiles tiles(p.M, p.N);
    for (int i = blockIdx.x / kPair; i < tiles.count(); i += gridDim.x / kPair) {
      const Tiles::Place place = tiles[i];
      const auto at = cute::make_coord(kPair * place.row + block, place.col, cute::_, 0);
      const auto load = [&](const Operands& operands, const auto& inputs, int depth) {
        const int count = int(blocks_of(depth, kDepth));
        mainloop.load(operands, pipeline, state, inputs, at, cute::make_coord_iterator(count),
                      count, lane, block, shared.tensors);
        state.advance(count);
      };
      if (Input) load(p.low_rank, low_rank, p.ranks);
      load(p.base, base, p.L);
      if (!Input) load(p.low_rank, low_rank, p.ranks);
    }
    // the other block of the pair still reads, and reports to barriers in our memory
    mainloop.load_tail(pipeline, state);
  }

  // ---- the warpgroups that multiply

  // sum = or += the next `count` tiles of the operands, one at least; all is done on return.
  template <class Left, class Right, class Sum>
  static __device__ void multiply(Mma mma, const Left& left, const Right& right, Sum& sum,
                                  Pipeline& pipeline, State& state, int count) {
    State before = state;
    int i = 0;
#pragma unroll 1
    do {
      pipeline.consumer_wait(state, pipeline.consumer_try_wait(state));
      cute::warpgroup_fence_operand(sum);
      cute::warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < cute::size<2>(left); ++k) {
        cute::gemm(mma, left(cute::_, cute::_, k, state.index()),
                   right(cute::_, cute::_, k, state.index()), sum);
        mma.accumulate_ = cute::GMMA::ScaleOut::One;
      }
      cute::warpgroup_commit_batch();
      // all products but these are done, and their tiles may be written over
      cute::warpgroup_wait<1>();
      cute::warpgroup_fence_operand(sum);
      if (i) pipeline.consumer_release(before);
      before = state;
      ++state;
    } while (++i < count);
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(sum);
    pipeline.consumer_release(before);
  }

  // Rounded and written as vectors of 16 bytes, of which each thread gets one of a quad's four.
  // `Whole`: all of the tile is in `out`.
  template <bool Whole, class Sum>
  static __device__ void store(const Params& p, const Sum& sum, int64_t row, int64_t col) {
    const int q = threadIdx.x % 4;
    const int width = int(p.N - col < kCols ? p.N - col : kCols);
    T* line = p.out + row * p.out_stride + col + vector_column(0, q);
#pragma unroll
    for (int i = 0; i < 2; ++i, line += kRowStep * p.out_stride) {
      const bool inside = row + i * kRowStep < p.M;
#pragma unroll
      for (int group = 0; group < kCols / 8; group += 4) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          words[j] = pack<T>(sum(cute::make_coord(0, i, group + j), 0, 0),
                             sum(cute::make_coord(1, i, group + j), 0, 0));
        transpose_in_quad(words);
        if (Whole || (inside && vector_column(group, q) < width))
          *reinterpret_cast<uint4*>(line + 8 * group) = {words[0], words[1], words[2], words[3]};
      }
    }
  }

  // One tile of `out` after the other.
  static __device__ void compute(const Params& p, Pipeline& pipeline, Shared& shared) {
    const int thread = threadIdx.x - 128, block = int(cute::block_rank_in_cluster());
    Mma mma;
    // operands in shared memory are described to a whole warpgroup
    const auto group = mma.get_slice(cutlass::canonical_warp_group_idx() * 128 - 128);
    const auto left = group.make_fragment_A(group.partition_A(cute::make_tensor(
        cute::make_smem_ptr(shared.tensors.smem_A.data()), typename Mainloop::SmemLayoutA{})));
    const auto right = group.make_fragment_B(group.partition_B(cute::make_tensor(
        cute::make_smem_ptr(shared.tensors.smem_B.data()), typename Mainloop::SmemLayoutB{})));
    const auto places = places_of<Mma>(thread);
    const int base = int(blocks_of(p.L, kDepth)), low_rank = int(blocks_of(p.ranks, kDepth));
    State state;
    const Tiles tiles(p.M, p.N);
    for (int i = blockIdx.x / kPair; i < tiles.count(); i += gridDim.x / kPair) {
      const Tiles::Place place = tiles[i];
      const int64_t row = (int64_t(kPair) * place.row + block) * kRows,
                    col = int64_t(place.col) * kCols;
      auto sum = cute::partition_fragment_C(mma, cute::take<0, 2>(Tile{}));
      mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
      int rest = low_rank + base;
      if (Input && p.mask) {
        // on their way while the low-rank term is multiplied
        const Kept kept(p.mask, places, row, col, p.M, p.N);
        multiply(mma, left, right, sum, pipeline, state, low_rank);
        kept.apply(places, sum);
        mma.accumulate_ = cute::GMMA::ScaleOut::One;
        rest = base;
      }
      multiply(mma, left, right, sum, pipeline, state, rest);
      const int64_t first = row + cute::get<0>(places(0, 0, 0));
      if (row + kRows <= p.M && col + kCols <= p.N)
        store<true>(p, sum, first, col);
      else
        store<false>(p, sum, first, col);
    }
  }

  // ---- a block

  static __device__ void run(const Params& p, Shared& shared) {
    const int group = cutlass::canonical_warp_group_idx(),
              warp = cutlass::canonical_warp_idx_sync();
    if (warp == 0 && cute::elect_one_sync()) {
      Mainloop::prefetch_tma_descriptors(p.base);
      Mainloop::prefetch_tma_descriptors(p.low_rank);
    }
    using Role = typename Pipeline::ThreadCategory;
    typename Pipeline::Params roles;
    roles.role = group ? Role::Consumer : warp == 0 ? Role::Producer : Role::NonParticipant;
    roles.is_leader = threadIdx.x % 128 == 0;
    roles.num_consumers = kMultipliers;
    roles.num_producers = 1;
    roles.transaction_bytes = Mainloop::TmaTransactionBytes;
    Pipeline pipeline(shared.pipeline, roles, Cluster{});
    // its barriers are there for both blocks
    cute::cluster_arrive_relaxed();
    cute::cluster_wait();
    if (group == 0) {
      cutlass::arch::warpgroup_reg_dealloc<kCopierRegisters>();
      if (warp == 0) copy(p, pipeline, shared);
    } else {
      cutlass::arch::warpgroup_reg_alloc<kMultiplierRegisters>();
      compute(p, pipeline, shared);
    }
  }

  // ---- the host

  // A descriptor that the driver refused is left empty.
  static bool is_described(const Operands& operands) {
    const cute::TmaDescriptor empty = {};
    return memcmp(operands.tma_load_a.get_tma_descriptor(), &empty, sizeof empty) &&
           memcmp(operands.tma_load_b.get_tma_descriptor(), &empty, sizeof empty);
  }

  static Operands operands(const Matrix& left, const Matrix& right, int64_t M, int64_t N) {
    RightStride stride{};
    cute::get<Input ? 1 : 0>(stride) = right.row_stride;
    return Mainloop::to_underlying_arguments(
        cute::make_shape(int(M), int(N), int(left.cols), 1),
        {static_cast<const Element*>(left.data), LeftStride{left.row_stride, {}, 0},
         static_cast<const Element*>(right.data), stride},
        nullptr);
  }
};

template <class T, bool Input>
__global__ void __cluster_dims__(kPair, 1, 1) __launch_bounds__(kThreads, 1)
    hopper_kernel(const __grid_constant__ typename Product<T, Input>::Params p) {
  extern __shared__ __align__(1024) char fastlora_tiles[];
  using Shared = typename Product<T, Input>::Shared;
  Product<T, Input>::run(p, *reinterpret_cast<Shared*>(fastlora_tiles));
}

// All operands: rows of vectors, of one dtype; none is empty. Y: left (M, L), right (N, L), S (M,
// ranks), F (N, ranks). dX: right (L, N), F (ranks, N).
template <bool Input>
cudaError_t product(const Matrix& left, const Matrix& right, const Matrix& S, const Matrix& F,
                    const uint8_t* mask, const Matrix& out, cudaStream_t stream) {
  int device = 0, multiprocessors = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device))
    return error;
  const int64_t M = out.rows, N = out.cols;
  const int pairs = std::min(Tiles(M, N).count(), multiprocessors / kPair);
  return with_type(out.dtype, [&](auto type) {
    using T = decltype(type);
    using Kernel = Product<T, Input>;
    const typename Kernel::Params params = {Kernel::operands(left, right, M, N),
                                            Kernel::operands(S, F, M, N),
                                            int(M),
                                            int(N),
                                            int(left.cols),
                                            int(S.cols),
                                            reinterpret_cast<const uint32_t*>(mask),
                                            static_cast<T*>(out.data),
                                            out.row_stride};
    if (!Kernel::is_described(params.base) || !Kernel::is_described(params.low_rank))
      return cudaErrorInvalidValue;
    return launch(hopper_kernel<T, Input>, dim3(unsigned(kPair * pairs)), kThreads,
                  sizeof(typename Kernel::Shared), stream, params);
  });
}

}  // namespace fastlora::cuda::hopper
