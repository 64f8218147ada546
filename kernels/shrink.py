"""``S = c * (m∘X) Aᵀ``: X is read once, and its mask drawn as it is."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels import masks, products
from fastlora.kernels.configs import config
from fastlora.kernels.launch import cdiv, launch


@triton.jit(do_not_specialize=["M", "t"])
def shrink_kernel(
    X,
    A,
    S,
    mask,
    seed,
    c,
    scale,
    t,
    M,
    K,
    R,
    row_bytes,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # tiles of ranks that share rows come one after the other, for the L2 cache
    tile_m, tile_r = tl.program_id(0) // tl.cdiv(R, BLOCK_R), tl.program_id(0) % tl.cdiv(R, BLOCK_R)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    X += rows.to(tl.int64)[:, None] * stride_xm
    A += ranks.to(tl.int64)[None, :] * stride_ar
    if DROPOUT:
        key = tl.load(seed)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        inside = columns < K
        columns = columns.to(tl.int64)
        x = tl.load(X + columns[None, :] * stride_xk, (rows < M)[:, None] & inside[None, :], 0.0)
        a = tl.load(A + columns[:, None] * stride_ak, inside[:, None] & (ranks < R)[None, :], 0.0)
        if DROPOUT:
            bytes = k // 8 + tl.arange(0, BLOCK_K // 8)
            kept = masks.draw(rows, bytes, row_bytes, K, t, key)
            x = masks.keep(x, kept)
            if tile_r == 0:
                at = mask + rows.to(tl.int64)[:, None] * row_bytes + bytes[None, :]
                stored = (rows < M)[:, None] & (bytes < row_bytes)[None, :]
                # byte by byte, as the threads have them: for wider stores they would draw anew
                tl.store(tl.multiple_of(at, [1, 1]), kept.to(tl.uint8), stored)
        acc = products.dot(x, a, acc, PRECISION)
    if scale is not None:
        c *= tl.load(scale)
    at = S + rows.to(tl.int64)[:, None] * R + ranks[None, :]
    tl.store(at, acc * c, (rows < M)[:, None] & (ranks < R)[None, :])


def shrink(
    X: Tensor, A: Tensor, c: float, scale: Tensor | None, t: int, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """S (M, R), float32, from X (M, K) and A (R, K); and the packed mask, of no rows if ``t == 0``.

    ``scale``, a float32 tensor of one element or None, multiplies the number ``c``.
    """
    (M, K), R = X.shape, A.shape[0]
    row_bytes = 4 * cdiv(K, 32)
    S = X.new_empty((M, R), dtype=torch.float32)
    mask = X.new_empty((M if t else 0, row_bytes), dtype=torch.uint8)
    best = config("shrink", X, A)
    BLOCK_R = best.ranks(R)
    precision = products.precision(X.dtype, A.dtype)
    BLOCK_M, num_warps = best.BLOCK_M, best.num_warps
    # few rows: smaller tiles, or much of the device would have none. With fewer warps, which would
    # draw the same bits otherwise; not where each program splits A, which takes as long for a row
    splits = precision in ("split3", "split tf32")
    while BLOCK_M > 16 and 2 * cdiv(M, BLOCK_M) <= best.programs and not splits:
        BLOCK_M, num_warps = BLOCK_M // 2, max(num_warps // 2, 1)
    launch(
        shrink_kernel,
        (cdiv(M, BLOCK_M) * cdiv(R, BLOCK_R),),
        X.device,
        X,
        A,
        S,
        mask,
        seed,
        c,
        scale,
        t,
        M,
        K,
        R,
        row_bytes,
        *X.stride(),
        *A.stride(),
        DROPOUT=t > 0,
        PRECISION=precision,
        BLOCK_M=BLOCK_M,
        BLOCK_K=best.BLOCK_K,
        BLOCK_R=BLOCK_R,
        num_warps=num_warps,
        num_stages=best.num_stages,
    )
    return S, mask
