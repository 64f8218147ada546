"""Sums of parts, in their order: what atomics would add in any."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.launch import cdiv, launch

# vectors of 16 bytes, and enough of them under way for the latency of the L2 cache
BLOCK, UNROLLED = 512, tl.constexpr(4)


@triton.jit(do_not_specialize=["n", "count"])
def sum_parts_kernel(
    parts,
    out,
    c,
    scale,
    n,
    count,
    WIDTH: tl.constexpr,
    COUNTS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # a multiple of STEP, which the compiler sees without a kernel for each n
    n = n.to(tl.int64) * STEP
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.zeros((BLOCK,), tl.int32) + count
    if len(COUNTS) > 0:
        group = at % (WIDTH * len(COUNTS)) // WIDTH
        for g in tl.static_range(len(COUNTS)):
            mine = tl.where(group == g, COUNTS[g], mine)
        if WIDTH % 4 == 0:
            mine = tl.max_constancy(mine, 4)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, UNROLLED):
        for part in tl.static_range(UNROLLED):
            inside = (at < n) & (first + part < mine)
            total += tl.load(parts + part * n + at, inside, 0.0)
        parts += UNROLLED * n
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
    # how many parts there are depends on the tokens: a number, and no constant
    groups = counts if counts and len(set(counts)) > 1 else ()
    step = 16 if n % 16 == 0 else 1
    launch(
        sum_parts_kernel,
        (cdiv(n, BLOCK),),
        parts.device,
        parts,
        out,
        c,
        scale,
        n // step,
        len(parts),
        WIDTH=out.shape[1] // len(groups) if groups else 0,
        COUNTS=groups,
        STEP=step,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return out


def chunks(M: int, BLOCK_M: int, programs: int, others: int) -> tuple[int, int]:
    """Rows of a chunk and number of chunks, so that chunks times ``others`` fill the device."""
    wanted = max(1, programs // max(others, 1))
    chunk = BLOCK_M * max(1, cdiv(cdiv(M, BLOCK_M), wanted))
    return chunk, cdiv(M, chunk)
