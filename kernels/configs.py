"""Tile sizes: data, in ``tables/<architecture>.json``, one row for each stage, width and rank.

Each table says where it came from. No tile is chosen at run time by timing: the same shape gives
the same bits on every device of an architecture.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from fastlora.kernels.launch import architecture

FOLDER = Path(__file__).parent / "tables"
# the smallest contraction of a tensor core
LEAST_RANKS = 16
# newer by number only: their tensor cores are those of Ampere
_ALIKE = {"sm_120": "sm_80", "sm_121": "sm_80"}


@dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    Args:
        BLOCK_M: Tokens of a tile.
        BLOCK_N: Output features of a tile, where the stage has them.
        BLOCK_K: Input features of a tile, where the stage has them; a multiple of 32.
        num_warps: Warps of a program.
        num_stages: Depth of the pipeline of loads.
        programs: About how many programs fill the device: rows are cut into so many chunks.
        persistent: A program goes on from tile to tile.
        most_ranks: The most ranks of a tile, a power of two.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    programs: int
    persistent: bool = False
    most_ranks: int = 64

    def ranks(self, r: int) -> int:
        """Ranks of a tile for rank ``r``: a power of two."""
        return min(max(1 << (r - 1).bit_length(), LEAST_RANKS), self.most_ranks)


@dataclass(frozen=True)
class Table:
    """The configs of one architecture.

    Args:
        origin: Where they came from: which device and when, or what reasoning.
        measured: Kernels were timed with them, and their results compared, on such a device.
        rows: By stage: kind of the operands, largest rank (None: any) and the config for these;
            smaller ranks first. Kinds are "16" and "32", for the bits of all, and "mixed", for
            float32 factors over 16 bits.
        fused: Stage, kind, M, N, K and r where one GEMM with the low-rank term in its accumulator
            was measured to be faster than the product added in place.
    """

    origin: str
    measured: bool
    rows: dict[str, tuple[tuple[str, int | None, Config], ...]]
    fused: frozenset[tuple[str, str, int, int, int, int]]

    @classmethod
    def parse(cls, text: str) -> "Table":
        """A table from its JSON text."""
        found = json.loads(text)
        rows: dict[str, tuple[tuple[str, int | None, Config], ...]] = {}
        for stage, kind, rank, sizes in found["rows"]:
            entry = (kind, rank, Config(**{"programs": found["programs"], **sizes}))
            rows[stage] = (*rows.get(stage, ()), entry)
        fused = frozenset(tuple(shape) for shape in found["fused"])
        return cls(found["origin"], found["measured"], rows, fused)


def config(stage: str, X: Tensor, factor: Tensor) -> Config:
    """The config of ``stage`` for operands like ``X`` and a factor A (R, K) or B (n, r)."""
    kind, r = _kind(X, factor), min(factor.shape)
    rows = table(architecture(X.device)).rows[stage]
    return next(c for of, most, c in rows if of == kind and (most is None or r <= most))


def fused(stage: str, X: Tensor, W: Tensor, factor: Tensor) -> bool:
    """Whether ``stage`` was measured to be faster at this shape than the product in place."""
    known = table(architecture(X.device)).fused
    # as when it was measured: without contiguous rows it is another kernel
    if not (known and X.is_contiguous() and W.is_contiguous()):
        return False
    return (stage, _kind(X, factor), X.shape[0], *W.shape, min(factor.shape)) in known


def _kind(X: Tensor, factor: Tensor) -> str:
    if X.element_size() == factor.element_size():
        return str(8 * X.element_size())
    return "mixed"


@lru_cache
def table(architecture: str) -> Table:
    """The table of an architecture, or of the nearest older one that has one."""
    return Table.parse((FOLDER / f"{_nearest(architecture)}.json").read_text())


def measured(architecture: str) -> bool:
    """Whether the kernels were measured on this architecture itself."""
    return architecture in architectures() and table(architecture).measured


@lru_cache
def architectures() -> list[str]:
    """Those that have a table."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def _nearest(architecture: str) -> str:
    known = architectures()
    architecture = _ALIKE.get(architecture, architecture)
    if architecture in known:
        return architecture
    family = "sm_" if architecture.startswith("sm_") else "gfx"
    order = {int(a.removeprefix(family), 16): a for a in known if a.startswith(family)}
    own = int(architecture.removeprefix(family), 16)
    return order[max((number for number in order if number <= own), default=min(order))]
