"""Merging that can be undone bit for bit.

``merge`` writes ``W' = round(W0 + scaling * L @ R)`` over the weight: computed in fp64, rounded
once to the weight's dtype, a block of rows at a time, with no temporary of the weight's size.
``unmerge`` gives back W0 exactly, whatever has happened to the factors since.

A merge that is interrupted, by Ctrl-C or for want of memory, is undone the same way: what undoes a
block is noted before the block is written, and checksums tell which blocks were.

No copy of W0 is kept. Most of W0 comes back as ``P = round(W' - D)``, where D is a prediction of
the delta that any machine recomputes to the same bits: the factors are kept as integers small
enough that their product is exact in fp64, in whatever order it is summed. What P misses is the
*correction*, the distance from P to W0 counted in representable numbers. It is mostly 0 or ±1, and
is packed into 0, 2, 4 or 8 bits a weight with the rare larger ones in a list (or a block is stored
whole, if that is smaller).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fastlora import backends
from fastlora.backends import native_merge, reference_merge, triton_merge

_BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Term:
    """A part of a weight and its low-rank delta: ``scaling * left @ right`` in the part's shape.

    Args:
        weight: View of the weight, any strides.
        left: (n, r), where n is a multiple of ``len(weight)`` if ``divisible``.
        right: (r, k).
        divisible: Whether rows of ``left`` are rows of ``weight``; if not, the part is one block.

    Raises:
        ValueError: the factors do not fit each other, or the weight.
    """

    weight: Tensor
    left: Tensor
    right: Tensor
    divisible: bool = True

    def __post_init__(self) -> None:
        (n, r), (rank, k) = self.left.shape, self.right.shape
        if r != rank or n * k != self.weight.numel():
            raise ValueError(
                f"lora factors: got a product of shapes {(n, r)} and {(rank, k)}, expected one of "
                f"{self.weight.numel()} elements, those of weight {tuple(self.weight.shape)}"
            )

    def blocks(self) -> Iterator[tuple[Tensor, slice]]:
        """Blocks of rows of the weight, and the rows of ``left`` that make their delta."""
        n = len(self.weight)
        if not self.divisible:
            yield self.weight, slice(0, len(self.left))
            return
        step = max(1, _BLOCK_ELEMENTS // max(1, self.weight[0].numel()))
        for first in range(0, n, step):
            rows = slice(first, min(first + step, n))
            yield self.weight[rows], rows


class MergeError(RuntimeError):
    """A merge or unmerge that was refused; the weight is as it was."""


@torch.no_grad()
def add_delta(terms: Sequence[Term], scaling: float) -> None:
    """Adds each term's delta to its weight, rounded once, and keeps nothing to undo it."""
    for term in terms:
        delta = _Delta.of(term, scaling)
        for block, rows in term.blocks():
            block.copy_(delta.add_to(block, rows))


@torch.no_grad()
def check(terms: Sequence[Term], scaling: float, old: "MergeRecord | None" = None) -> None:
    """Raises MergeError where the factors hold NaN or Inf, or the sum overflows.

    Args:
        terms: Parts of the weight that do not overlap.
        scaling: Factor of every delta.
        old: The record of what the weight holds now, if that is a merge.
    """
    if not math.isfinite(scaling):
        raise MergeError(f"scaling: got {scaling}, expected a finite number")
    for term in terms:
        if not (term.left.isfinite().all() and term.right.isfinite().all()):
            raise MergeError("lora factors: got NaN or Inf, expected finite values")
    deltas = [_Delta.of(term, scaling) for term in terms]
    if _may_overflow(terms, deltas, old):
        for _, before, after in _merged_blocks(terms, deltas, old):
            if not torch.equal(after.isfinite(), before.isfinite()):
                raise MergeError(f"weight: the merged values overflow {after.dtype}")


@torch.no_grad()
def is_merged(base: Sequence[Term], weight: Sequence[Term], scaling: float) -> bool:
    """Whether ``weight - base`` is the delta, judged by the first block of each term."""
    for old, new in zip(base, weight, strict=True):
        (block, left_rows), (merged, _) = next(old.blocks()), next(new.blocks())
        found = merged.double() - block.double()
        delta = old.left[left_rows].double() @ old.right.double() * scaling
        size, miss = delta.norm(), (found - delta.view(found.shape)).norm()
        # written so that NaN, as in memory not yet initialised, means no
        if not (size > 0 and miss < 0.1 * size):
            return False
    return bool(base)


