"""LoRAFusion's dataflow as a layer: measured, not offered.

LoRAFusion (Zhu et al., EuroSys 2026) itself is not run: it needs interfaces of Triton that are
gone since 3.4 and cannot be imported with a newer one. What is measured is its dataflow, step by
step, in kernels of our own; the GEMMs read through TMA where the chip has it, and take the tiles
of ``kernels/tables``. Two things are kinder than the original: any rank will do, and p = 0 runs.

forward
    1. dropout: x~ = m∘x / (1 - p) and the mask, a byte an element, are written;
    2. S = s x~ Aᵀ by cuBLAS;
    3. Y = X Wᵀ + bias + S Bᵀ in one accumulator.
backward
    4. dB = dYᵀ S and dS = s dY B from one read of dY, added up by float32 atomics, then rounded;
    5. dA = dSᵀ x~ by cuBLAS;
    6. dX = m∘(dS A) / (1 - p) + dY W in one accumulator.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.providers import Inputs, Layer
from benchmarks.shapes import Shape
from fastlora.blocks import Blocks
from fastlora.kernels import gemm, products
from fastlora.kernels.configs import config
from fastlora.kernels.expand import expand_fused
from fastlora.kernels.launch import cdiv, launch
from fastlora.kernels.layout import Layout

DROPOUT_BLOCK = 1024
# LoRAFusion's own tile of step 4
GRAD_BLOCK = 128


@triton.jit(do_not_specialize=["n", "seed"])
def dropout_kernel(X, dropped, mask, n, p, seed, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    lanes = program * BLOCK + tl.arange(0, BLOCK)
    r0, r1, r2, r3 = tl.rand4x(seed, lanes, n_rounds=7)
    at = program.to(tl.int64) * 4 * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(4):
        draw = r0 if i == 0 else r1 if i == 1 else r2 if i == 2 else r3
        keep = draw >= p
        inside = at < n
        x = tl.load(X + at, inside, 0.0).to(tl.float32)
        kept = tl.where(keep, x / (1 - p), 0.0)
        tl.store(dropped + at, kept.to(dropped.dtype.element_ty), inside)
        tl.store(mask + at, keep.to(tl.uint8), inside)
        at += BLOCK


def dropout_apart(X: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """x~ and the mask of bytes, both (M, K), for a contiguous X."""
    dropped, mask = torch.empty_like(X), torch.empty_like(X, dtype=torch.uint8)
    # a number drawn on the host, as the original's is; but from torch's generator
    seed = int(torch.randint(1 << 30, ()))
    n = X.numel()
    grid = (cdiv(n, 4 * DROPOUT_BLOCK),)
    launch(dropout_kernel, grid, X.device, X, dropped, mask, n, p, seed, BLOCK=DROPOUT_BLOCK)
    return dropped, mask


@triton.jit(do_not_specialize=["M"])
def grad_expand_atomic_kernel(
    dY,
    S,
    B,
    dS,
    dB,
    scaling,
    M,
    N,
    r,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    here, there, known = (rows < M)[:, None], (columns < N)[:, None], (ranks < r)[None, :]
    dy = tl.load(dY + rows[:, None] * N + columns[None, :], here & (columns < N)[None, :], 0.0)
    s = tl.load(S + rows[:, None] * r + ranks[None, :], here & known, 0.0)
    b = tl.load(B + columns[:, None] * r + ranks[None, :], there & known, 0.0)
    db = products.dot(tl.trans(dy), s, tl.zeros((BLOCK_N, BLOCK_R), tl.float32), PRECISION)
    ds = products.dot(dy, b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), PRECISION) * scaling
    tl.atomic_add(dB + columns[:, None] * r + ranks[None, :], db, there & known)
    tl.atomic_add(dS + rows[:, None] * r + ranks[None, :], ds, here & known)


def grad_expand_atomic(dY: Tensor, S: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """dS (M, r) and dB (N, r) in the dtype of B; the order of programs decides their last bits."""
    (M, N), r = dY.shape, B.shape[1]
    dS = torch.zeros(M, r, dtype=torch.float32, device=dY.device)
    dB = torch.zeros(N, r, dtype=torch.float32, device=dY.device)
    launch(
        grad_expand_atomic_kernel,
        (cdiv(M, GRAD_BLOCK), cdiv(N, GRAD_BLOCK)),
        dY.device,
        dY,
        S,
        B,
        dS,
        dB,
        scaling,
        M,
        N,
        r,
        PRECISION=products.precision(dY.dtype, B.dtype),
        BLOCK_M=GRAD_BLOCK,
        BLOCK_N=GRAD_BLOCK,
        BLOCK_R=max(16, triton.next_power_of_2(r)),
        num_warps=8,
    )
    return dS.to(B.dtype), dB.to(B.dtype)


@triton.jit(do_not_specialize=["M"])
def grad_input_kernel(
    dY,
    W,
    dS,
    A,
    mask,
    dX,
    inverse_keep,
    M,
    N,
    K,
    r,
    stride_ym,
    stride_yn,
    stride_wn,
    stride_wk,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BASE_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(K, BLOCK_K)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_m, tile_k = gemm.place(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K))
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
        at = rows.to(tl.int64)[:, None] * K + columns[None, :]
        inside = (rows < M)[:, None] & (columns < K)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for r0 in range(0, r, BLOCK_R):
            ranks = r0 + tl.arange(0, BLOCK_R)
            ds = tl.load(
                dS + rows.to(tl.int64)[:, None] * r + ranks[None, :],
                (rows < M)[:, None] & (ranks < r)[None, :],
                0.0,
            )
            a = tl.load(
                A + ranks.to(tl.int64)[:, None] * K + columns[None, :],
                (ranks < r)[:, None] & (columns < K)[None, :],
                0.0,
            )
            acc = products.dot(ds, a, acc, PRECISION)
        if mask is not None:
            keep = tl.load(mask + at, inside, 0)
            acc = tl.where(keep != 0, acc * inverse_keep, 0.0)
        acc = gemm.accumulate(
            acc,
            dY,
            W,
            tile_m * BLOCK_M,
            tile_k * BLOCK_K,
            M,
            K,
            N,
            stride_ym,
            stride_yn,
            stride_wk,
            stride_wn,
            False,
            TMA,
            BASE_PRECISION,
            BLOCK_M,
            BLOCK_K,
            BLOCK_N,
        )
        tl.store(dX + at, acc.to(dX.dtype.element_ty), inside)


def grad_input_bytes(
    dY: Tensor, W: Tensor, dS: Tensor, A: Tensor, mask: Tensor | None, p: float
) -> Tensor:
    """dX (M, K), as ``grad_input_fused`` computes it, from a mask of a byte an element."""
    (M, N), (r, K) = dY.shape, A.shape
    dX = dY.new_empty((M, K))
    best = config("grad_input_fused", dY, A)
    tma = gemm.descriptors(dY, W)
    launch(
        grad_input_kernel,
        gemm.grid(M, K, best.BLOCK_M, best.BLOCK_K, best),
        dY.device,
        gemm.operand(dY, best.BLOCK_M, best.BLOCK_N, tma),
        gemm.operand(W, best.BLOCK_N, best.BLOCK_K, tma),
        dS,
        A,
        mask,
        dX,
        1 / (1 - p),
        M,
        N,
        K,
        r,
        *dY.stride(),
        *W.stride(),
        TMA=tma,
        PRECISION=products.precision(dY.dtype, A.dtype, rounds=True),
        BASE_PRECISION=products.base_precision(),
        BLOCK_M=best.BLOCK_M,
        BLOCK_N=best.BLOCK_N,
        BLOCK_K=best.BLOCK_K,
        BLOCK_R=best.ranks(r),
        num_warps=best.num_warps,
        num_stages=best.num_stages,
    )
    return dX


class LoRAFusionFunction(torch.autograd.Function):
    """The six steps; x~, the mask and S are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any, X: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, *rest: Any
    ) -> Tensor:
        p, scaling, layout = rest
        dropped, mask = dropout_apart(X, p) if p else (X, None)
        S = X.new_empty(len(X), len(A))
        S.addmm_(dropped, A.t(), beta=0, alpha=scaling)
        ctx.p, ctx.scaling = p, scaling
        ctx.save_for_backward(dropped, mask, W, A, B, S)
        return expand_fused(X, W, bias, S, B, layout)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        dropped, mask, W, A, B, S = ctx.saved_tensors
        dS, dB = grad_expand_atomic(dY, S, B, ctx.scaling)
        dA = dS.t() @ dropped
        dX = grad_input_bytes(dY, W, dS, A, mask, ctx.p)
        return dX, None, None, dA, dB, None, None, None


class LoRAFusion(Layer):
    """A layer that runs :class:`LoRAFusionFunction`."""

    def __init__(self, shape: Shape, inputs: Inputs) -> None:
        super().__init__(shape, inputs)
        self.layout = Layout(*Blocks.single(shape.N).pattern)

    def forward(self, x: Tensor) -> Tensor:
        factors = (self.lora_A, self.lora_B)
        rest = (self.shape.p, self.scaling, self.layout)
        return LoRAFusionFunction.apply(x, self.weight, self.bias, *factors, *rest)
