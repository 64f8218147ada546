"""The one place that launches kernels: on the device of its tensors, on that device's stream."""

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch

INTERPRETER = "interpreter"


def cdiv(n: int, step: int) -> int:
    """How many steps make n; Triton's own is ten times as slow on the host."""
    return -(-n // step)


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **meta: Any
) -> None:
    """Runs ``kernel`` on ``grid``; a grid without programs is no launch.

    Args:
        kernel: A ``triton.jit`` function.
        grid: Programs along each axis.
        device: That of all tensors.
        args: Its arguments, in order.
        meta: Its constants, and the compiler's options.
    """
    if 0 not in grid:
        _start(kernel, grid, device, args, meta)


@lru_cache
def architecture(device: torch.device) -> str:
    """What kernels are compiled for there: "sm_90", "gfx942", ..., or the interpreter."""
    return _architecture(device)


def _architecture(device: torch.device) -> str:
    if device.type == "cpu":
        return INTERPRETER
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _start(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    args: tuple[Any, ...],
    meta: dict[str, Any],
) -> None:
    # Triton takes the current device, whatever the tensors are on
    elsewhere = device.type != "cpu" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        # the compiler's default for contracting a product and a sum differs between versions
        kernel[grid](*args, **{"enable_fp_fusion": True, **meta})
