"""Products of tiles, and which arithmetic they are done in.

An operand that is wide (float32: S, dS, or factors kept so) meets one of 16 bits (X, dY) often.
How, is the ``PRECISION`` of a kernel:

- ``"split"``, 16-bit operands and factors: S and dS are split into a 16-bit value and a 16-bit
  remainder, and both are multiplied: twice the bits of mantissa, at the speed of 16 bits. Where
  the other operand is infinite, the two may cancel: NaN, where one product would be infinite.
- ``"tf32x3"``, float32 factors over 16 bits: all is widened, and the product is as exact as in
  float32, which is what the gradients of such factors are delivered in.
- ``"tf32"`` for the same where the result is rounded to 16 bits in the end.
- ``"ieee"`` or ``"tf32"``, float32 throughout: as PyTorch is set for its own products. Triton 3.6
  does not heed it on sm_100 where 64 features of X are a tile of :mod:`grad_shrink
  <fastlora.kernels.grad_shrink>`: the table has smaller ones.
"""

import torch
import triton
import triton.language as tl


def precision(dtype: torch.dtype, factor_dtype: torch.dtype, rounds: bool = False) -> str:
    """The ``PRECISION`` for operands and factors of these dtypes.

    Args:
        dtype: That of X.
        factor_dtype: That of A and B.
        rounds: The result is rounded to ``dtype``.
    """
    if factor_dtype != torch.float32:
        return "split"
    if dtype == torch.float32:
        return base_precision()
    if torch.version.hip:
        return "ieee"
    return "tf32" if rounds else "tf32x3"


def base_precision() -> str:
    """That of products of float32 operands, as PyTorch is set for its own."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32; each operand is float32 or of 16 bits."""
    if PRECISION != "split":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    if a.dtype == b.dtype:
        return tl.dot(a, b, acc)
    if a.dtype == tl.float32:
        high, low = split(a, b.dtype)
        return tl.dot(high, b, tl.dot(low, b, acc))
    high, low = split(b, a.dtype)
    return tl.dot(a, high, tl.dot(a, low, acc))


@triton.jit
def split(wide, dtype: tl.constexpr):
    """``wide`` as the sum of two tiles of ``dtype``."""
    high = wide.to(dtype)
    rest = wide - high.to(tl.float32)
    # Inf - Inf: what is not finite is all in the first
    return high, tl.where(rest == rest, rest, 0.0).to(dtype)
