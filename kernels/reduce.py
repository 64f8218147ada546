"""Sums of parts, in their order: what atomics would add in any."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.launch import cdiv, launch

BLOCK = 1024


@triton.jit(do_not_specialize=["n"])
def sum_parts_kernel(parts, out, c, scale, n, columns, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if len(COUNTS) > 1:
        group = at % columns // (columns // len(COUNTS))
        count = tl.zeros((BLOCK,), tl.int32)
        for g in tl.static_range(len(COUNTS)):
            count = tl.where(group == g, COUNTS[g], count)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(tl.max(count, 0) if len(COUNTS) > 1 else COUNTS[0]):
        inside = at < n
        if len(COUNTS) > 1:
            inside &= part < count
        total += tl.load(parts + at, inside, 0.0)
        parts += n
    if scale is not None:
        c *= tl.load(scale)
    tl.store(out + at, (total * c).to(out.dtype.element_ty), at < n)


def sum_parts(
    parts: Tensor,
    dtype: torch.dtype,
    c: float = 1.0,
    scale: Tensor | None = None,
    counts: tuple[int, ...] | None = None,
) -> Tensor:
    """``c * parts.sum(0)`` in ``dtype``, for float32 ``parts`` (P, m, n), added in order.

    With ``counts``, the columns are as many equal groups, and of group g only the first
    ``counts[g]`` parts count.
    """
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    n = out.numel()
    if counts is None or len(set(counts)) == 1:
        counts = (len(parts),)
    launch(
        sum_parts_kernel,
        (cdiv(n, BLOCK),),
        parts.device,
        parts,
        out,
        c,
        scale,
        n,
        out.shape[1],
        COUNTS=counts,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return out


def chunks(M: int, BLOCK_M: int, programs: int, others: int) -> tuple[int, int]:
    """Rows of a chunk and number of chunks, so that chunks times ``others`` fill the device."""
    wanted = max(1, programs // max(others, 1))
    chunk = BLOCK_M * max(1, cdiv(cdiv(M, BLOCK_M), wanted))
    return chunk, cdiv(M, chunk)
