"""The compute backends: what a backend is, which are usable here, and how one is chosen.

Every backend has the same stages under the same names; ``reference`` holds their documentation.
A backend is a module of this folder.
"""

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from fastlora import dispatch
from fastlora.backends import cutlass, native, reference, triton
from fastlora.blocks import Blocks

NAMES = ("reference", "native", "triton", "cutlass")


class Backend(Protocol):
    """The stages of a LoRA linear layer on 2-D tensors, and the passes made of them.

    See :mod:`fastlora.backends.reference` for shapes and dtypes, :mod:`fastlora.backends.multi` for
    those of layers that share X, ``docs/math.md`` for the maths.

    Attributes:
        name: One of :data:`NAMES`.
        dtypes: Those of x that it has kernels for, by type of device; None: all that torch has.
    """

    name: str
    dtypes: Mapping[str, tuple[torch.dtype, ...]] | None

    def why_not(self) -> str | None: ...

    def description(self) -> str: ...

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
    ) -> tuple[Tensor, Tensor, Tensor | None]: ...

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
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...

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
    ) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]: ...

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
    ) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]: ...

    def shrink(
        self, X: Tensor, A: Tensor, c: float | Tensor, t: int, seed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]: ...

    def expand(
        self, X: Tensor, W: Tensor, bias: Tensor | None, S: Tensor, B: Tensor, blocks: Blocks
    ) -> Tensor: ...

    def grad_expand(
        self,
        dY: Tensor,
        S: Tensor | None,
        B: Tensor,
        c: float | Tensor,
        blocks: Blocks,
        need_dS: bool,
        need_dB: bool,
    ) -> tuple[Tensor | None, Tensor | None]: ...

    def grad_shrink(self, dS: Tensor, X: Tensor, mask: Tensor | None, A: Tensor) -> Tensor: ...

    def grad_input(
        self, dY: Tensor, W: Tensor, dS: Tensor | None, A: Tensor, mask: Tensor | None
    ) -> Tensor: ...

    def delta(self, A: Tensor, B: Tensor, scaling: float | Tensor, blocks: Blocks) -> Tensor: ...


class _Requested(threading.local):
    """Each thread has its own."""

    def __init__(self) -> None:
        # torch.compile can read an attribute of an instance: neither a ContextVar nor, in torch
        # 2.11, what hides one of the class
        self.name = "auto"


_requested = _Requested()


def available(device: str | None = None) -> dict[str, str | None]:
    """Each backend's name with None where it is usable here, else the reason why it is not.

    Args:
        device: Type of the device that the tensors are on; None: that of the backend's choice.
    """
    return {name: _obstacle(name, device) for name in _BACKENDS}


