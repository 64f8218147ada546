"""The stages in plain PyTorch: the truth for every other backend, and the path that always works.

Order of operations: the LoRA delta is written first and the base product is added in place, so the
sum is rounded once. Thin products run over blocks of rows: a block of X (or
dY) is read once, widened to the accumulation dtype and masked in cache, so that neither a dropped
nor a widened copy of X ever exists.

Sizes: M tokens, K in_features, N out_features, R = G * r. See ``docs/math.md``.
"""

import sys
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fastlora import dropout
from fastlora.backends import multi
from fastlora.blocks import Blocks

if TYPE_CHECKING:
    from fastlora.backends import Backend

name = "reference"
dtypes = None

# elements of a row block, 2 MiB in fp32: on a 2-core AVX-512 Xeon smaller ones measured slower,
# larger ones no faster; a GPU, where a block costs launches, takes larger ones
_BLOCK_ELEMENTS = 1 << 19
_GPU_BLOCKS = 8


def why_not() -> str | None:
    """None: this backend is usable everywhere PyTorch is."""
    return None


def description() -> str:
    """What it is made of, in a word or two."""
    return "plain PyTorch"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums over ``dtype`` are kept in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_blocks(M: int, width: int, device: str = "cpu") -> Iterator[slice]:
    """Slices of M rows, each few enough that ``width`` elements of every row fit in cache."""
    if torch.compiler.is_compiling():
        # a compiler does its own blocking, and would unroll the loop for one M
        yield slice(0, M)
        return
    elements = _BLOCK_ELEMENTS if device == "cpu" else _GPU_BLOCKS * _BLOCK_ELEMENTS
    rows = max(1, elements // max(width, 1))
    for first in range(0, M, rows):
        yield slice(first, min(first + rows, M))


def _rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    return None if mask is None else mask[rows]


def forward(
    X: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    c: float | Tensor,
    t: int,
    seed: Tensor | None,
    blocks: Blocks,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The stages of the forward pass: Y, and for backward S and the packed mask."""
    S, mask = shrink(X, A, c, t, seed)
    return expand(X, W, bias, S, B, blocks), S, mask


def backward(
    dY: Tensor,
    X: Tensor | None,
    W: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    S: Tensor | None,
    mask: Tensor | None,
    c: float | Tensor,
    blocks: Blocks,
    need_dX: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The stages of the backward pass: dX, dA and dB, each None where it is not asked for.

    X may be None without ``need_dA``, W without ``need_dX``, A without both and S without
    ``need_dB``.
    """
    dX = dA = dS = dB = None
    if need_dX or need_dA or need_dB:
        dS, dB = grad_expand(dY, S, B, c, blocks, need_dX or need_dA, need_dB)
    if A is not None and dS is not None:
        dA = grad_shrink(dS, X, mask, A) if need_dA and X is not None else None
        dX = grad_input(dY, W, dS, A, mask) if need_dX and W is not None else None
    return dX, dA, dB


def shrink(
    X: Tensor, A: Tensor, c: float | Tensor, t: int, seed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """``S = c * (m∘X) Aᵀ``.

    Args:
        X: (M, K).
        A: (R, K).
        c: ``scaling / (1 - p)``.
        t: Dropout threshold; 0 draws no mask.
        seed: Mask seed, needed where ``t > 0``.

    Returns:
        S (M, R) in the accumulation dtype, and the packed mask (None where ``t == 0``).
    """
    M, K = X.shape
    At = A.to(accumulation_dtype(X.dtype)).t()
    S = At.new_empty(M, A.shape[0])
    mask = X.new_empty((M, dropout.mask_bytes(K)), dtype=torch.uint8) if t else None
    for rows in row_blocks(M, K, X.device.type):
        if mask is not None and seed is not None:
            mask[rows] = dropout.draw_mask(seed, rows.stop - rows.start, K, t, rows.start)
        S[rows] = dropout.keep(X[rows].to(At.dtype), _rows(mask, rows)) @ At
    return S.mul_(c), mask


def expand(
    X: Tensor, W: Tensor, bias: Tensor | None, S: Tensor, B: Tensor, blocks: Blocks
) -> Tensor:
    """``Y = X Wᵀ + bias + S_g B_gᵀ``, the last term on the features of adapted block g.

    Args:
        X: (M, K).
        W: (N, K).
        bias: (N,) or None.
        S: (M, R), accumulation dtype.
        B: Factor rows of the adapted blocks, stacked, (n, r).
        blocks: Layout of the output.

    Returns:
        Y (M, N), dtype of X.
    """
    M, N = X.shape[0], W.shape[0]
    Y = X.new_empty(M, N)
    if bias is not None:
        # expanded, as torch 2.11 compares the sizes, and exports no program for every M
        Y.copy_(bias.expand_as(Y))
    elif blocks.adapted_features < N:
        Y.zero_()
    r = B.shape[1]
    for g in range(blocks.count):
        S_g = S[:, g * r : (g + 1) * r]
        B_g = B[blocks.rows_of_B(g)].to(S.dtype).t()
        for rows in row_blocks(M, B_g.shape[1], X.device.type):
            Y_g = blocks.output(Y[rows], g)
            delta = (S_g[rows] @ B_g).view(Y_g.shape)
            Y_g.copy_(delta if bias is None else delta.add_(blocks.output(bias, g)))
    return Y.addmm_(X, W.t())


def grad_expand(
    dY: Tensor,
    S: Tensor | None,
    B: Tensor,
    c: float | Tensor,
    blocks: Blocks,
    need_dS: bool,
    need_dB: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """``dS = c * dY_g B_g`` and ``dB_g = dY_gᵀ S_g``, from one read of dY.

    Args:
        dY: (M, N).
        S: (M, R); may be None where ``need_dB`` is False.
        B: (n, r).
        c: ``scaling / (1 - p)``.
        blocks: Layout of the output.
        need_dS: Compute dS.
        need_dB: Compute dB.

    Returns:
        dS (M, R) in the accumulation dtype and dB in the dtype of B; None where not asked for.
    """
    M, r = dY.shape[0], B.shape[1]
    wide = accumulation_dtype(dY.dtype)
    dS = dY.new_empty((M, blocks.count * r), dtype=wide) if need_dS else None
    dB = torch.empty_like(B) if need_dB else None
    for g in range(blocks.count):
        of_g, rows_of_B = slice(g * r, (g + 1) * r), blocks.rows_of_B(g)
        Bt_g = B[rows_of_B].to(wide).t().contiguous()
        dBt_g = torch.zeros_like(Bt_g) if need_dB else None
        for rows in row_blocks(M, Bt_g.shape[1], dY.device.type):
            dY_g = blocks.output(dY[rows], g).flatten(1).to(wide)
            if dS is not None:
                # this way round, BLAS libraries sum in more than one accumulator: measured rms
                # error in fp32 0.2 to 1 times that of dY_g @ B_g
                dS[rows, of_g] = (Bt_g @ dY_g.t()).t()
            if dBt_g is not None and S is not None:
                dBt_g.addmm_(S[rows, of_g].t(), dY_g)
        if dB is not None and dBt_g is not None:
            dB[rows_of_B] = dBt_g.t()
    return None if dS is None else dS.mul_(c), dB


def grad_shrink(dS: Tensor, X: Tensor, mask: Tensor | None, A: Tensor) -> Tensor:
    """``dA = dSᵀ (m∘X)``: (R, K), dtype of A, from dS (M, R), X (M, K) and the packed mask."""
    dA = torch.zeros_like(A, dtype=dS.dtype)
    for rows in row_blocks(X.shape[0], X.shape[1], X.device.type):
        dA.addmm_(dS[rows].t(), dropout.keep(X[rows].to(dS.dtype), _rows(mask, rows)))
    return dA.to(A.dtype)


def grad_input(dY: Tensor, W: Tensor, dS: Tensor | None, A: Tensor, mask: Tensor | None) -> Tensor:
    """``dX = dY W + m∘(dS A)``: (M, K), dtype of dY; dS None leaves out the second term."""
    if dS is None:
        return dY @ W
    M, K = dY.shape[0], W.shape[1]
    A = A.to(dS.dtype)
    dX = dY.new_empty(M, K)
    for rows in row_blocks(M, K, dY.device.type):
        dX[rows] = dropout.keep(dS[rows] @ A, _rows(mask, rows))
    return multi.add_product(dX, dY, W)


def delta(A: Tensor, B: Tensor, scaling: float | Tensor, blocks: Blocks) -> Tensor:
    """``ΔW``: ``scaling * B_g A_g`` on the rows of adapted block g, else 0: (N, K), dtype of B."""
    dW = B.new_zeros(A.shape[1], blocks.out_features)
    for g, (A_g, B_g) in enumerate(blocks.factors(A, B)):
        out = blocks.output(dW, g)
        out.copy_((A_g.t() @ B_g.t()).mul_(scaling).view(out.shape))
    return dW.t()


_stages = cast("Backend", sys.modules[__name__])
multi_forward = partial(multi.forward, _stages)
multi_backward = partial(multi.backward, _stages)
