"""``dA = dSᵀ (m∘X)``: X is read once, and masked with the bits that ``shrink`` drew.

A program has a slab of columns and a chunk of rows; ``reduce`` adds the parts in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels import masks, products
from fastlora.kernels.configs import config
from fastlora.kernels.launch import cdiv, launch
from fastlora.kernels.reduce import chunks, sum_parts


@triton.jit(do_not_specialize=["M", "chunk"])
def grad_shrink_kernel(
    dS,
    X,
    mask,
    dA,
    M,
    chunk,
    K,
    R,
    row_bytes,
    stride_sm,
    stride_sr,
    stride_xm,
    stride_xk,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    bytes = tl.program_id(1) * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    # tiles of ranks that share a slab come one after the other, for the L2 cache
    ranks = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(2).to(tl.int64) * chunk
    X += columns.to(tl.int64)[None, :] * stride_xk
    dS += ranks[None, :] * stride_sr
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for m in range(first, tl.minimum(first + chunk, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        here = (rows < M)[:, None]
        x = tl.load(X + rows[:, None] * stride_xm, here & (columns < K)[None, :], 0.0)
        if mask is not None:
            x = masks.keep(x, masks.load(mask, rows, bytes, M, row_bytes))
        ds = tl.load(dS + rows[:, None] * stride_sm, here & (ranks < R)[None, :], 0.0)
        acc = products.dot(tl.trans(x), ds, acc, PRECISION)
    at = (tl.program_id(2).to(tl.int64) * R + ranks[None, :]) * K + columns[:, None]
    tl.store(dA + at, acc, (columns < K)[:, None] & (ranks < R)[None, :])


def grad_shrink(dS: Tensor, X: Tensor, mask: Tensor | None, A: Tensor) -> Tensor:
    """dA, shape and dtype of A (R, K), from dS (M, R), float32, X (M, K) and the packed mask."""
    (M, K), R = X.shape, A.shape[0]
    best = config("grad_shrink", X, A)
    BLOCK_R = best.ranks(R)
    slabs = cdiv(K, best.BLOCK_K)
    chunk, count = chunks(M, best.BLOCK_M, best.programs, slabs)
    parts = X.new_empty((count, R, K), dtype=torch.float32)
    launch(
        grad_shrink_kernel,
        (cdiv(R, BLOCK_R), slabs, count),
        X.device,
        dS,
        X,
        mask,
        parts,
        M,
        chunk,
        K,
        R,
        4 * cdiv(K, 32),
        *dS.stride(),
        *X.stride(),
        PRECISION=products.precision(X.dtype, A.dtype),
        BLOCK_M=best.BLOCK_M,
        BLOCK_K=best.BLOCK_K,
        BLOCK_R=BLOCK_R,
        num_warps=best.num_warps,
        num_stages=best.num_stages,
    )
    return sum_parts(parts, A.dtype)
