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

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 18
_CODE_BITS = (0, 2, 4, 8)
_BITS_OF = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


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

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Rows of the weight, and the rows of ``left`` that make their delta."""
        n = len(self.weight)
        if not self.divisible:
            yield slice(0, n), slice(0, len(self.left))
            return
        step = max(1, _BLOCK_ELEMENTS // max(1, self.weight[0].numel()))
        for first in range(0, n, step):
            rows = slice(first, min(first + step, n))
            yield rows, rows


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
    old.check_untouched([term.weight for term in terms])
    return _rewrite(terms, scaling, old)


@torch.no_grad()
def add_delta(terms: Sequence[Term], scaling: float) -> None:
    """Adds each term's delta to its weight, rounded once, and keeps nothing to undo it."""
    for _, (block, _), _, after in _merged_blocks(terms, scaling, None):
        block.copy_(after)


@torch.no_grad()
def is_merged(base: Sequence[Term], weight: Sequence[Term], scaling: float) -> bool:
    """Whether ``weight - base`` is the delta, judged by the first block of each term."""
    for old, new in zip(base, weight, strict=True):
        rows, left_rows = next(old.blocks())
        found = new.weight[rows].double() - old.weight[rows].double()
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

    def check_untouched(self, weights: Sequence[Tensor]) -> None:
        """Raises MergeError if the merged weight has been edited."""
        if _checksum(weights) != self.checksum:
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
            self.check_untouched([term.weight for term in terms])
            for part, term in enumerate(terms):
                for i, (rows, left_rows) in enumerate(term.blocks()):
                    block = term.weight[rows]
                    block.copy_(self.before(part, i, block, left_rows))

    def before(self, part: int, i: int, merged: Tensor, left_rows: slice) -> Tensor:
        """The values before the merge of block ``i`` of a part, from its merged values."""
        predicted = self.predictors[part].before(merged, left_rows)
        return self.corrections[part][i].apply(predicted)


def _rewrite(terms: Sequence[Term], scaling: float, old: MergeRecord | None) -> MergeRecord:
    with torch.no_grad():
        if not math.isfinite(scaling):
            raise MergeError(f"scaling: got {scaling}, expected a finite number")
        for term in terms:
            if not (term.left.isfinite().all() and term.right.isfinite().all()):
                raise MergeError("lora factors: got NaN or Inf, expected finite values")
        if any(_may_overflow(term, scaling) for term in terms):
            for _, _, before, after in _merged_blocks(terms, scaling, old):
                if not torch.equal(after.isfinite(), before.isfinite()):
                    raise MergeError(f"weight: the merged values overflow {after.dtype}")
        predictors = tuple(_Predictor.of(term, scaling) for term in terms)
        corrections: list[list[_Correction]] = [[] for _ in terms]
        for part, (block, left_rows), before, after in _merged_blocks(terms, scaling, old):
            predicted = predictors[part].before(after, left_rows)
            corrections[part].append(_Correction.between(predicted, before))
            block.copy_(after)
        return MergeRecord(
            predictors,
            tuple(tuple(c) for c in corrections),
            _checksum([term.weight for term in terms]),
        )


def _merged_blocks(
    terms: Sequence[Term], scaling: float, old: MergeRecord | None
) -> Iterator[tuple[int, tuple[Tensor, slice], Tensor, Tensor]]:
    """Of each block: its part, the block and its rows of ``left``, its values before and after."""
    for part, term in enumerate(terms):
        left, right = term.left.double(), term.right.double()
        for i, (rows, left_rows) in enumerate(term.blocks()):
            block = term.weight[rows]
            before = block.clone() if old is None else old.before(part, i, block, left_rows)
            delta = (left[left_rows] @ right).mul_(scaling).view(block.shape)
            yield part, (block, left_rows), before, _round(delta.add_(before), block.dtype)


def _may_overflow(term: Term, scaling: float) -> bool:
    """Whether a bound on the merged values (Cauchy-Schwarz) exceeds the weight's dtype."""
    lowest, highest = (t.double() for t in torch.aminmax(term.weight))
    left = term.left.double().norm(dim=1).max()
    right = term.right.double().norm(dim=0).max()
    bound = torch.maximum(-lowest, highest) + abs(scaling) * left * right
    # the bound is NaN or Inf where the weight holds one, and then says nothing
    return not bool(bound < torch.finfo(term.weight.dtype).max)


