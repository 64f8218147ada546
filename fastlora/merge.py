"""Merging that can be undone bit for bit.

``merge`` writes ``W' = round(W0 + scaling * L @ R)`` over the weight: computed in fp64, rounded
once to the weight's dtype, a block of rows at a time, with no temporary of the weight's size.
``unmerge`` gives back W0 exactly, whatever has happened to the factors since.

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
    """

    weight: Tensor
    left: Tensor
    right: Tensor
    divisible: bool = True

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


def merge(terms: Sequence[Term], scaling: float) -> "MergeRecord":
    """Adds each term's delta to its weight in place.

    Args:
        terms: Parts of the weight that do not overlap.
        scaling: Factor of every delta.

    Returns:
        What :meth:`MergeRecord.unmerge` needs to give the old weight back.

    Raises:
        MergeError: the factors hold NaN or Inf, or the sum overflows the weight's dtype.
    """
    return _rewrite(terms, scaling, None)


def switch(terms: Sequence[Term], scaling: float, old: "MergeRecord") -> "MergeRecord":
    """From ``W0 + old delta`` to ``W0 + scaling * left @ right`` in one pass over the weight.

    Raises:
        MergeError: as :func:`merge`; also if the weight was edited since it was merged.
    """
    old.check_untouched(terms)
    return _rewrite(terms, scaling, old)


@torch.no_grad()
def add_delta(terms: Sequence[Term], scaling: float) -> None:
    """Adds each term's delta to its weight, rounded once, and keeps nothing to undo it."""
    deltas = [_Delta.of(term, scaling) for term in terms]
    for _, (block, _), _, after in _merged_blocks(terms, deltas, None):
        block.copy_(after)


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
class MergeRecord:
    """What undoes a merge: of each part of the weight, the factors as integers and corrections."""

    predictors: tuple["_Predictor", ...]
    corrections: tuple[tuple["_Correction", ...], ...]
    checksum: int

    @property
    def nbytes(self) -> int:
        """Bytes this record holds."""
        return sum(p.nbytes for p in self.predictors) + sum(
            c.nbytes for part in self.corrections for c in part
        )

    def check_untouched(self, terms: Sequence[Term]) -> None:
        """Raises MergeError if the merged weight has been edited."""
        found = sum(_checksum(block) for term in terms for block, _ in term.blocks())
        if found != self.checksum:
            raise MergeError(
                "weight: was edited while merged, so what it held before cannot be restored; "
                "unmerge() before editing it (load_state_dict does so by itself)"
            )

    def unmerge(self, terms: Sequence[Term]) -> None:
        """Writes W0 over the merged weight, in place.

        Args:
            terms: The parts that were merged, in the same order; their factors are not used.

        Raises:
            MergeError: the weight was edited since it was merged.
        """
        with torch.no_grad():
            self.check_untouched(terms)
            for part, term in enumerate(terms):
                for block, _, before in self.unmerged_blocks(part, term):
                    block.copy_(before)

    def unmerged_blocks(self, part: int, term: Term) -> Iterator[tuple[Tensor, slice, Tensor]]:
        """Of each block of a part: the block, its rows of ``left``, and its values before."""
        delta = self.predictors[part].negative()
        for correction, (block, left_rows) in zip(
            self.corrections[part], term.blocks(), strict=True
        ):
            yield block, left_rows, correction.undo(block, delta, left_rows)


def _rewrite(terms: Sequence[Term], scaling: float, old: MergeRecord | None) -> MergeRecord:
    with torch.no_grad():
        if not math.isfinite(scaling):
            raise MergeError(f"scaling: got {scaling}, expected a finite number")
        for term in terms:
            if not (term.left.isfinite().all() and term.right.isfinite().all()):
                raise MergeError("lora factors: got NaN or Inf, expected finite values")
        deltas = [_Delta.of(term, scaling) for term in terms]
        if _may_overflow(terms, deltas, old):
            for _, _, before, after in _merged_blocks(terms, deltas, old):
                if not torch.equal(after.isfinite(), before.isfinite()):
                    raise MergeError(f"weight: the merged values overflow {after.dtype}")
        predictors = tuple(_Predictor.of(term, scaling) for term in terms)
        negatives = [predictor.negative() for predictor in predictors]
        corrections: list[list[_Correction]] = [[] for _ in terms]
        checksum = 0
        for part, (block, left_rows), before, after in _merged_blocks(terms, deltas, old):
            predicted = negatives[part].add_to(after, left_rows)
            corrections[part].append(_Correction.between(predicted, before))
            block.copy_(after)
            checksum += _checksum(after)
        return MergeRecord(predictors, tuple(tuple(c) for c in corrections), checksum)


def _merged_blocks(
    terms: Sequence[Term], deltas: Sequence["_Delta"], old: MergeRecord | None
) -> Iterator[tuple[int, tuple[Tensor, slice], Tensor, Tensor]]:
    """Of each block: its part, the block and its rows of ``left``, its values before and after."""
    for part, term in enumerate(terms):
        unmerged: Iterator[tuple[Tensor, slice, Tensor]]
        if old is None:
            unmerged = ((block, left_rows, block) for block, left_rows in term.blocks())
        else:
            unmerged = old.unmerged_blocks(part, term)
        for block, left_rows, before in unmerged:
            yield part, (block, left_rows), before, deltas[part].add_to(before, left_rows)


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


def _checksum(block: Tensor) -> int:
    return _kernels(block).sum_bits(block)


def fingerprint(factor: Tensor) -> int:
    """64 bits that change with any element of a (thin) tensor, and with its place."""
    bits = factor.detach().contiguous().view(reference_merge.BITS_OF[factor.dtype]).flatten().long()
    # an odd multiplier spreads the places over 64 bits; products and sum wrap
    places = torch.arange(1, len(bits) + 1, device=bits.device) * 0x1E3779B97F4A7C15
    return int((bits * places).sum())


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
