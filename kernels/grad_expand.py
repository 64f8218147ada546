"""``dS = c * dY_g B_g`` and ``dB_g = dY_gᵀ S_g``, from one read of dY.

A program has a slab of one block's features and a chunk of rows. What it adds up over its rows is
its part of dB; what its features add to dS is a part too. ``reduce`` adds the parts in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels import products
from fastlora.kernels.configs import config
from fastlora.kernels.launch import cdiv, launch
from fastlora.kernels.layout import Layout, slab
from fastlora.kernels.reduce import chunks, sum_parts


@triton.jit(do_not_specialize=["M", "chunk"])
def grad_expand_kernel(
    dY,
    S,
    B,
    dS,
    dB,
    M,
    chunk,
    features_of_B,
    r,
    R,
    stride_ym,
    stride_yn,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    SPANS: tl.constexpr,
    PERIOD: tl.constexpr,
    REPEATS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    columns, features, inside, group, part = slab(
        tl.program_id(1), SPANS, PERIOD, REPEATS, ALIGNED, BLOCK_N
    )
    # tiles of ranks that share a slab come one after the other, for the L2 cache
    ranks = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(2).to(tl.int64) * chunk
    dY += columns.to(tl.int64)[None, :] * stride_yn
    if dS is not None:
        at = features.to(tl.int64)[:, None] * stride_bn + ranks.to(tl.int64)[None, :] * stride_br
        b = tl.load(B + at, inside[:, None] & (ranks < r)[None, :], 0.0)
        dS += part.to(tl.int64) * M * R + group * r + ranks[None, :]
    if dB is not None:
        acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        S += (group * r + ranks)[None, :] * stride_sr
    for m in range(first, tl.minimum(first + chunk, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        here = (rows < M)[:, None]
        dy = tl.load(dY + rows[:, None] * stride_ym, here & inside[None, :], 0.0)
        if dS is not None:
            ds = products.dot(dy, b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), PRECISION)
            tl.store(dS + rows[:, None] * R, ds, here & (ranks < r)[None, :])
        if dB is not None:
            s = tl.load(S + rows[:, None] * stride_sm, here & (ranks < r)[None, :], 0.0)
            acc = products.dot(tl.trans(dy), s, acc, PRECISION)
    if dB is not None:
        at = (tl.program_id(2).to(tl.int64) * features_of_B + features[:, None]) * r
        tl.store(dB + at + ranks[None, :], acc, inside[:, None] & (ranks < r)[None, :])


def grad_expand(
    dY: Tensor,
    S: Tensor | None,
    B: Tensor,
    c: float,
    scale: Tensor | None,
    layout: Layout,
    need_dS: bool,
    need_dB: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dS (M, R), float32, and dB, shape and dtype of B, from dY (M, N) and S (M, R), float32."""
    M, (n, r) = len(dY), B.shape
    layout = layout.adapted
    R = r * len(layout.spans)
    best = config("grad_expand", dY, B)
    BLOCK_R = best.ranks(r)
    slabs = layout.slabs(best.BLOCK_N)
    chunk, count = chunks(M, best.BLOCK_M, best.programs, slabs)
    parts = layout.slabs_of_each(best.BLOCK_N)
    wide = torch.float32
    dS_parts = dY.new_empty((max(parts, default=0), M, R), dtype=wide) if need_dS else None
    dB_parts = dY.new_empty((count, n, r), dtype=wide) if need_dB else None
    launch(
        grad_expand_kernel,
        (cdiv(r, BLOCK_R), slabs, count),
        dY.device,
        dY,
        S if need_dB else None,
        B if need_dS else None,
        dS_parts,
        dB_parts,
        M,
        chunk,
        n,
        r,
        R,
        *dY.stride(),
        *((0, 0) if S is None else S.stride()),
        *B.stride(),
        **layout.constants(),
        PRECISION=products.precision(dY.dtype, B.dtype),
        BLOCK_M=best.BLOCK_M,
        BLOCK_N=best.BLOCK_N,
        BLOCK_R=BLOCK_R,
        num_warps=best.num_warps,
        num_stages=best.num_stages,
    )
    dS = dS_parts if dS_parts is None else sum_parts(dS_parts, wide, c, scale, parts)
    dB = dB_parts if dB_parts is None else sum_parts(dB_parts, B.dtype)
    return dS, dB
