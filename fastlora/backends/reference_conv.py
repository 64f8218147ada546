"""The stages of a convolution with a low-rank update (LoCon), in plain PyTorch.

As for a linear layer, with a convolution by the kernel-sized down factor A in the place of ``X Aᵀ``
and a 1x1 convolution by the up factor B in the place of ``S Bᵀ``. A grouped convolution has
factors of its own for each group. Sizes: n samples, C = in_channels, O = out_channels, g groups,
R = g * r.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import dropout
from fastlora.backends.reference import accumulation_dtype, row_blocks

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Geometry:
    """Where a convolution's kernel goes.

    Args:
        stride: One number a dimension, as the two that follow.
        padding: Zero padding that the convolution itself adds.
        dilation: Spacing of the kernel's taps.
        groups: Groups of channels.
        padded: What has been added to the input beforehand, in the order of ``F.pad``.
        pad_mode: How, as in ``F.pad``.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padded: tuple[int, ...] = ()
    pad_mode: str = "constant"

    def unpadded(self, shape: torch.Size) -> tuple[int, ...]:
        """Shape of one sample before it was padded."""
        size = list(shape[1:])
        for i in range(0, len(self.padded), 2):
            size[-1 - i // 2] -= self.padded[i] + self.padded[i + 1]
        return tuple(size)


def conv(X: Tensor, W: Tensor, bias: Tensor | None, at: Geometry) -> Tensor:
    """The plain convolution."""
    return _CONV[X.dim() - 2](X, W, bias, at.stride, at.padding, at.dilation, at.groups)


def conv_input_grad(dY: Tensor, W: Tensor, shape: torch.Size, at: Geometry) -> Tensor:
    """Gradient of :func:`conv` by its input, which has this shape."""
    return _conv_grad(dY, dY.new_empty(1).expand(shape), W, at, 0)


def conv_weight_grad(dY: Tensor, X: Tensor, shape: torch.Size, at: Geometry) -> Tensor:
    """Gradient of :func:`conv` by its weight, which has this shape."""
    return _conv_grad(dY, X, dY.new_empty(1).expand(shape), at, 1)


def _conv_grad(dY: Tensor, X: Tensor, W: Tensor, at: Geometry, which: int) -> Tensor:
    mask = [which == 0, which == 1, False]
    none = [0] * len(at.stride)
    return torch.ops.aten.convolution_backward(
        dY, X, W, None, at.stride, at.padding, at.dilation, False, none, at.groups, mask
    )[which]


def draw_mask(X: Tensor, t: int, seed: Tensor | None, at: Geometry) -> Tensor | None:
    """Packed keep mask of the input before padding, a row a sample; None where ``t == 0``."""
    if not t or seed is None:
        return None
    sample = torch.Size(at.unpadded(X.shape)).numel()
    return dropout.draw_mask(seed, X.shape[0], sample, t)


def keep(X: Tensor, mask: Tensor | None, at: Geometry) -> Tensor:
    """m∘X; a padded copy of an element goes with the element."""
    if mask is None or not at.padded:
        return dropout.keep(X.flatten(1), mask).view(X.shape)
    shape = at.unpadded(X.shape)
    kept = dropout.unpack_mask(mask, torch.Size(shape).numel()).view(-1, *shape)
    return X.where(F.pad(kept.to(X.dtype), at.padded, at.pad_mode).bool(), X.new_zeros(()))


def _samples(X: Tensor) -> Iterator[slice]:
    # a block of samples is widened at a time, never the whole input
    return row_blocks(X.shape[0], X.shape[1:].numel(), X.device.type)


def shrink(X: Tensor, A: Tensor, c: float | Tensor, mask: Tensor | None, at: Geometry) -> Tensor:
    """``S = c * conv(m∘X, A)``: (n, R, *out), accumulation dtype, from A (R, C / g, *kernel)."""
    A = A.to(accumulation_dtype(X.dtype))
    parts = [
        conv(keep(X[i], None if mask is None else mask[i], at).to(A.dtype), A, None, at)
        for i in _samples(X)
    ]
    return torch.cat(parts).mul_(c) if parts else conv(X.to(A.dtype), A, None, at)


def expand(X: Tensor, W: Tensor, bias: Tensor | None, S: Tensor, B: Tensor, at: Geometry) -> Tensor:
    """``Y = conv(X, W) + bias + B S``: (n, O, *out), dtype of X, from B (O, r)."""
    Y = conv(X, W, bias, at)
    B = B.to(S.dtype)
    for i in _samples(Y):
        delta = _by_group(B, at) @ _by_group(S[i].flatten(2), at, 1)
        Y[i] += delta.view(Y[i].shape)
    return Y


def grad_expand(
    dY: Tensor,
    S: Tensor | None,
    B: Tensor,
    c: float | Tensor,
    at: Geometry,
    need_dS: bool,
    need_dB: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """``dS = c * Bᵀ dY`` (n, R, *out) and ``dB = dY Sᵀ`` (O, r), for each group."""
    wide = accumulation_dtype(dY.dtype)
    B_g = _by_group(B.to(wide), at)
    dB = torch.zeros_like(B_g) if need_dB else None
    parts = []
    for i in _samples(dY):
        dY_g = _by_group(dY[i].flatten(2).to(wide), at, 1)
        if need_dS:
            dS_g = B_g.transpose(1, 2) @ dY_g
            parts.append(dS_g.reshape(dY_g.shape[0], -1, *dY.shape[2:]))
        if dB is not None and S is not None:
            dB += (dY_g @ _by_group(S[i].flatten(2), at, 1).transpose(2, 3)).sum(0)
    dS = None
    if need_dS:
        empty = dY.new_zeros((0, at.groups * B.shape[1], *dY.shape[2:]), dtype=wide)
        dS = torch.cat(parts or [empty]).mul_(c)
    return dS, None if dB is None else dB.view(B.shape).to(B.dtype)


def grad_shrink(dS: Tensor, X: Tensor, mask: Tensor | None, A: Tensor, at: Geometry) -> Tensor:
    """``dA``: gradient of ``conv(m∘X, A)`` by A, dtype of A."""
    dA = torch.zeros_like(A, dtype=dS.dtype)
    for i in _samples(X):
        kept = keep(X[i], None if mask is None else mask[i], at).to(dS.dtype)
        dA += conv_weight_grad(dS[i], kept, A.shape, at)
    return dA.to(A.dtype)


def grad_input(
    dY: Tensor,
    W: Tensor,
    dS: Tensor | None,
    A: Tensor,
    mask: Tensor | None,
    shape: torch.Size,
    at: Geometry,
) -> Tensor:
    """``dX``: gradient of ``conv(X, W)`` plus m∘ that of ``conv(X, A)``; X has this shape."""
    dX = conv_input_grad(dY, W, shape, at)
    if dS is None:
        return dX
    A = A.to(dS.dtype)
    for i in _samples(dX):
        part = conv_input_grad(dS[i], A, dX[i].shape, at)
        dX[i] += keep(part, None if mask is None else mask[i], at)
    return dX


def _by_group(t: Tensor, at: Geometry, dim: int = 0) -> Tensor:
    """``t`` with the dimension of the channels split into groups and what is left of it."""
    return t.unflatten(dim, (at.groups, -1))
