"""``ΔW = scaling * B_g A_g`` on the rows of adapted block g, zero on the others."""

import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels import products
from fastlora.kernels.configs import config
from fastlora.kernels.launch import cdiv, launch
from fastlora.kernels.layout import Layout, slab


@triton.jit
def delta_kernel(
    A,
    B,
    dW,
    c,
    scale,
    K,
    r,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    SPANS: tl.constexpr,
    PERIOD: tl.constexpr,
    REPEATS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows, features, inside, group, _ = slab(
        tl.program_id(0), SPANS, PERIOD, REPEATS, ALIGNED, BLOCK_N
    )
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if group >= 0:
        B_g = B + features.to(tl.int64)[:, None] * stride_bn
        A_g = A + columns.to(tl.int64)[None, :] * stride_ak
        for r0 in range(0, r, BLOCK_R):
            ranks = r0 + tl.arange(0, BLOCK_R)
            b = tl.load(
                B_g + ranks.to(tl.int64)[None, :] * stride_br,
                inside[:, None] & (ranks < r)[None, :],
                0.0,
            )
            a = tl.load(
                A_g + (group * r + ranks).to(tl.int64)[:, None] * stride_ar,
                (ranks < r)[:, None] & (columns < K)[None, :],
                0.0,
            )
            acc = products.dot(b, a, acc, PRECISION)
    if scale is not None:
        c *= tl.load(scale)
    at = dW + rows.to(tl.int64)[:, None] * K + columns[None, :]
    tl.store(at, (acc * c).to(dW.dtype.element_ty), inside[:, None] & (columns < K)[None, :])


def delta(A: Tensor, B: Tensor, scaling: float, scale: Tensor | None, layout: Layout) -> Tensor:
    """ΔW (N, K), dtype of B, from A (R, K) and B (adapted features, r)."""
    K, r = A.shape[1], B.shape[1]
    dW = B.new_empty((layout.period * layout.repeats, K))
    best = config("delta", B, B)
    launch(
        delta_kernel,
        (layout.slabs(best.BLOCK_N), cdiv(K, best.BLOCK_K)),
        A.device,
        A,
        B,
        dW,
        scaling,
        scale,
        K,
        r,
        *A.stride(),
        *B.stride(),
        **layout.constants(),
        PRECISION="ieee" if B.element_size() == 4 else "split",
        BLOCK_N=best.BLOCK_N,
        BLOCK_K=best.BLOCK_K,
        BLOCK_R=best.ranks(r),
        num_warps=best.num_warps,
        num_stages=best.num_stages,
    )
    return dW
