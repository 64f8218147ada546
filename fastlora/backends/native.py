"""The stages in C++ and CUDA C++: each operand is read once, the mask drawn as X is.

The operators are those of ``torch.ops.fastlora``, with kernels from ``csrc/bindings``: for CPU
tensors, and for CUDA tensors where the extension was built with them.
"""

import warnings
from typing import Any

import torch

from fastlora.backends.operators import FLOATS, Operators, define
from fastlora.environment import variable

name = "native"
dtypes: dict[str, tuple[torch.dtype, ...]] = {"cpu": (*FLOATS, torch.float64)}

_obstacle: str | None = None
try:
    import fastlora._C as _C
except ModuleNotFoundError as error:
    if error.name != "fastlora._C":
        raise
    _obstacle = "the C++ extension is not built (FASTLORA_BUILD=1 pip install . says why)"
except ImportError as error:
    # most often: it was built for another version of torch
    _obstacle = f"the C++ extension cannot be loaded: {error}"
    warnings.warn(f"fastlora runs without its C++ extension: {error}", stacklevel=2)
else:
    if _whose := variable("FASTLORA_BASE_PRODUCTS"):
        _C.set_base_products(_whose)
    if _C.build_info()["cuda"]:
        dtypes["cuda"] = FLOATS


def why_not() -> str | None:
    """None where the extension is loaded, else why it is not."""
    return _obstacle


def build_info() -> dict[str, Any]:
    """What the extension was built with."""
    found: dict[str, Any] = _C.build_info()
    return found


def description() -> str:
    """The builds of the kernels: instruction set, vector width, architectures of GPUs."""
    info = build_info()
    cpu = f"{info['instruction_set']}, {info['vector_bits']}-bit vectors"
    if info["base_products"] == "own":
        cpu += ", own base products in float32"
    return f"{cpu}; CUDA for {info['cuda']['architectures']}" if info["cuda"] else cpu


def cuda_obstacle() -> str | None:
    """Why the CUDA kernels do not run on the current device, in the runtime's words, or None."""
    found: str | None = _C.cuda_obstacle()
    return found


_library = define("fastlora")
_operators = Operators("fastlora")
forward = _operators.forward
backward = _operators.backward
multi_forward = _operators.multi_forward
multi_backward = _operators.multi_backward
shrink = _operators.shrink
expand = _operators.expand
grad_expand = _operators.grad_expand
grad_shrink = _operators.grad_shrink
grad_input = _operators.grad_input
delta = _operators.delta
