"""The stages in C++, for CPU tensors: each operand is read once, the mask drawn as X is.

The operators are those of ``torch.ops.fastlora``, with kernels from ``csrc/bindings.cpp``.
"""

import warnings

from fastlora.backends.operators import Operators, define

name = "native"
devices: tuple[str, ...] | None = ("cpu",)
dtypes = None

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


def why_not() -> str | None:
    """None where the extension is loaded, else why it is not."""
    return _obstacle


def description() -> str:
    """The build of the kernels that runs here: instruction set and vector width."""
    info = _C.build_info()
    return f"{info['instruction_set']}, {info['vector_bits']}-bit vectors"


_library = define("fastlora")
_operators = Operators("fastlora")
forward = _operators.forward
backward = _operators.backward
shrink = _operators.shrink
expand = _operators.expand
grad_expand = _operators.grad_expand
grad_shrink = _operators.grad_shrink
grad_input = _operators.grad_input
delta = _operators.delta
