"""Layers that share X, from the stages of one layer: for backends that have no more than these.

Each argument that is a list has an element for every layer. A layer without factors has some of
rank 0, and is its base product alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.blocks import Blocks

if TYPE_CHECKING:
    from fastlora.backends import Backend


def forward(
    stages: "Backend",
    X: Tensor,
    W: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    c: Sequence[float | Tensor],
    t: Sequence[int],
    seed: Sequence[Tensor | None],
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """The forward pass of every layer: lists of Y, S and the packed mask.

    Args:
        stages: Whose stages to run.
        X: (M, K), of all layers.
        W: Each (N_i, K).
        bias: Each (N_i,) or None.
        A: Each (r_i, K).
        B: Each (N_i, r_i).
        c: Each ``scaling / (1 - p)``.
        t: Dropout thresholds; 0 where the rank is.
        seed: Mask seeds, needed where ``t > 0``.
    """
    results: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
    for W_i, bias_i, A_i, B_i, c_i, t_i, seed_i in zip(W, bias, A, B, c, t, seed, strict=True):
        if B_i.shape[1]:
            layout = Blocks.single(len(W_i))
            results.append(stages.forward(X, W_i, bias_i, A_i, B_i, c_i, t_i, seed_i, layout))
        else:
            results.append((F.linear(X, W_i, bias_i), None, None))
    Y, S, mask = zip(*results, strict=True)
    return list(Y), list(S), list(mask)


def backward(
    stages: "Backend",
    dY: Sequence[Tensor],
    X: Tensor | None,
    W: Sequence[Tensor | None],
    A: Sequence[Tensor | None],
    B: Sequence[Tensor],
    S: Sequence[Tensor | None],
    mask: Sequence[Tensor | None],
    c: Sequence[float | Tensor],
    need_dX: bool,
    need_dA: Sequence[bool],
    need_dB: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """The backward pass of every layer: the sum of their dX, and lists of dA and dB.

    None stands for what is not asked for, and for operands that are needed for nothing else.
    """
    dX: Tensor | None = None
    dA: list[Tensor | None] = [None] * len(dY)
    dB: list[Tensor | None] = [None] * len(dY)
    for i, (dY_i, W_i, A_i, B_i) in enumerate(zip(dY, W, A, B, strict=True)):
        dS, need_dS = None, need_dX or need_dA[i]
        if B_i.shape[1] and (need_dS or need_dB[i]):
            layout = Blocks.single(len(B_i))
            dS, dB[i] = stages.grad_expand(dY_i, S[i], B_i, c[i], layout, need_dS, need_dB[i])
        if A_i is None or dS is None:
            continue
        if need_dA[i] and X is not None:
            dA[i] = stages.grad_shrink(dS, X, mask[i], A_i)
        if need_dX and W_i is not None:
            # of an output of no features: m∘(dS A) alone
            part = stages.grad_input(dY_i[:, :0], W_i[:0], dS, A_i, mask[i])
            dX = part if dX is None else dX.add_(part)
    for dY_i, W_i in zip(dY, W, strict=True):
        if need_dX and W_i is not None:
            dX = dY_i @ W_i if dX is None else add_product(dX, dY_i, W_i)
    return dX, dA, dB


def add_product(dX: Tensor, dY: Tensor, W: Tensor) -> Tensor:
    """``dX += dY W``."""
    if not dY.shape[1]:
        # of nothing, for which ATen would read and write all of dX
        return dX
    thin = dX.shape[0] < 4 or dX.shape[1] < 16
    if thin and dX.dtype.itemsize > 2 and not torch.compiler.is_compiling():
        # MKL's path for so few is up to 1.4 times less accurate (rms) when it adds in place
        return dX.add_(dY @ W)
    return dX.addmm_(dY, W)
