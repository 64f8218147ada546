"""What merging does to each block of a weight, in plain PyTorch.

A *correction* leads from predicted to exact values: their distances, counted in representable
numbers, packed into codes of 0, 2, 4 or 8 bits, and the rarer larger ones in a list. A prediction
of NaN or -0, whose bits arithmetic does not define, stands for 0.

``native_merge`` computes the same bits (but for the order in which a sum that is not exact is
rounded), so that either undoes what the other has merged.
"""

import torch
from torch import Tensor

CODE_BITS = (0, 2, 4, 8)
BITS_OF = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def add_low_rank(
    base: Tensor, left: Tensor, right: Tensor, row_scale: Tensor, column_scale: Tensor | None
) -> Tensor:
    """``base + (left @ right) * row_scale * column_scale`` in fp64, rounded once.

    Args:
        base: (n, k), any strides.
        left: (n, r), fp64.
        right: (r, k), fp64.
        row_scale: (n, 1), fp64.
        column_scale: (1, k), fp64, or None for 1.

    Returns:
        (n, k), contiguous, dtype of ``base``.
    """
    delta = (left @ right).mul_(row_scale)
    if column_scale is not None:
        delta.mul_(column_scale)
    return round_once(delta.add_(base), base.dtype)


def encode_correction(predicted: Tensor, exact: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
    """What leads from ``predicted`` to ``exact``, in the fewest bytes.

    Args:
        predicted: Any shape, of fewer than 2**31 elements.
        exact: Same shape and dtype.

    Returns:
        Bits of a code; the codes, packed from the low bits of a byte up (uint8); the places of the
        elements whose distance no code holds, in order (int32); and those distances (integers of
        the width of the dtype). Where that is no smaller than ``exact`` itself: -1, two empty
        tensors, and a copy of ``exact``.
    """
    distance = (_order(exact) - _predicted_order(predicted)).flatten()
    sizes = {b: _packed_size(distance, b) for b in CODE_BITS}
    bits = min(sizes, key=lambda b: sizes[b])
    if sizes[bits] >= exact.nbytes:
        nothing = distance.new_empty(0)
        return -1, nothing, nothing, exact.clone(memory_format=torch.contiguous_format)
    outside = ~_within(distance, bits)
    escaped = outside.nonzero().squeeze(1)
    codes = (distance + _limit(bits)).masked_fill(outside, 2 * _limit(bits) + 1)
    return bits, _pack(codes, bits), escaped.to(torch.int32), distance[escaped]


def decode_correction(
    predicted: Tensor, bits: int, codes: Tensor, escaped: Tensor, values: Tensor
) -> Tensor:
    """The exact values, contiguous, from what :func:`encode_correction` gave (``bits >= 0``)."""
    order = _predicted_order(predicted).flatten()
    distance = _unpack(codes, bits, len(order)).to(order.dtype) - _limit(bits)
    distance[escaped.long()] = values
    return flip_negative(order + distance).view(predicted.dtype).view(predicted.shape)


def checksum(block: Tensor) -> int:
    """The sum of the bits of all elements, as signed integers, each times 2i + 1, modulo 2**64."""
    bits = block.contiguous().view(BITS_OF[block.dtype]).flatten().long()
    places = torch.arange(1, 2 * len(bits), 2, device=bits.device)
    return int((bits * places).sum())


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
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


def flip_negative(bits: Tensor) -> Tensor:
    """An involution between a float's bits and an integer that grows with the float."""
    return bits ^ ((bits >> (8 * bits.element_size() - 1)) & torch.iinfo(bits.dtype).max)


def _order(values: Tensor) -> Tensor:
    return flip_negative(values.view(BITS_OF[values.dtype]))


def _predicted_order(values: Tensor) -> Tensor:
    return _order(values.where(values.abs() > 0, values.new_zeros(())))


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