@dataclass(frozen=True)
class _Entry:
    """Of one block: what leads from its predicted to its true values, and its checksums."""

    correction: "_Correction"
    before: int
    after: int


class MergeRecord:
    """What undoes a merge: of each part of the weight, the factors as integers and corrections.

    Nothing is written yet when it is made: :meth:`merge` does.

    Args:
        terms: Parts of the weight that do not overlap.
        scaling: Factor of every delta.
        old: The record of what the weight holds now, if that is a merge: one pass then leads from
            ``W0 + old delta`` to ``W0 + scaling * left @ right``.

    Raises:
        MergeError: the factors hold NaN or Inf, the sum overflows the weight's dtype, or the weight
            was edited since the old merge.
    """

    @torch.no_grad()
    def __init__(
        self, terms: Sequence[Term], scaling: float, old: "MergeRecord | None" = None
    ) -> None:
        if old is not None:
            old._holders(terms)
        check(terms, scaling, old)
        self._old = old
        self._entries: list[_Entry] = []
        self.predictors = tuple(_Predictor.of(term, scaling) for term in terms)

    @property
    def nbytes(self) -> int:
        """Bytes this record holds."""
        corrections = (entry.correction for entry in self._entries)
        return sum(p.nbytes for p in self.predictors) + sum(c.nbytes for c in corrections)

    @torch.no_grad()
    def merge(self, terms: Sequence[Term], scaling: float) -> None:
        """Writes the merged values over the weight, with the terms that this was made for.

        Whatever it raises on the way, :meth:`unmerge` gives W0 back.
        """
        deltas = [_Delta.of(term, scaling) for term in terms]
        negatives = [predictor.negative() for predictor in self.predictors]
        for (part, block, rows), before, after in _merged_blocks(terms, deltas, self._old):
            correction = _Correction.between(negatives[part].add_to(after, rows), before)
            self._entries.append(_Entry(correction, checksum(before), checksum(after)))
            block.copy_(after)
        self._old = None

    @torch.no_grad()
    def unmerge(self, terms: Sequence[Term]) -> None:
        """Writes W0 over what was merged, in place; called again, it goes on where it was stopped.

        Args:
            terms: The parts that were merged, in the same order; their factors are not used.

        Raises:
            MergeError: the weight was edited since it was merged; nothing was written.
        """
        for (_, block, _), before in self.unmerged_blocks(terms):
            if before is not block:
                block.copy_(before)

    @torch.no_grad()
    def is_held_by(self, terms: Sequence[Term]) -> bool:
        """Whether the weight of these terms is, as a whole, what was merged."""
        try:
            return all(self._holders(terms))
        except MergeError:
            return False

    def unmerged_blocks(self, terms: Sequence[Term]) -> Iterator[tuple["_Place", Tensor]]:
        """Each block, and its values before; raises as :meth:`unmerge`, before the first."""
        for i, (place, holder) in enumerate(zip(_blocks(terms), self._holders(terms), strict=True)):
            yield place, holder._before(i, *place) if holder else place[1]

    def _before(self, i: int, part: int, block: Tensor, rows: slice) -> Tensor:
        delta = self.predictors[part].negative()
        return self._entries[i].correction.undo(block, delta, rows)

    def _holders(self, terms: Sequence[Term]) -> list["MergeRecord | None"]:
        """The record that undoes each block; None where it is as it was before any merge."""
        return [self._holder(i, block) for i, (_, block, _) in enumerate(_blocks(terms))]

    def _holder(self, i: int, block: Tensor) -> "MergeRecord | None":
        found = checksum(block)
        # what was merged last first: of blocks that are the same before and after, both undo it
        for record in (self, self._old):
            if record is None or i >= len(record._entries):
                continue
            entry = record._entries[i]
            if found == entry.after:
                return record
            if found == entry.before:
                return None
        if i >= len(self._entries) and self._old is None:
            return None
        raise MergeError(
            "weight: was edited while merged, or replaced, so what it held before cannot be "
            "restored; unmerge() before that, or load a state_dict with this weight"
        )


# the part a block is of, the block, and the rows of the part's ``left`` that make its delta
_Place = tuple[int, Tensor, slice]


def _blocks(terms: Sequence[Term]) -> Iterator[_Place]:
    for part, term in enumerate(terms):
        for block, rows in term.blocks():
            yield part, block, rows


def _merged_blocks(
    terms: Sequence[Term], deltas: Sequence["_Delta"], old: MergeRecord | None
) -> Iterator[tuple[_Place, Tensor, Tensor]]:
    """Each block, its values before any merge and after this one."""
    unmerged = ((p, p[1]) for p in _blocks(terms)) if old is None else old.unmerged_blocks(terms)
    for place, before in unmerged:
        part, _, rows = place
        yield place, before, deltas[part].add_to(before, rows)


