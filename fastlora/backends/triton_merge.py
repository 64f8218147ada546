"""What merging does to each block of a weight, with Triton where that saves passes over it.

The signatures are those of :mod:`fastlora.backends.reference_merge`, which documents them.
"""

from torch import Tensor

from fastlora.backends.reference_merge import checksum, decode_correction, encode_correction

__all__ = ["add_low_rank", "checksum", "decode_correction", "encode_correction"]


def add_low_rank(
    base: Tensor, left: Tensor, right: Tensor, row_scale: Tensor, column_scale: Tensor | None
) -> Tensor:
    """``base + (left @ right) * row_scale * column_scale`` in fp64, rounded once."""
    from fastlora.kernels import merge

    return merge.add_low_rank(base, left, right, row_scale, column_scale)
