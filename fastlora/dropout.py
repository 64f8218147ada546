"""The dropout mask of every backend: a pure function of (seed, shape, p).

One Philox4x32-7 call decides one byte of the packed mask, so any backend can draw any part of the
mask in any order and get the same bits. The generator is that of Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3" (SC'11); 7 rounds are the fewest that pass BigCrush.

For byte ``j`` of row ``i`` of a mask whose rows are ``4 * ceil(K / 32)`` bytes wide:

- key: low and high half of the 64-bit seed;
- counter: low and high half of the byte's flat index in the padded mask, then 0, 0;
- lane ``b`` (16 bits; lane ``2w`` is the low half of output word ``w``, lane ``2w + 1`` the high
  half) decides bit ``b``, that is element ``(i, 8j + b)``: kept iff ``lane >= round(p * 65536)``.
"""

import math

import torch
from torch import Tensor

LANE_RANGE = 1 << 16
ROUNDS = 7

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW32 = 0xFFFFFFFF
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def threshold(p: float) -> int:
    """The 16-bit threshold below which a lane drops its element; the exact p is this / 65536."""
    return round(p * LANE_RANGE)


def inverse_keep(t: int) -> float:
    """``1 / (1 - p)`` for the exact p of threshold ``t``; 0 where everything is dropped."""
    return 0.0 if t >= LANE_RANGE else LANE_RANGE / (LANE_RANGE - t)


def draw_seed(device: torch.device) -> Tensor:
    """A new mask seed, int64 of shape (1,), from torch's default generator of ``device``.

    The seed stays on the device: no synchronisation, and whatever restores that generator
    (``torch.manual_seed``, activation checkpointing, CUDA graphs) restores the mask with it.
    """
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def mask_bytes(K: int) -> int:
    """Bytes in one row of the packed mask."""
    return 4 * math.ceil(K / 32)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32: four 32-bit words for each counter.

    Args:
        counter: Four int64 tensors that broadcast together, values in ``[0, 2**32)``.
        key: Two int64 tensors that broadcast with the counter, values in ``[0, 2**32)``.
        rounds: Number of rounds.

    Returns:
        Four int64 tensors of values in ``[0, 2**32)``.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # the 64-bit product wraps in int64; its bits are those of the unsigned product
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (p1 >> 32) & _LOW32 ^ c1 ^ k0
        c1 = p1 & _LOW32
        c2 = (p0 >> 32) & _LOW32 ^ c3 ^ k1
        c3 = p0 & _LOW32
        k0 = (k0 + _KEY_INCREMENTS[0]) & _LOW32
        k1 = (k1 + _KEY_INCREMENTS[1]) & _LOW32
    return c0, c1, c2, c3


def draw_mask(seed: Tensor, M: int, K: int, t: int, first_row: int = 0) -> Tensor:
    """Packed keep mask.

    Args:
        seed: int64 tensor of one element, on the device the mask is wanted on.
        M: Rows.
        K: Elements in a row.
        t: Threshold, see :func:`threshold`.
        first_row: Index of the first row drawn: ``draw_mask(seed, n, K, t, i)`` is
            ``draw_mask(seed, M, K, t)[i : i + n]``.

    Returns:
        uint8, shape ``(M, 4 * ceil(K / 32))``; bit ``b`` of byte ``j`` says whether element
        ``8j + b`` of the row is kept; bits past K are zero.
    """
    row = mask_bytes(K)
    index = torch.arange(
        first_row * row, (first_row + M) * row, dtype=torch.int64, device=seed.device
    )
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    words = philox4x32(
        (index & _LOW32, index >> 32, zero, zero), (seed & _LOW32, (seed >> 32) & _LOW32)
    )
    keep = torch.zeros_like(index, dtype=torch.uint8)
    for w, word in enumerate(words):
        keep |= ((word & 0xFFFF) >= t).view(torch.uint8) << 2 * w
        keep |= ((word >> 16) >= t).view(torch.uint8) << 2 * w + 1
    first_bit = torch.arange(0, 8 * row, 8, device=seed.device)
    inside = (1 << (K - first_bit).clamp(0, 8)) - 1
    return keep.view(M, row) & inside.to(torch.uint8)


def unpack_mask(mask: Tensor, K: int) -> Tensor:
    """The packed mask as bool, shape ``(M, K)``."""
    bit = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (mask.unsqueeze(-1) >> bit & 1).bool().flatten(1)[:, :K]


def keep(X: Tensor, mask: Tensor | None) -> Tensor:
    """``m∘X``: X with zero where the packed mask drops an element; X itself without a mask.

    Args:
        X: Floating-point, shape ``(M, K)``.
        mask: From :func:`draw_mask`, or None.
    """
    if mask is None:
        return X
    # a byte of the mask looks up eight words of ones or zeros, which are and-ed to the bits of X:
    # several times faster than unpacking to bool and torch.where
    words = _INTEGERS[X.element_size()]
    byte = torch.arange(256, device=X.device, dtype=words).unsqueeze(1)
    table = -(byte >> torch.arange(8, device=X.device, dtype=words) & 1)
    kept = table.index_select(0, mask.flatten().int()).view(X.shape[0], 8 * mask.shape[1])
    # the bits of a lazily negated tensor are not its own
    return (X.resolve_neg().view(words) & kept[:, : X.shape[1]]).view(X.dtype)
