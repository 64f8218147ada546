"""The stages of ``native`` on a Hopper GPU, with base products and low-rank terms in one kernel.

That kernel stands on CUTLASS's collectives for compute capability 9.0. It takes rows of bfloat16 or
float16, in whole vectors, and for the output a layer of one block; for all else a stage is that of
``native``. Its tiles are of one shape, so that some sizes leave much of a GPU idle, where those of
cuBLAS would not: the passes take it where nine tenths are at work (``fills`` in
``csrc/include/fastlora/fused.h``), the stages ``expand`` and ``grad_input`` wherever they can.
"""

import torch

from fastlora.backends import native
from fastlora.backends.operators import FLOATS, Operators, define

name = "cutlass"
dtypes = {"cuda": FLOATS}
CAPABILITY = (9, 0)
STAGES = (
    *("forward", "backward", "multi_forward", "multi_backward"),
    *("shrink", "expand", "grad_expand", "grad_shrink", "grad_input", "delta"),
)


def why_not() -> str | None:
    """None where its kernels are built and the current GPU runs them, else what is missing."""
    if reason := native.why_not():
        return reason
    if not native.build_info()["cutlass"]:
        return "the extension is built without CUTLASS (FASTLORA_CUTLASS=1 pip install .)"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if reason := native.cuda_obstacle():
        return reason
    capability = torch.cuda.get_device_capability()
    if capability != CAPABILITY:
        got, expected = (".".join(map(str, pair)) for pair in (capability, CAPABILITY))
        return f"the current GPU is of compute capability {got}, its kernels are for {expected}"
    return None


# to torch.compile a constant, as in backends/triton.py
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def description() -> str:
    """What is fused, and what is not."""
    return (
        "CUDA for 9.0a: base products fused for 16-bit rows of whole vectors, an output of one "
        "block, sizes that fill the GPU; else as native"
    )


_library = define("fastlora_cutlass", STAGES)
_operators = Operators("fastlora_cutlass")
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
