"""Which output features each adapted block of a linear layer covers."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Output blocks of a linear layer, each adapted by its own factors or left plain.

    Block ``g`` of the adapted ones has the rows ``g * r : (g + 1) * r`` of A and its own rows of B,
    stacked in block order. A plain LoRA layer is one adapted block.

    Args:
        splits: Size of each block; they add up to the layer's output features.
        enabled: Which blocks are adapted.
        interleave: How often the pattern of blocks repeats along the output. 1: each block is
            contiguous (``q | k | v``). H: each block is spread over H equal parts
            (``q0 k0 v0 | q1 k1 v1 | ...``, the per-head layout of GPT-NeoX, BLOOM and Falcon).

    Attributes:
        count: Number of adapted blocks, G.
        out_features: Size of the whole output, N.
        adapted_features: Rows of B: the sizes of the adapted blocks together.
    """

    splits: tuple[int, ...]
    enabled: tuple[bool, ...]
    interleave: int = 1
    count: int = field(init=False, repr=False, compare=False)
    out_features: int = field(init=False, repr=False, compare=False)
    adapted_features: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # once for all forwards of a layer
        adapted = (n for n, on in zip(self.splits, self.enabled, strict=True) if on)
        object.__setattr__(self, "count", sum(self.enabled))
        object.__setattr__(self, "out_features", sum(self.splits))
        object.__setattr__(self, "adapted_features", sum(adapted))

    @classmethod
    def single(cls, out_features: int) -> "Blocks":
        """One adapted block that covers the whole output."""
        return cls((out_features,), (True,))

    @property
    def pattern(self) -> tuple[tuple[tuple[int, int, int, int], ...], int, int]:
        """What repeats along the output: its blocks, its width, and how often it does.

        Of each block: offset and width in one repeat, first row of B, and which of the adapted
        blocks it is (the last two -1 for one that is not adapted).
        """
        spans, offset, adapted = [], 0, iter(range(self.count))
        rows = iter(row for _, _, row in self._spans)
        for size, on in zip(self.splits, self.enabled, strict=True):
            width = size // self.interleave
            spans.append((offset, width, next(rows) if on else -1, next(adapted) if on else -1))
            offset += width
        return tuple(spans), offset, self.interleave

    @property
    def _spans(self) -> tuple[tuple[int, int, int], ...]:
        """Of each adapted block: offset and width in one repeat of the pattern, first row of B."""
        spans, offset, row = [], 0, 0
        for size, on in zip(self.splits, self.enabled, strict=True):
            width = size // self.interleave
            if on:
                spans.append((offset, width, row))
                row += size
            offset += width
        return tuple(spans)

    def output(self, Y: Tensor, g: int) -> Tensor:
        """The features of adapted block ``g`` of Y (..., N): a view (..., interleave, width)."""
        offset, width, _ = self._spans[g]
        return Y.unflatten(-1, (self.interleave, -1))[..., offset : offset + width]

    def rows_of_B(self, g: int) -> slice:
        """The rows of B that adapt block ``g``."""
        _, width, row = self._spans[g]
        return slice(row, row + width * self.interleave)

    def factors(self, A: Tensor, B: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """``(A_g, B_g)`` of each adapted block: views (r, K) and (n_g, r)."""
        r = B.shape[1]
        for g in range(self.count):
            yield A[g * r : (g + 1) * r], B[self.rows_of_B(g)]
