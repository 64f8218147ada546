"""``base + (left @ right) * row_scale * column_scale`` in float64, rounded once.

What merging adds to a weight, and unmerging takes off. The steps and their roundings are those of
every other backend, so nothing is contracted, and the product is a sum of outer products: r is
small, and float64 has no tensor core worth the detour on most devices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.launch import cdiv, launch

BLOCK_N, BLOCK_K = 16, 128


@triton.jit
def add_low_rank_kernel(
    base,
    left,
    right,
    row_scale,
    column_scale,
    out,
    N,
    K,
    r,
    stride_n,
    stride_k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows < N)[:, None] & (columns < K)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float64)
    for i in range(r):
        of_left = tl.load(left + rows * r + i, rows < N, 0.0)
        of_right = tl.load(right + columns, columns < K, 0.0)
        total += of_left[:, None] * of_right[None, :]
        right += K
    total *= tl.load(row_scale + rows, rows < N, 0.0)[:, None]
    if column_scale is not None:
        total *= tl.load(column_scale + columns, columns < K, 0.0)[None, :]
    at = base + rows[:, None] * stride_n + columns[None, :] * stride_k
    total += tl.load(at, inside, 0.0).to(tl.float64)
    rounded = round_once(total, out.dtype.element_ty)
    tl.store(out + rows[:, None] * K + columns[None, :], rounded, inside)


@triton.jit
def round_once(values, dtype: tl.constexpr):
    """float64 to ``dtype``, to nearest even."""
    if dtype.primitive_bitwidth > 16:
        return values.to(dtype)
    # 16 bits are reached through float32: round to odd there, or ties would be rounded twice
    single = values.to(tl.float32)
    error = values - single.to(tl.float64)
    bits = single.to(tl.int32, bitcast=True)
    finite = tl.abs(single) < float("inf")
    inexact = (error != 0) & (bits & 1 == 0) & (single != 0) & finite
    toward = tl.where((error > 0) == (single > 0), 1, -1)
    bits += tl.where(inexact, toward, 0)
    return bits.to(tl.float32, bitcast=True).to(dtype)


def add_low_rank(
    base: Tensor, left: Tensor, right: Tensor, row_scale: Tensor, column_scale: Tensor | None
) -> Tensor:
    """The sum (N, K), contiguous, dtype of base.

    ``left`` is (N, r), ``right`` (r, K), ``row_scale`` (N, 1) and ``column_scale`` (1, K) or None,
    all float64.
    """
    (N, r), K = left.shape, right.shape[1]
    out = torch.empty((N, K), dtype=base.dtype, device=base.device)
    launch(
        add_low_rank_kernel,
        (cdiv(N, BLOCK_N), cdiv(K, BLOCK_K)),
        base.device,
        base,
        left.contiguous(),
        right.contiguous(),
        row_scale.contiguous(),
        None if column_scale is None else column_scale.contiguous(),
        out,
        N,
        K,
        r,
        *base.stride(),
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out
