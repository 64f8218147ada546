"""No number without a right result: the check that stands before each timing."""

import functools
from dataclasses import replace

import torch

from benchmarks.shapes import Shape

# the rule compares with float64, which a CPU is slow at; rows are alike, so a part of them will do
CPU_ROWS = 512


def check(shape: Shape, device: torch.device) -> None:
    """Check every usable backend of fastlora at this layer, by the rule of ``fastlora.testing``.

    Raises:
        AssertionError: An output or a gradient is worse than that of the plain composition.
    """
    try:
        from fastlora import backends
    except ImportError:
        return
    M = shape.M if device.type == "cuda" else min(shape.M, CPU_ROWS)
    for backend, reason in {"auto": None, **backends.available()}.items():
        if reason is None:
            _check(replace(shape, M=M), backend, device)


@functools.cache
def _check(shape: Shape, backend: str, device: torch.device) -> None:
    from fastlora import checks, testing

    testing.check_linear(
        shape.M,
        shape.K,
        shape.N,
        shape.r,
        backend=backend,
        p=shape.p,
        dtype=shape.dtype,
        device=device,
        blocks=checks.blocks(shape.N, shape.enable_lora, None, 1) if shape.enable_lora else None,
    )