def _round(values: Tensor, dtype: torch.dtype) -> Tensor:
    """fp64 to ``dtype``, to nearest even, rounded once."""
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    # a 16-bit dtype is reached through fp32: round to odd there, or ties would be rounded twice
    single = values.float()
    error = values - single
    bits = single.view(torch.int32)
    toward = torch.where((error > 0) == (single > 0), 1, -1).to(torch.int32)
    inexact = (error != 0) & (bits & 1 == 0) & (single != 0) & single.isfinite()
    return (bits + toward * inexact).view(torch.float32).to(dtype)


def fingerprint(factor: Tensor) -> int:
    """64 bits that change with any element of a (thin) tensor, and with its place."""
    bits = factor.detach().contiguous().view(_BITS_OF[factor.dtype]).flatten().long()
    # an odd multiplier spreads the places over 64 bits; products and sum wrap
    places = torch.arange(1, len(bits) + 1, device=bits.device) * 0x1E3779B97F4A7C15
    return int((bits * places).sum())


def _checksum(weights: Sequence[Tensor]) -> int:
    return sum(int(w.view(_BITS_OF[w.dtype]).sum(dtype=torch.int64)) for w in weights)


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

    def before(self, merged: Tensor, rows: slice) -> Tensor:
        """``round(merged - delta)``, with 0 for NaN, whose bits arithmetic does not define."""
        delta = self.left[rows].double() @ self.right.double()
        delta = delta.mul_(self.left_scale[rows]).mul_(self.right_scale).view(merged.shape)
        before = _round(merged - delta, merged.dtype)
        return before.where(before == before, before.new_zeros(()))


def _to_integers(factor: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """``(q, scale)`` with ``factor ≈ q * scale``, ``|q| <= 2**bits``, a scale a row or column."""
    factor = factor.double()
    _, exponent = torch.frexp(factor.abs().amax(dim, keepdim=True))
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent.clamp(-900) - bits)
    return (factor / scale).round().to(torch.int32), scale


@dataclass(frozen=True)
class _Correction:
    """The distance, in representable numbers, from predicted to true values of one block."""

    bits: int
    codes: Tensor
    escaped: Tensor
    values: Tensor

    @classmethod
    def between(cls, predicted: Tensor, true: Tensor) -> "_Correction":
        distance = (_order(true) - _order(predicted)).flatten()
        sizes = {b: _packed_size(distance, b) for b in _CODE_BITS}
        bits = min(sizes, key=lambda b: sizes[b])
        if sizes[bits] >= true.nbytes:
            nothing = distance.new_empty(0)
            return cls(-1, nothing, nothing, true.clone())
        outside = ~_within(distance, bits)
        escaped = outside.nonzero().squeeze(1)
        codes = (distance + _limit(bits)).masked_fill(outside, 2 * _limit(bits) + 1)
        return cls(bits, _pack(codes, bits), escaped.to(torch.int32), distance[escaped])

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.escaped.nbytes + self.values.nbytes

    def apply(self, predicted: Tensor) -> Tensor:
        """The true values."""
        if self.bits < 0:
            return self.values
        order = _order(predicted).flatten()
        distance = _unpack(self.codes, self.bits, len(order)).to(order.dtype) - _limit(self.bits)
        distance[self.escaped.long()] = self.values
        true = _flip_negative(order + distance).view(predicted.dtype)
        return true.view(predicted.shape)


def _flip_negative(bits: Tensor) -> Tensor:
    """An involution between a float's bits and an integer that grows with the float."""
    return bits ^ ((bits >> (8 * bits.element_size() - 1)) & torch.iinfo(bits.dtype).max)


def _order(values: Tensor) -> Tensor:
    return _flip_negative(values.view(_BITS_OF[values.dtype]))


def _limit(bits: int) -> int:
    """The largest distance that a code of so many bits holds; the top code marks a larger one."""
    return (1 << (bits - 1)) - 1 if bits else 0


def _within(distance: Tensor, bits: int) -> Tensor:
    return (distance >= -_limit(bits)) & (distance <= _limit(bits))


def _packed_size(distance: Tensor, bits: int) -> int:
    n = distance.numel()
    outside = n - int(_within(distance, bits).sum())
    return n * bits // 8 + outside * (4 + distance.element_size())


def _pack(codes: Tensor, bits: int) -> Tensor:
    if not bits:
        return codes.new_empty(0, dtype=torch.uint8)
    per_byte = 8 // bits
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, -len(codes) % per_byte))
    shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes.view(-1, per_byte) << shift).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    if not bits:
        return packed.new_zeros(n)
    shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1) >> shift & ((1 << bits) - 1)).flatten()[:n]
