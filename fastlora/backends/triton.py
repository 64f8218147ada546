"""The stages in Triton, for CUDA and ROCm tensors: each operand is read once.

The kernels are those of ``fastlora.kernels``, which is imported at the first call. With
``TRITON_INTERPRET=1`` set before that, Triton runs them on CPU tensors, for tests.
"""

from functools import lru_cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fastlora.backends import multi
from fastlora.backends.operators import FLOATS, Operators, define
from fastlora.blocks import Blocks
from fastlora.environment import variable

if TYPE_CHECKING:
    from fastlora.backends import Backend
    from fastlora.kernels.layout import Layout


def _interpreted() -> bool:
    return variable("TRITON_INTERPRET") == "1"


name = "triton"
dtypes = dict.fromkeys(("cuda", "cpu") if _interpreted() else ("cuda",), FLOATS)


def why_not() -> str | None:
    """None where Triton is installed and there is a GPU, else what is missing."""
    if not _installed():
        return "needs the package 'triton', which is not installed"
    if not (torch.cuda.is_available() or _interpreted()):
        return "there is no CUDA or ROCm device"
    return None


@lru_cache
def _installed() -> bool:
    return find_spec("triton") is not None


def description() -> str:
    """Where it runs the kernels, and where their tile sizes come from."""
    from fastlora.kernels import configs

    if not torch.cuda.is_available():
        return "Triton's interpreter"
    architecture = _architecture()
    return f"{architecture}, tiles: {configs.table(architecture).origin}"


def why_not_alone() -> str | None:
    """None where ``auto`` takes it, which is where it was measured, else why not."""
    from fastlora.kernels import configs

    if not torch.cuda.is_available() or configs.measured(_architecture()):
        return None
    return f"its kernels were not measured on {_architecture()} yet"


def _architecture() -> str:
    from fastlora.kernels import launch

    return launch.architecture(torch.device("cuda", torch.cuda.current_device()))


def _forward(
    X: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    c: float,
    scale: Tensor | None,
    t: int,
    seed: Tensor | None,
    splits: list[int],
    enabled: list[bool],
    interleave: int,
) -> tuple[Tensor, Tensor, Tensor]:
    S, mask = _shrink(X, A, c, scale, t, seed)
    return _expand(X, W, bias, S, B, splits, enabled, interleave), S, mask


def _backward(
    dY: Tensor,
    X: Tensor | None,
    W: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    S: Tensor | None,
    mask: Tensor | None,
    c: float,
    scale: Tensor | None,
    splits: list[int],
    enabled: list[bool],
    interleave: int,
    need_dX: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dS, dB = _grad_expand(
        dY, S, B, c, scale, splits, enabled, interleave, need_dX or need_dA, need_dB
    )
    dX = dA = dY.new_empty(0)
    if need_dA and X is not None and A is not None:
        dA = _grad_shrink(dS, X, mask, A)
    if need_dX and W is not None and A is not None:
        dX = _grad_input(dY, W, dS, A, mask)
    return dX, dA, dB


def _shrink(
    X: Tensor, A: Tensor, c: float, scale: Tensor | None, t: int, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    from fastlora.kernels.shrink import shrink

    return shrink(X, A, *_factor(c, scale, X.device), t, seed)


def _expand(
    X: Tensor,
    W: Tensor,
    bias: Tensor | None,
    S: Tensor,
    B: Tensor,
    splits: list[int],
    enabled: list[bool],
    interleave: int,
) -> Tensor:
    from fastlora.kernels.expand import expand

    return expand(X, W, bias, S, B, _layout(tuple(splits), tuple(enabled), interleave))


def _grad_expand(
    dY: Tensor,
    S: Tensor | None,
    B: Tensor,
    c: float,
    scale: Tensor | None,
    splits: list[int],
    enabled: list[bool],
    interleave: int,
    need_dS: bool,
    need_dB: bool,
) -> tuple[Tensor, Tensor]:
    from fastlora.kernels.grad_expand import grad_expand

    layout = _layout(tuple(splits), tuple(enabled), interleave)
    factor = _factor(c, scale, dY.device)
    dS, dB = grad_expand(dY, S, B, *factor, layout, need_dS, need_dB)
    empty = B.new_empty(0)
    return empty if dS is None else dS, empty if dB is None else dB


def _grad_shrink(dS: Tensor, X: Tensor, mask: Tensor | None, A: Tensor) -> Tensor:
    from fastlora.kernels.grad_shrink import grad_shrink

    return grad_shrink(dS, X, mask, A)


def _grad_input(dY: Tensor, W: Tensor, dS: Tensor | None, A: Tensor, mask: Tensor | None) -> Tensor:
    from fastlora.kernels.grad_input import grad_input

    return grad_input(dY, W, dS, A, mask)


def _delta(
    A: Tensor,
    B: Tensor,
    scaling: float,
    scale: Tensor | None,
    splits: list[int],
    enabled: list[bool],
    interleave: int,
) -> Tensor:
    from fastlora.kernels.delta import delta

    layout = _layout(tuple(splits), tuple(enabled), interleave)
    return delta(A, B, *_factor(scaling, scale, B.device), layout)


def _factor(c: float, scale: Tensor | None, device: torch.device) -> tuple[float, Tensor | None]:
    """The number, and the float32 tensor on ``device`` or None, that kernels multiply by."""
    if scale is None:
        return c, None
    if scale.device != device:
        # on the CPU, as torch.compile makes one of a number: no kernel can read it there
        return c * scale.item(), None
    return c, scale.to(torch.float32)


@lru_cache
def _layout(splits: tuple[int, ...], enabled: tuple[bool, ...], interleave: int) -> "Layout":
    """The layout of an output as the kernels take it."""
    from fastlora.kernels.layout import Layout

    return Layout(*Blocks(splits, enabled, interleave).pattern)


for _answer in (why_not, why_not_alone):
    # as torch.compiler.assume_constant_result does, which would import Dynamo, and Triton with it
    _answer._dynamo_marked_constant = True  # type: ignore[attr-defined]

_KERNELS = {
    "forward": _forward,
    "backward": _backward,
    "shrink": _shrink,
    "expand": _expand,
    "grad_expand": _grad_expand,
    "grad_shrink": _grad_shrink,
    "grad_input": _grad_input,
    "delta": _delta,
}
_library = define("fastlora_triton", _KERNELS)
for _name, _kernel in _KERNELS.items():
    for _key in ("CUDA", "CPU"):
        _library.impl(_name, _kernel, _key)

_operators = Operators("fastlora_triton")
forward = _operators.forward
backward = _operators.backward
shrink = _operators.shrink
expand = _operators.expand
grad_expand = _operators.grad_expand
grad_shrink = _operators.grad_shrink
grad_input = _operators.grad_input
delta = _operators.delta
multi_forward = partial(multi.forward, cast("Backend", _operators))
multi_backward = partial(multi.backward, cast("Backend", _operators))
