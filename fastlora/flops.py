"""How many operations the library's operators do, for ``torch.utils.flop_counter``.

Products alone are counted, as torch counts its own: two operations for each multiplication.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

# of a tensor, in the place of which a formula gets it
Shape = Sequence[int]


def register() -> None:
    """Lets each ``FlopCounterMode`` that is made from now on count them; once is enough.

    Not done by importing fastlora, since torch's counter imports Triton.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    # torch counts the other forms of what the reference adds the base product with
    formulas: dict[Any, Callable[..., int]] = {torch.ops.aten.addmm_: _addmm}
    for namespace in (torch.ops.fastlora, torch.ops.fastlora_triton, torch.ops.fastlora_cutlass):
        for name, formula in _FORMULAS.items():
            if hasattr(namespace, name):
                formulas[getattr(namespace, name)] = formula
    for operator, formula in formulas.items():
        if operator not in flop_registry:
            register_flop_formula(operator)(formula)


def _product(left: Shape, columns: int) -> int:
    return 2 * left[0] * left[1] * columns


def _addmm(Y: Shape, X: Shape, W: Shape, **_: Any) -> int:
    return _product(X, W[1])


def _shrink(X: Shape, A: Shape, *_: Any, **__: Any) -> int:
    return _product(A, X[0])


def _expand(X: Shape, W: Shape, bias: Any, S: Any, B: Shape, *_: Any, **__: Any) -> int:
    return _product(W, X[0]) + _product(B, X[0])


def _grad_expand(
    dY: Shape,
    S: Any,
    B: Shape,
    c: float,
    scale: Any,
    splits: Any,
    enabled: Any,
    interleave: int,
    need_dS: bool,
    need_dB: bool,
    **_: Any,
) -> int:
    return (need_dS + need_dB) * _product(B, dY[0])


def _grad_shrink(dS: Shape, X: Shape, *_: Any, **__: Any) -> int:
    return _product(dS, X[1])


def _grad_input(dY: Shape, W: Shape, dS: Shape | None, *_: Any, **__: Any) -> int:
    return _product(dY, W[1]) + (_product(dS, W[1]) if dS else 0)


def _delta(A: Shape, B: Shape, scaling: float, scale: Any, splits: Any, *_: Any, **__: Any) -> int:
    return _product(B, A[1])


def _add_low_rank(base: Any, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return _product(left, right[1])


def _forward(X: Shape, W: Shape, bias: Any, A: Shape, B: Shape, *_: Any, **__: Any) -> int:
    return _shrink(X, A) + _expand(X, W, bias, None, B)


def _backward(
    dY: Shape,
    X: Shape | None,
    W: Shape | None,
    A: Shape | None,
    B: Shape,
    S: Any,
    mask: Any,
    c: Any,
    scale: Any,
    splits: Any,
    enabled: Any,
    interleave: int,
    need_dX: bool,
    need_dA: bool,
    need_dB: bool,
    **_: Any,
) -> int:
    rows = dY[0]
    count = (need_dX or need_dA) * _product(B, rows) + need_dB * _product(B, rows)
    if A is not None:
        count += (need_dX + need_dA) * _product(A, rows)
    return count + (_product(dY, W[1]) if need_dX and W is not None else 0)


def _multi_forward(
    X: Shape,
    W: Sequence[Shape],
    bias: Any,
    A: Sequence[Shape],
    B: Sequence[Shape],
    *_: Any,
    **__: Any,
) -> int:
    return sum(_forward(X, W_i, None, A_i, B_i) for W_i, A_i, B_i in zip(W, A, B, strict=True))


def _multi_backward(
    dY: Sequence[Shape],
    X: Shape | None,
    W: Sequence[Shape | None],
    A: Sequence[Shape | None],
    B: Sequence[Shape],
    S: Any,
    mask: Any,
    c: Any,
    scale: Any,
    need_dX: bool,
    need_dA: Sequence[bool],
    need_dB: Sequence[bool],
    **_: Any,
) -> int:
    layers = zip(dY, W, A, B, need_dA, need_dB, strict=True)
    unused = (None, None, None, None, None, None, 1)
    return sum(
        _backward(dY_i, X, W_i, A_i, B_i, *unused, need_dX, need_dA_i, need_dB_i)
        for dY_i, W_i, A_i, B_i, need_dA_i, need_dB_i in layers
    )


_FORMULAS: dict[str, Callable[..., int]] = {
    "forward": _forward,
    "backward": _backward,
    "multi_forward": _multi_forward,
    "multi_backward": _multi_backward,
    "shrink": _shrink,
    "expand": _expand,
    "grad_expand": _grad_expand,
    "grad_shrink": _grad_shrink,
    "grad_input": _grad_input,
    "delta": _delta,
    "add_low_rank": _add_low_rank,
}