def _may_overflow(
    terms: Sequence[Term], deltas: Sequence["_Delta"], old: MergeRecord | None
) -> bool:
    """Whether a bound on the merged values comes near the largest of the weight's dtype."""
    for part, term in enumerate(terms):
        lowest, highest = (t.double() for t in torch.aminmax(term.weight))
        bound = torch.maximum(-lowest, highest) + deltas[part].bound()
        if old is not None:
            bound += old.predictors[part].negative().bound()
        # half, as the old delta is known only nearly; a weight with NaN in it has no bound
        if not bound < torch.finfo(term.weight.dtype).max / 2:
            return True
    return False


_MODULES = {
    "reference": reference_merge,
    "native": native_merge,
    "triton": triton_merge,
    "cutlass": native_merge,
}


def _kernels(weight: Tensor) -> ModuleType:
    """The module of what is done to a block of ``weight``."""
    return _MODULES[backends.select("auto", weight.device.type, weight.dtype).name]


@torch.no_grad()
def checksum(values: Tensor) -> int:
    """64 bits that change with any element, and with its place."""
    return _kernels(values).checksum(values.detach())


@dataclass(frozen=True)
class _Delta:
    """``(left @ right) * row_scale * column_scale``, all in fp64."""

    left: Tensor
    right: Tensor
    row_scale: Tensor
    column_scale: Tensor | None = None

    @classmethod
    def of(cls, term: Term, scaling: float) -> "_Delta":
        left, right = term.left.double().contiguous(), term.right.double().contiguous()
        return cls(left, right, left.new_full((len(left), 1), scaling))

    def add_to(self, base: Tensor, rows: slice) -> Tensor:
        """``base`` plus these rows of the delta, in its shape, rounded once to its dtype."""
        left = self.left[rows]
        matrix = base.reshape(len(left), self.right.shape[1])
        return (
            _kernels(base)
            .add_low_rank(matrix, left, self.right, self.row_scale[rows], self.column_scale)
            .view(base.shape)
        )

    def bound(self) -> Tensor:
        """No element is larger, by Cauchy and Schwarz."""
        right = self.right if self.column_scale is None else self.right * self.column_scale
        return (self.left * self.row_scale).norm(dim=1).max() * right.norm(dim=0).max()


@dataclass(frozen=True)
class _Predictor:
    """The delta of one term from integer factors: the same bits in any order of summation."""

    left: Tensor
    right: Tensor
    left_scale: Tensor
    right_scale: Tensor

    @classmethod
    def of(cls, term: Term, scaling: float) -> "_Predictor":
        # r products of two such integers add up to at most 2**53: exact in fp64
        bits = (53 - math.ceil(math.log2(term.left.shape[1]))) // 2
        left, left_scale = _to_integers(term.left, 1, bits)
        right, right_scale = _to_integers(term.right, 0, bits)
        return cls(left, right, left_scale * scaling, right_scale)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.left, self.right, self.left_scale, self.right_scale))

    def negative(self) -> _Delta:
        """What takes the predicted delta off again."""
        left, right = self.left.double(), self.right.double()
        return _Delta(left, right, -self.left_scale, self.right_scale)


def _to_integers(factor: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """``(q, scale)`` with ``factor ≈ q * scale``, ``|q| <= 2**bits``, a scale a row or column."""
    factor = factor.double()
    _, exponent = torch.frexp(factor.abs().amax(dim, keepdim=True))
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent.clamp(-900) - bits)
    return (factor / scale).round().to(torch.int32), scale


@dataclass(frozen=True)
class _Correction:
    """What leads from the predicted to the true values of one block, or these (``bits < 0``)."""

    bits: int
    codes: Tensor
    escaped: Tensor
    values: Tensor

    @classmethod
    def between(cls, predicted: Tensor, true: Tensor) -> "_Correction":
        return cls(*_kernels(true).encode_correction(predicted, true))

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.escaped.nbytes + self.values.nbytes

    def undo(self, merged: Tensor, delta: _Delta, rows: slice) -> Tensor:
        """The true values, from the merged ones and the predicted delta's opposite."""
        if self.bits < 0:
            return self.values
        predicted = delta.add_to(merged, rows)
        return _kernels(merged).decode_correction(
            predicted, self.bits, self.codes, self.escaped, self.values
        )
