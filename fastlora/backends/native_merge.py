"""What merging does to each block of a weight, in C++, for CPU tensors.

The operators have the signatures of :mod:`fastlora.backends.reference_merge`, which documents them.
"""

import torch
from torch import Tensor


def add_low_rank(
    base: Tensor, left: Tensor, right: Tensor, row_scale: Tensor, column_scale: Tensor | None
) -> Tensor:
    """``base + (left @ right) * row_scale * column_scale`` in fp64, rounded once."""
    return torch.ops.fastlora.add_low_rank(base, left, right, row_scale, column_scale)


def encode_correction(predicted: Tensor, exact: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
    """Bits of a code, codes, and places and values of what no code holds."""
    return torch.ops.fastlora.encode_correction(predicted, exact)


def decode_correction(
    predicted: Tensor, bits: int, codes: Tensor, escaped: Tensor, values: Tensor
) -> Tensor:
    """The exact values."""
    return torch.ops.fastlora.decode_correction(predicted, bits, codes, escaped, values)


def checksum(block: Tensor) -> int:
    """The sum of the bits of all elements, each times its place."""
    return torch.ops.fastlora.checksum(block)
