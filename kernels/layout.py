"""Where the output features of each block of a layer lie."""

from dataclasses import dataclass
from math import gcd

import triton
import triton.language as tl


@dataclass(frozen=True)
class Layout:
    """Spans of a pattern that repeats along the output, and the rows of B that adapt them.

    Args:
        spans: Of each block: its offset and width in one repeat of the pattern, its first row of
            B, and which of the adapted blocks it is; -1 twice where it is not adapted.
        period: Columns in one repeat.
        repeats: How often the pattern repeats; N is ``period * repeats``.
    """

    spans: tuple[tuple[int, int, int, int], ...]
    period: int
    repeats: int = 1

    @property
    def adapted(self) -> "Layout":
        """The same without the blocks that are not adapted."""
        return Layout(tuple(s for s in self.spans if s[2] >= 0), self.period, self.repeats)

    @property
    def whole(self) -> bool:
        """Whether every output feature is adapted, by blocks in one piece."""
        return self.repeats == 1 and self.adapted == self

    def slabs(self, block: int) -> int:
        """Programs that cover every block, ``block`` features each, none on two blocks."""
        return sum(-(-width * self.repeats // block) for _, width, _, _ in self.spans)

    def slabs_of_each(self, block: int) -> tuple[int, ...]:
        """The same for each block."""
        return tuple(-(-width * self.repeats // block) for _, width, _, _ in self.spans)

    def constants(self) -> dict[str, object]:
        """What kernels take of it."""
        edges = (e for offset, width, row, _ in self.spans for e in (offset, width, max(row, 0)))
        return {
            "SPANS": self.spans,
            "PERIOD": self.period,
            "REPEATS": self.repeats,
            "ALIGNED": gcd(16, self.period, *edges),
        }


@triton.jit
def slab(
    pid,
    SPANS: tl.constexpr,
    PERIOD: tl.constexpr,
    REPEATS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The features of program ``pid``, all of one block.

    Returns:
        Their columns and rows of B (BLOCK,), whether each exists, the block's index among the
        adapted ones (-1: not adapted), and the index of the program among the block's own.
    """
    offset, width, row, group = SPANS[0][0], SPANS[0][1], SPANS[0][2], SPANS[0][3]
    mine = pid
    first = (SPANS[0][1] * REPEATS + BLOCK - 1) // BLOCK
    for i in tl.static_range(1, len(SPANS)):
        here = pid >= first
        offset = tl.where(here, SPANS[i][0], offset)
        width = tl.where(here, SPANS[i][1], width)
        row = tl.where(here, SPANS[i][2], row)
        group = tl.where(here, SPANS[i][3], group)
        mine = tl.where(here, pid - first, mine)
        first += (SPANS[i][1] * REPEATS + BLOCK - 1) // BLOCK
    local = mine * BLOCK + tl.arange(0, BLOCK)
    if REPEATS == 1:
        column = tl.multiple_of(offset + mine * BLOCK, ALIGNED) + tl.arange(0, BLOCK)
    else:
        column = local // width * PERIOD + offset + local % width
    return column, row + local, local < width * REPEATS, group, mine
