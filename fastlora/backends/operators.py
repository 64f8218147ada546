"""The stages as PyTorch operators: their schemas, once for every backend that has kernels.

Such a backend has a namespace of operators, with the schemas and fake kernels given here. Its
stages are methods of :class:`Operators`, with the signatures of
:mod:`fastlora.backends.reference`, which documents them.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora import dropout
from fastlora.backends.reference import accumulation_dtype
from fastlora.blocks import Blocks

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_SCHEMAS = {
    "forward": "(Tensor X, Tensor W, Tensor? bias, Tensor A, Tensor B, float c, Tensor? scale, "
    "int t, Tensor? seed, int[] splits, bool[] enabled, int interleave) "
    "-> (Tensor Y, Tensor S, Tensor mask)",
    "backward": "(Tensor dY, Tensor? X, Tensor? W, Tensor? A, Tensor B, Tensor? S, Tensor? mask, "
    "float c, Tensor? scale, int[] splits, bool[] enabled, int interleave, bool need_dX, "
    "bool need_dA, bool need_dB) -> (Tensor dX, Tensor dA, Tensor dB)",
    "multi_forward": "(Tensor X, Tensor[] W, Tensor?[] bias, Tensor[] A, Tensor[] B, float[] c, "
    "Tensor?[] scale, int[] t, Tensor?[] seed) -> (Tensor[] Y, Tensor[] S, Tensor[] mask)",
    "multi_backward": "(Tensor[] dY, Tensor? X, Tensor?[] W, Tensor?[] A, Tensor[] B, Tensor?[] S, "
    "Tensor?[] mask, float[] c, Tensor?[] scale, bool need_dX, bool[] need_dA, bool[] need_dB) "
    "-> (Tensor dX, Tensor[] dA, Tensor[] dB)",
    "shrink": "(Tensor X, Tensor A, float c, Tensor? scale, int t, Tensor? seed) "
    "-> (Tensor S, Tensor mask)",
    "expand": "(Tensor X, Tensor W, Tensor? bias, Tensor S, Tensor B, int[] splits, "
    "bool[] enabled, int interleave) -> Tensor",
    "grad_expand": "(Tensor dY, Tensor? S, Tensor B, float c, Tensor? scale, int[] splits, "
    "bool[] enabled, int interleave, bool need_dS, bool need_dB) -> (Tensor dS, Tensor dB)",
    "grad_shrink": "(Tensor dS, Tensor X, Tensor? mask, Tensor A) -> Tensor",
    "grad_input": "(Tensor dY, Tensor W, Tensor? dS, Tensor A, Tensor? mask) -> Tensor",
    "delta": "(Tensor A, Tensor B, float scaling, Tensor? scale, int[] splits, bool[] enabled, "
    "int interleave) -> Tensor",
    # what merging does, outside of any graph
    "add_low_rank": "(Tensor base, Tensor left, Tensor right, Tensor row_scale, "
    "Tensor? column_scale) -> Tensor",
    "encode_correction": "(Tensor predicted, Tensor exact) -> (int bits, Tensor codes, "
    "Tensor escaped, Tensor values)",
    "decode_correction": "(Tensor predicted, int bits, Tensor codes, Tensor escaped, "
    "Tensor values) -> Tensor",
    "checksum": "(Tensor weight) -> int",
}


def define(namespace: str, names: Iterable[str] = _SCHEMAS) -> torch.library.Library:
    """Defines operators of a namespace, with their fake kernels; returns their library."""
    library = torch.library.Library(namespace, "FRAGMENT")
    for name in names:
        library.define(name + _SCHEMAS[name])
        if fake := _FAKES.get(name):
            # the shapes, dtypes and strides of results, for torch.compile and torch.export
            torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return library


class Operators:
    """The stages of the operators of one namespace.

    Args:
        namespace: As in ``torch.ops.<namespace>``.
    """

    def __init__(self, namespace: str) -> None:
        self._ops = getattr(torch.ops, namespace)

    def forward(
        self,
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
        """The forward pass in one call."""
        Y, S, mask = self._ops.forward(X, W, bias, A, B, *_factor(c), t, seed, *_layout(blocks))
        return Y, S, mask if t else None

    def backward(
        self,
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
        """The backward pass in one call."""
        dX, dA, dB = self._ops.backward(
            dY, X, W, A, B, S, mask, *_factor(c), *_layout(blocks), need_dX, need_dA, need_dB
        )
        return dX if need_dX else None, dA if need_dA else None, dB if need_dB else None

    def multi_forward(
        self,
        X: Tensor,
        W: Sequence[Tensor],
        bias: Sequence[Tensor | None],
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        c: Sequence[float | Tensor],
        t: Sequence[int],
        seed: Sequence[Tensor | None],
    ) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
        """The forward pass of layers that share X, in one call."""
        Y, S, mask = self._ops.multi_forward(X, W, bias, A, B, *_factors(c), t, seed)
        return Y, S, [mask_i if t_i else None for mask_i, t_i in zip(mask, t, strict=True)]

    def multi_backward(
        self,
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
        """The backward pass of layers that share X, in one call."""
        dX, dA, dB = self._ops.multi_backward(
            dY, X, W, A, B, S, mask, *_factors(c), need_dX, need_dA, need_dB
        )
        return dX if need_dX else None, _needed(dA, need_dA), _needed(dB, need_dB)

    def shrink(
        self, X: Tensor, A: Tensor, c: float | Tensor, t: int, seed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        S, mask = self._ops.shrink(X, A, *_factor(c), t, seed)
        return S, mask if t else None

    def expand(
        self, X: Tensor, W: Tensor, bias: Tensor | None, S: Tensor, B: Tensor, blocks: Blocks
    ) -> Tensor:
        return self._ops.expand(X, W, bias, S, B, *_layout(blocks))

    def grad_expand(
        self,
        dY: Tensor,
        S: Tensor | None,
        B: Tensor,
        c: float | Tensor,
        blocks: Blocks,
        need_dS: bool,
        need_dB: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        dS, dB = self._ops.grad_expand(dY, S, B, *_factor(c), *_layout(blocks), need_dS, need_dB)
        return dS if need_dS else None, dB if need_dB else None

    def grad_shrink(self, dS: Tensor, X: Tensor, mask: Tensor | None, A: Tensor) -> Tensor:
        return self._ops.grad_shrink(dS, X, mask, A)

    def grad_input(
        self, dY: Tensor, W: Tensor, dS: Tensor | None, A: Tensor, mask: Tensor | None
    ) -> Tensor:
        return self._ops.grad_input(dY, W, dS, A, mask)

    def delta(self, A: Tensor, B: Tensor, scaling: float | Tensor, blocks: Blocks) -> Tensor:
        return self._ops.delta(A, B, *_factor(scaling), *_layout(blocks))


def _factor(c: float | Tensor) -> tuple[float, Tensor | None]:
    """A number, and the tensor it is to be multiplied by."""
    if torch.compiler.is_compiling() and not isinstance(c, Tensor):
        # as an operator's number, each new scaling would be compiled anew
        c = torch.ones((), dtype=torch.float64) * c
    return (1.0, c) if isinstance(c, Tensor) else (c, None)


def _factors(c: Sequence[float | Tensor]) -> tuple[list[float], list[Tensor | None]]:
    numbers, scales = zip(*map(_factor, c), strict=True)
    return list(numbers), list(scales)


def _needed(gradients: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    return [t if need else None for t, need in zip(gradients, needed, strict=True)]


def _layout(blocks: Blocks) -> tuple[tuple[int, ...], tuple[bool, ...], int]:
    return blocks.splits, blocks.enabled, blocks.interleave


def _fake_shrink(
    X: Tensor, A: Tensor, c: float, scale: Tensor | None, t: int, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    M, K = X.shape
    S = X.new_empty(M, A.shape[0], dtype=accumulation_dtype(X.dtype))
    return S, X.new_empty(M if t else 0, dropout.mask_bytes(K), dtype=torch.uint8)


def _fake_expand(X: Tensor, W: Tensor, *_: object) -> Tensor:
    return X.new_empty(X.shape[0], W.shape[0])


def _fake_forward(
    X: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    c: float,
    scale: Tensor | None,
    t: int,
    seed: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_expand(X, W), *_fake_shrink(X, A, c, scale, t, seed)


def _fake_grad_expand(
    dY: Tensor,
    S: Tensor | None,
    B: Tensor,
    c: float,
    scale: Tensor | None,
    splits: Sequence[int],
    enabled: Sequence[bool],
    interleave: int,
    need_dS: bool,
    need_dB: bool,
) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(dY.dtype)
    shape = (dY.shape[0], sum(enabled) * B.shape[1]) if need_dS else (0,)
    return dY.new_empty(shape, dtype=wide), B.new_empty(B.shape if need_dB else (0,))


def _fake_grad_shrink(dS: Tensor, X: Tensor, mask: Tensor | None, A: Tensor) -> Tensor:
    return A.new_empty(A.shape)


def _fake_grad_input(dY: Tensor, W: Tensor, *_: object) -> Tensor:
    return dY.new_empty(dY.shape[0], W.shape[1])


def _fake_backward(
    dY: Tensor,
    X: Tensor | None,
    W: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    S: Tensor | None,
    mask: Tensor | None,
    c: float,
    scale: Tensor | None,
    splits: Sequence[int],
    enabled: Sequence[bool],
    interleave: int,
    need_dX: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _fake_grad_input(dY, W) if need_dX and W is not None else dY.new_empty(0),
        _fake_gradient(A, need_dA, B),
        _fake_gradient(B, need_dB, B),
    )


def _fake_multi_forward(
    X: Tensor,
    W: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    c: Sequence[float],
    scale: Sequence[Tensor | None],
    t: Sequence[int],
    seed: Sequence[Tensor | None],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    Y, S, mask = [], [], []
    for W_i, A_i, t_i in zip(W, A, t, strict=True):
        Y.append(_fake_expand(X, W_i))
        S_i, mask_i = _fake_shrink(X, A_i, 1.0, None, t_i if len(A_i) else 0, None)
        S.append(S_i)
        mask.append(mask_i)
    return Y, S, mask


def _fake_multi_backward(
    dY: Sequence[Tensor],
    X: Tensor | None,
    W: Sequence[Tensor | None],
    A: Sequence[Tensor | None],
    B: Sequence[Tensor],
    S: Sequence[Tensor | None],
    mask: Sequence[Tensor | None],
    c: Sequence[float],
    scale: Sequence[Tensor | None],
    need_dX: bool,
    need_dA: Sequence[bool],
    need_dB: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return (
        _fake_grad_input(dY[0], W[0]) if need_dX and W[0] is not None else dY[0].new_empty(0),
        [_fake_gradient(A_i, need, B_i) for A_i, need, B_i in zip(A, need_dA, B, strict=True)],
        [_fake_gradient(B_i, need, B_i) for B_i, need in zip(B, need_dB, strict=True)],
    )


def _fake_gradient(factor: Tensor | None, needed: bool, B: Tensor) -> Tensor:
    return B.new_empty(0 if factor is None or not needed else factor.shape)


def _fake_delta(
    A: Tensor, B: Tensor, scaling: float, scale: Tensor | None, splits: Sequence[int], *_: object
) -> Tensor:
    return B.new_empty(sum(splits), A.shape[1])


_FAKES: dict[str, Callable[..., Any]] = {
    "forward": _fake_forward,
    "backward": _fake_backward,
    "multi_forward": _fake_multi_forward,
    "multi_backward": _fake_multi_backward,
    "shrink": _fake_shrink,
    "expand": _fake_expand,
    "grad_expand": _fake_grad_expand,
    "grad_shrink": _fake_grad_shrink,
    "grad_input": _fake_grad_input,
    "delta": _fake_delta,
}
