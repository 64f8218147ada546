"""``dX = dY W + m∘(dS A)``: the low-rank term first, masked, then the base product in place.

``grad_input_fused`` has both in one accumulator: the low-rank term, its mask, the main loop.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels import gemm, masks, products
from fastlora.kernels.configs import config, fused
from fastlora.kernels.launch import cdiv, launch


@triton.jit
def low_rank(
    dS,
    A,
    mask,
    rows,
    k,
    M,
    K,
    R,
    row_bytes,
    stride_sm,
    stride_sr,
    stride_ar,
    stride_ak,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The tile of ``m∘(dS A)`` at ``rows`` and column k, in float32."""
    columns = k + tl.arange(0, BLOCK_K)
    dS += rows.to(tl.int64)[:, None] * stride_sm
    A += columns.to(tl.int64)[None, :] * stride_ak
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for r0 in range(0, R, BLOCK_R):
        ranks = r0 + tl.arange(0, BLOCK_R)
        ds = tl.load(
            dS + ranks[None, :] * stride_sr, (rows < M)[:, None] & (ranks < R)[None, :], 0.0
        )
        a = tl.load(
            A + ranks.to(tl.int64)[:, None] * stride_ar,
            (ranks < R)[:, None] & (columns < K)[None, :],
            0.0,
        )
        acc = products.dot(ds, a, acc, PRECISION)
    if mask is not None:
        bytes = k // 8 + tl.arange(0, BLOCK_K // 8)
        acc = masks.keep(acc, masks.load(mask, rows, bytes, M, row_bytes))
    return acc


@triton.jit(do_not_specialize=["M"])
def grad_input_kernel(
    dS,
    A,
    mask,
    dX,
    M,
    K,
    R,
    row_bytes,
    stride_sm,
    stride_sr,
    stride_ar,
    stride_ak,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K
    acc = low_rank(
        dS,
        A,
        mask,
        rows,
        k,
        M,
        K,
        R,
        row_bytes,
        stride_sm,
        stride_sr,
        stride_ar,
        stride_ak,
        PRECISION,
        BLOCK_M,
        BLOCK_K,
        BLOCK_R,
    )
    columns = k + tl.arange(0, BLOCK_K)
    at = dX + rows.to(tl.int64)[:, None] * K + columns[None, :]
    tl.store(at, acc.to(dX.dtype.element_ty), (rows < M)[:, None] & (columns < K)[None, :])


def grad_input(dY: Tensor, W: Tensor, dS: Tensor | None, A: Tensor, mask: Tensor | None) -> Tensor:
    """dX (M, K), dtype of dY, from dY (M, N), W (N, K), dS (M, R), float32, A (R, K) and the mask.

    Without dS it is the base product alone.
    """
    if dS is None:
        return dY @ W
    if not dY.shape[1]:
        # a product of nothing, for which ATen would read and write all of dX
        return grad_input_start(dY, dS, A, mask)
    if fused("grad_input_fused", dY, W, A):
        return grad_input_fused(dY, W, dS, A, mask)
    return grad_input_start(dY, dS, A, mask).addmm_(dY, W)


def grad_input_start(dY: Tensor, dS: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
    """``m∘(dS A)`` (M, K), rounded to the dtype of dY."""
    M, (R, K) = len(dS), A.shape
    dX = dY.new_empty((M, K))
    best = config("grad_input", dY, A)
    launch(
        grad_input_kernel,
        (cdiv(M, best.BLOCK_M), cdiv(K, best.BLOCK_K)),
        dY.device,
        dS,
        A,
        mask,
        dX,
        M,
        K,
        R,
        4 * cdiv(K, 32),
        *dS.stride(),
        *A.stride(),
        PRECISION=products.precision(dY.dtype, A.dtype, rounds=True),
        BLOCK_M=best.BLOCK_M,
        BLOCK_K=best.BLOCK_K,
        BLOCK_R=best.ranks(R),
        num_warps=best.num_warps,
        num_stages=best.num_stages,
    )
    return dX


@triton.jit(do_not_specialize=["M"])
def grad_input_fused_kernel(
    dY,
    W,
    dS,
    A,
    mask,
    dX,
    M,
    N,
    K,
    R,
    row_bytes,
    stride_ym,
    stride_yn,
    stride_wn,
    stride_wk,
    stride_sm,
    stride_sr,
    stride_ar,
    stride_ak,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BASE_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(K, BLOCK_K)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_m, tile_k = gemm.place(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K))
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
        acc = low_rank(
            dS,
            A,
            mask,
            rows,
            tile_k * BLOCK_K,
            M,
            K,
            R,
            row_bytes,
            stride_sm,
            stride_sr,
            stride_ar,
            stride_ak,
            PRECISION,
            BLOCK_M,
            BLOCK_K,
            BLOCK_R,
        )
        acc = gemm.accumulate(
            acc,
            dY,
            W,
            tile_m * BLOCK_M,
            tile_k * BLOCK_K,
            M,
            K,
            N,
            stride_ym,
            stride_yn,
            stride_wk,
            stride_wn,
            False,
            TMA,
            BASE_PRECISION,
            BLOCK_M,
            BLOCK_K,
            BLOCK_N,
        )
        at = dX + rows.to(tl.int64)[:, None] * K + columns[None, :]
        tl.store(at, acc.to(dX.dtype.element_ty), (rows < M)[:, None] & (columns < K)[None, :])


def grad_input_fused(dY: Tensor, W: Tensor, dS: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
    """As :func:`grad_input`, with both terms in the accumulator of one GEMM."""
    (M, N), (R, K) = dY.shape, A.shape
    dX = dY.new_empty((M, K))
    best = config("grad_input_fused", dY, A)
    tma = gemm.descriptors(dY, W)
    launch(
        grad_input_fused_kernel,
        gemm.grid(M, K, best.BLOCK_M, best.BLOCK_K, best),
        dY.device,
        gemm.operand(dY, best.BLOCK_M, best.BLOCK_N, tma),
        gemm.operand(W, best.BLOCK_N, best.BLOCK_K, tma),
        dS,
        A,
        mask,
        dX,
        M,
        N,
        K,
        R,
        4 * cdiv(K, 32),
        *dY.stride(),
        *W.stride(),
        *dS.stride(),
        *A.stride(),
        TMA=tma,
        PRECISION=products.precision(dY.dtype, A.dtype, rounds=True),
        BASE_PRECISION=products.base_precision(),
        BLOCK_M=best.BLOCK_M,
        BLOCK_N=best.BLOCK_N,
        BLOCK_K=best.BLOCK_K,
        BLOCK_R=best.ranks(R),
        num_warps=best.num_warps,
        num_stages=best.num_stages,
    )
    return dX