def select(
    name: str = "auto",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    case: dispatch.Case | None = None,
) -> Backend:
    """The backend called ``name``; "auto": that of :func:`use_backend`, or the best usable one.

    The best one is that of the nearest row of the device's tables (:mod:`fastlora.dispatch`); where
    nothing near was measured, native on a CPU, and on a GPU Triton where its tiles were measured.

    Args:
        name: "auto" or a backend's name.
        device: Type of the device that the tensors are on.
        dtype: That of x.
        case: What is to be run; None: it has no place in the tables.

    Raises:
        ValueError: unknown name, or a backend that is not usable here or has no kernels for the
            device or the dtype.
    """
    if name == "auto":
        name = _requested.name
    if name == "auto":
        name = _choice(device, dtype, None if case is None else case[:])
    backend = _named(name)
    if reason := _no_kernels(backend, device):
        raise ValueError(f"backend: {name!r} {reason}")
    # what is traced may run on any device
    expected = (backend.dtypes or {}).get(device)
    if expected is not None and dtype not in expected:
        raise ValueError(
            f"backend: {name!r} has no kernels for {dtype}, expected "
            f"{' or '.join(map(str, expected))}"
        )
    return backend


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, layers and functions with ``backend="auto"`` run on backend ``name``.

    Raises:
        ValueError: unknown name, or a backend that is not usable here.
    """
    if name != "auto":
        _named(name)
    outer, _requested.name = _requested.name, name
    try:
        yield
    finally:
        _requested.name = outer


def passed_over(name: str, device: str) -> str | None:
    """Why "auto" does not take a backend that is usable for tensors on ``device``, or None."""
    if (name, device) == ("triton", "cuda"):
        return triton.why_not_alone()
    if device == "cuda" and name in ("native", "cutlass"):
        return "its CUDA kernels were not measured on any GPU yet"
    return None


def why(name: str, device: str, dtype: torch.dtype, case: dispatch.Case) -> str:
    """Why :func:`select` takes what it takes, in words."""
    if name != "auto" or _requested.name != "auto":
        return "by name"
    if (row := dispatch.nearest(device, case)) is None:
        return f"not measured: no row of this device is near {case}; `fastlora tune` adds rows"
    reason = f"measured: {row} at {row.case.sizes}"
    chosen, fastest = _choice(device, dtype, case), next(iter(row.ranking()), None)
    if fastest in (None, chosen):
        return reason
    if chosen not in (*row.ms, *row.failed):
        return f"{reason}; {chosen}, the usual choice, was not"
    if not _usable(fastest, device, dtype):
        return f"{reason}; {fastest} is not usable now"
    return f"{reason}; {fastest} is not faster than {chosen} by {dispatch.MARGIN:.0%}"


def _choice(device: str, dtype: torch.dtype, case: tuple[Any, ...] | None) -> str:
    safe = _best(device, dtype)
    better = () if case is None else dispatch.better(safe, device, case)
    name = next((name for name in better if _usable(name, device, dtype)), safe)
    if (name, device) == ("reference", "cuda") and not dispatch.rows(device):
        _warn_of_the_plain_path(*(other for other in NAMES[1:] if _usable(other, device, dtype)))
    return name


# to torch.compile a constant, like the backends' own answers; a named tuple gets to such a function
# as another than it was (torch 2.13), a plain one as it is
_choice._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache
def _warn_of_the_plain_path(*others: str) -> None:
    if others:
        warnings.warn(
            f"fastlora runs in plain PyTorch on this device, as its kernels ({', '.join(others)}) "
            "were not measured here yet. `fastlora tune` checks and measures them, whereupon the "
            "fastest are taken; backend= or fastlora.use_backend() takes them now.",
            stacklevel=2,
        )


def _usable(name: str, device: str, dtype: torch.dtype) -> bool:
    if name not in NAMES or _obstacle(name, device):
        return False
    return dtype in (_BACKENDS[name].dtypes or {}).get(device, (dtype,))


def _best(device: str, dtype: torch.dtype) -> str:
    """The safe choice: what is never slower than plain PyTorch, for all that is known."""
    if device == "cpu" and native.why_not() is None:
        return "native"
    usable = device == "cuda" and _usable("triton", device, dtype)
    return "triton" if usable and passed_over("triton", device) is None else "reference"


def _obstacle(name: str, device: str | None) -> str | None:
    backend = _BACKENDS[name]
    reason = backend.why_not()
    if device is not None:
        reason = reason or _no_kernels(backend, device)
    if (name, device) == ("native", "cuda"):
        reason = reason or native.cuda_obstacle()
    return reason


def _no_kernels(backend: Backend, device: str) -> str | None:
    # operators give shapes without data, whatever they have kernels for
    if backend.dtypes is None or device in (*backend.dtypes, "meta"):
        return None
    return f"has no kernels for tensors on {device}, expected {' or '.join(backend.dtypes)}"


def check_name(name: str) -> None:
    """Raises ValueError unless ``name`` is "auto" or that of a backend, usable here or not."""
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend: got {name!r}, expected 'auto' or one of {', '.join(NAMES)}")


def _named(name: str) -> Backend:
    check_name(name)
    backend = _BACKENDS[name]
    if (reason := backend.why_not()) is not None:
        raise ValueError(f"backend: {name!r} is not usable here: {reason}")
    return backend


_BACKENDS = {
    "reference": cast(Backend, reference),
    "native": cast(Backend, native),
    "triton": cast(Backend, triton),
    "cutlass": cast(Backend, cutlass),
}
