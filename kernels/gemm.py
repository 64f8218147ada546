"""The main loop of a base product, whose accumulator other terms are added to.

Operands come through TMA descriptors, made on the host, where the chip has them and the strides
allow it; through pointers elsewhere.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.configs import Config
from fastlora.kernels.launch import INTERPRETER, architecture, cdiv

# rows of tiles that share columns while these are in the L2 cache
GROUP = tl.constexpr(8)


@triton.jit
def place(tile, tiles_m, tiles_n):
    """Row and column of the tile that is ``tile`` in the order of computation."""
    in_group = GROUP * tiles_n
    first = tile // in_group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + tile % in_group % height, tile % in_group // height


@triton.jit
def accumulate(
    acc,
    left,
    right,
    m,
    n,
    M,
    N,
    K,
    stride_lm,
    stride_lk,
    stride_rn,
    stride_rk,
    RIGHT_BY_N: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``acc + left @ rightᵀ`` for the tile at row m and column n.

    left is (M, K); right is read as (N, K), and stored so (``RIGHT_BY_N``) or as (K, N).
    """
    if TMA:
        for k in range(0, K, BLOCK_K):
            a = left.load([m, k])
            b = right.load([n, k]).T if RIGHT_BY_N else right.load([k, n])
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        rows, columns = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        left += rows.to(tl.int64)[:, None] * stride_lm
        right += columns.to(tl.int64)[None, :] * stride_rn
        for k in range(0, K, BLOCK_K):
            inner = k + tl.arange(0, BLOCK_K)
            inside = inner < K
            at = inner.to(tl.int64)
            a = tl.load(left + at[None, :] * stride_lk, (rows < M)[:, None] & inside[None, :], 0.0)
            b = tl.load(
                right + at[:, None] * stride_rk, inside[:, None] & (columns < N)[None, :], 0.0
            )
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


def descriptors(*operands: Tensor) -> bool:
    """Whether the device has TMA, and all operands can be read through its descriptors."""
    return has_tma(architecture(operands[0].device)) and all(_describable(t) for t in operands)


def has_tma(architecture: str) -> bool:
    """Hopper and newer; the interpreter stands in for it."""
    family, _, number = architecture.partition("_")
    return architecture == INTERPRETER or (family == "sm" and int(number) >= 90)


def operand(t: Tensor, rows: int, columns: int, tma: bool) -> Any:
    """What a kernel gets for ``t``: itself, or a descriptor of tiles of ``rows`` by ``columns``."""
    if not tma:
        return t
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(t, [rows, columns])


def grid(M: int, N: int, BLOCK_M: int, BLOCK_N: int, best: Config) -> tuple[int]:
    """A program a tile, or as many as fill the device and go on from tile to tile."""
    tiles = cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)
    return (min(tiles, best.programs) if best.persistent else tiles,)


def _describable(t: Tensor) -> bool:
    # TMA wants 16-byte addresses and pitches, contiguous rows and at least one element
    size = t.element_size()
    return (
        t.numel() > 0
        and t.stride(1) == 1
        and t.stride(0) * size % 16 == 0
        and t.data_ptr() % 16 == 0
    )
