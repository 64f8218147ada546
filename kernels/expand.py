"""``Y = X Wᵀ + bias + S_g B_gᵀ``: the low-rank term and the bias first, the base product in place.

Added in place, the base product reads Y inside a GEMM that computing bounds, so the addition is
hidden, and the sum is rounded once. ``expand_fused`` has all terms in one accumulator instead.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels import gemm, products
from fastlora.kernels.configs import config, fused
from fastlora.kernels.launch import cdiv, launch
from fastlora.kernels.layout import Layout, slab


@triton.jit(do_not_specialize=["M"])
def expand_kernel(
    S,
    B,
    bias,
    Y,
    M,
    N,
    r,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    stride_bias,
    SPANS: tl.constexpr,
    PERIOD: tl.constexpr,
    REPEATS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns, features, inside, group, _ = slab(
        tl.program_id(1), SPANS, PERIOD, REPEATS, ALIGNED, BLOCK_N
    )
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if group >= 0:
        S_g = S + rows.to(tl.int64)[:, None] * stride_sm + group * r * stride_sr
        B_g = B + features.to(tl.int64)[None, :] * stride_bn
        for r0 in range(0, r, BLOCK_R):
            ranks = r0 + tl.arange(0, BLOCK_R)
            s = tl.load(
                S_g + ranks[None, :] * stride_sr, (rows < M)[:, None] & (ranks < r)[None, :], 0.0
            )
            b = tl.load(
                B_g + ranks.to(tl.int64)[:, None] * stride_br,
                (ranks < r)[:, None] & inside[None, :],
                0.0,
            )
            acc = products.dot(s, b, acc, PRECISION)
    if bias is not None:
        acc += tl.load(bias + columns * stride_bias, inside, 0.0).to(tl.float32)[None, :]
    at = Y + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(at, acc.to(Y.dtype.element_ty), (rows < M)[:, None] & inside[None, :])


def expand(
    X: Tensor, W: Tensor, bias: Tensor | None, S: Tensor, B: Tensor, layout: Layout
) -> Tensor:
    """Y (M, N), dtype of X, from X (M, K), W (N, K), S (M, R) and B (adapted features, r)."""
    if fused("expand_fused", X, W, B) and layout.whole:
        return expand_fused(X, W, bias, S, B, layout)
    return expand_start(X, W.shape[0], bias, S, B, layout).addmm_(X, W.t())


def expand_start(
    X: Tensor, N: int, bias: Tensor | None, S: Tensor, B: Tensor, layout: Layout
) -> Tensor:
    """``S_g B_gᵀ + bias`` (M, N), rounded to the dtype of X; ``bias`` or 0 in the other blocks."""
    M, r = X.shape[0], B.shape[1]
    Y = X.new_empty((M, N))
    best = config("expand", X, B)
    launch(
        expand_kernel,
        (cdiv(M, best.BLOCK_M), layout.slabs(best.BLOCK_N)),
        X.device,
        S,
        B,
        bias,
        Y,
        M,
        N,
        r,
        *S.stride(),
        *B.stride(),
        0 if bias is None else bias.stride(0),
        **layout.constants(),
        PRECISION=products.precision(X.dtype, B.dtype, rounds=True),
        BLOCK_M=best.BLOCK_M,
        BLOCK_N=best.BLOCK_N,
        BLOCK_R=best.ranks(r),
        num_warps=best.num_warps,
        num_stages=best.num_stages,
    )
    return Y


@triton.jit(do_not_specialize=["M"])
def expand_fused_kernel(
    X,
    W,
    bias,
    S,
    B,
    Y,
    M,
    N,
    K,
    r,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    stride_bias,
    SPANS: tl.constexpr,
    PERIOD: tl.constexpr,
    REPEATS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BASE_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_m, tile_n = gemm.place(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = gemm.accumulate(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
            X,
            W,
            tile_m * BLOCK_M,
            tile_n * BLOCK_N,
            M,
            N,
            K,
            stride_xm,
            stride_xk,
            stride_wn,
            stride_wk,
            True,
            TMA,
            BASE_PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        for g in tl.static_range(len(SPANS)):
            # a tile may lie on two blocks: of each, the features outside count as zero
            place = columns % PERIOD - SPANS[g][0]
            mine = (place >= 0) & (place < SPANS[g][1]) & (columns < N)
            if tl.max(mine.to(tl.int32), 0) > 0:
                features = SPANS[g][2] + columns // PERIOD * SPANS[g][1] + place
                for r0 in range(0, r, BLOCK_R):
                    ranks = r0 + tl.arange(0, BLOCK_R)
                    s = tl.load(
                        S
                        + rows.to(tl.int64)[:, None] * stride_sm
                        + (SPANS[g][3] * r + ranks)[None, :] * stride_sr,
                        (rows < M)[:, None] & (ranks < r)[None, :],
                        0.0,
                    )
                    b = tl.load(
                        B
                        + features.to(tl.int64)[None, :] * stride_bn
                        + ranks.to(tl.int64)[:, None] * stride_br,
                        mine[None, :] & (ranks < r)[:, None],
                        0.0,
                    )
                    acc = products.dot(s, b, acc, PRECISION)
        if bias is not None:
            acc += tl.load(bias + columns * stride_bias, columns < N, 0.0).to(tl.float32)[None, :]
        at = Y + rows.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(at, acc.to(Y.dtype.element_ty), (rows < M)[:, None] & (columns < N)[None, :])


def expand_fused(
    X: Tensor, W: Tensor, bias: Tensor | None, S: Tensor, B: Tensor, layout: Layout
) -> Tensor:
    """As :func:`expand`, with every term in the accumulator of one GEMM."""
    (M, K), N, r = X.shape, W.shape[0], B.shape[1]
    Y = X.new_empty((M, N))
    best = config("expand_fused", X, B)
    tma = gemm.descriptors(X, W)
    constants = layout.adapted.constants()
    del constants["ALIGNED"]
    launch(
        expand_fused_kernel,
        gemm.grid(M, N, best.BLOCK_M, best.BLOCK_N, best),
        X.device,
        gemm.operand(X, best.BLOCK_M, best.BLOCK_K, tma),
        gemm.operand(W, best.BLOCK_N, best.BLOCK_K, tma),
        bias,
        S,
        B,
        Y,
        M,
        N,
        K,
        r,
        *X.stride(),
        *W.stride(),
        *S.stride(),
        *B.stride(),
        0 if bias is None else bias.stride(0),
        **constants,
        TMA=tma,
        PRECISION=products.precision(X.dtype, B.dtype, rounds=True),
        BASE_PRECISION=products.base_precision(),
        BLOCK_M=best.BLOCK_M,
        BLOCK_N=best.BLOCK_N,
        BLOCK_K=best.BLOCK_K,
        BLOCK_R=best.ranks(r),
        num_warps=best.num_warps,
        num_stages=best.num_stages,
    )
    return Y
