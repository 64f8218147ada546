"""Products of tiles, and which arithmetic they are done in.

An operand that is wide (float32: S, dS, or factors kept so) meets one of 16 bits (X, dY) often.
How, is the ``PRECISION`` of a kernel:

- ``"split"``, 16-bit operands and factors: S and dS are split into a 16-bit value and a 16-bit
  remainder, and both are multiplied: twice the bits of mantissa, at the speed of 16 bits.
- ``"split3"``, float32 factors over bfloat16: what is wide is split into three values of bfloat16,
  which have all its bits. The product is as exact as in float32, which is what the gradients of
  such factors are delivered in.
- ``"split tf32"``, float32 factors over float16, which has not the range of a remainder: two values
  of TF32, in which float16 is exact, too.
- ``"tf32"`` for float32 factors where the result is rounded to 16 bits in the end.
- ``"ieee"`` or ``"tf32"``, float32 throughout: as PyTorch is set for its own products. Triton 3.6
  does not heed it on sm_100 where 64 features of X are a tile of :mod:`grad_shrink
  <fastlora.kernels.grad_shrink>`: the table has smaller ones.

Where one operand of a split is infinite, its products may cancel: NaN, where one would be infinite.
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
        # to split takes twice the instructions there: nothing converts to bfloat16 in one
        return "ieee"
    if rounds:
        return "tf32"
    return "split3" if dtype == torch.bfloat16 else "split tf32"


def base_precision() -> str:
    """That of products of float32 operands, as PyTorch is set for its own."""
    # not get_float32_matmul_precision, which raises once this one was set
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32; each operand is float32 or of 16 bits."""
    if PRECISION == "ieee" or PRECISION == "tf32":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    elif a.dtype == b.dtype:
        acc = tl.dot(a, b, acc)
    elif a.dtype == tl.float32:
        high, rest = split(a, b.dtype)
        acc = tl.dot(high, b, tl.dot(rest.to(b.dtype), b, acc))
    else:
        if PRECISION == "split tf32":
            a = a.to(tl.float32)
        high, rest = split(b, a.dtype)
        if PRECISION == "split3":
            rest, last = split(rest, a.dtype)
            acc = tl.dot(a, last.to(a.dtype), acc)
        acc = tl.dot(a, rest.to(a.dtype), acc, input_precision="tf32")
        acc = tl.dot(a, high, acc, input_precision="tf32")
    return acc


@triton.jit
def split(wide, dtype: tl.constexpr):
    """``wide`` as the sum of a tile of ``dtype``, float32 for TF32, and a remainder in float32."""
    if dtype == tl.float32:
        # to nearest: what is cut off would leave a remainder of one bit more than TF32 has
        bits = (wide.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
        high = bits.to(tl.float32, bitcast=True)
    else:
        high = wide.to(dtype)
    whole = high.to(tl.float32)
    # of Inf, and of what is too large for dtype, nothing remains: it would make NaN of Inf
    return high, tl.where(tl.abs(whole) == float("inf"), 0.0, wide - whole)
