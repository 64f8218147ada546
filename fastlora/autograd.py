"""The autograd Functions: the one place that knows what is saved for backward.

Saved: X itself (an alias), S, the packed mask and the parameters. Nothing else, and nothing of the
weight's size but the weight.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fastlora import checks
from fastlora.backends import Backend, reference, reference_conv, reference_embedding
from fastlora.blocks import Blocks

Backward = Callable[..., tuple[Tensor | None, ...]]


def once_differentiable(backward: Backward) -> Backward:
    """Refuses ``create_graph=True``, and keeps autocast out.

    torch's own lets a gradient without a graph through where dY needs none (that of a sum, say),
    and a penalty on it would silently count as a constant. Forward has cast what autocast casts;
    in a backward that is called inside of its block it would cast sums in float32, too.
    """

    @wraps(backward)
    def checked(ctx: Any, *dY: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("create_graph=True: LoRA layers can be differentiated only once")
        device = next((t.device for t in dY if t is not None), torch.device("cpu"))
        with _without_autocast(device):
            return backward(ctx, *dY)

    return checked


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    if torch.compiler.is_compiling() and checks.knows_autocast(device.type):
        # Dynamo traces this where forward has put autocast out, but what it traces runs where
        # forward was called
        return torch.autocast(device.type, enabled=False)
    return checks.without_autocast(device)


def _returned(Y: Tensor) -> Tensor:
    """Itself, as what a forward returns.

    Torch 2.11 compiles a forward that returns what it has written in place to one without
    gradients (https://github.com/pytorch/pytorch/issues/180642), but for a view of it.
    """
    return Y.view_as(Y) if torch.compiler.is_compiling() else Y


@dataclass(frozen=True)
class LinearSpec:
    """What a call of :class:`LoRALinear` knows besides its tensors.

    Args:
        c: ``scaling / (1 - p)``, a number or a 0-d tensor.
        t: Dropout threshold, ``round(p * 65536)``.
        blocks: Layout of the output.
        backend: Whose stages to run.
    """

    c: float | Tensor
    t: int
    blocks: Blocks
    backend: Backend


class LoRALinear(torch.autograd.Function):
    """``Y = X Wᵀ + bias + S_g B_gᵀ`` with ``S = c * (m∘X) Aᵀ``; X is (M, K).

    W may be of another dtype than X (autocast): it is cast for the product, here and again in
    backward, so that no copy of it is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        X: Tensor,
        W: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        spec: LinearSpec,
    ) -> Tensor:
        need_X, need_W, need_A, need_B, *_ = ctx.needs_input_grad
        Y, S, mask = spec.backend.forward(
            X, W.to(X.dtype), bias, A, B, spec.c, spec.t, seed, spec.blocks
        )
        ctx.spec = spec
        ctx.save_for_backward(
            X if need_A or need_W else None,
            W if need_X else None,
            A if need_X or need_A else None,
            B,
            S if need_B else None,
            mask if need_X or need_A else None,
        )
        return _returned(Y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        X, W, A, B, S, mask = ctx.saved_tensors
        need_X, need_W, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
        spec, dY = ctx.spec, _dense(dY)
        W = W.to(dY.dtype) if need_X else None
        dX, dA, dB = spec.backend.backward(
            dY, X, W, A, B, S, mask, spec.c, spec.blocks, need_X, need_A, need_B
        )
        dW = dY.t() @ X if need_W else None
        dbias = dY.sum(0) if need_bias else None
        return dX, dW, dA, dB, dbias, None, None


@dataclass(frozen=True)
class MultiLinearSpec:
    """What a call of :class:`LoRAMultiLinear` knows besides its tensors; c and t of each layer."""

    c: tuple[float | Tensor, ...]
    t: tuple[int, ...]
    backend: Backend


class LoRAMultiLinear(torch.autograd.Function):
    """:class:`LoRALinear` for layers that share X, which is saved once; dX is one sum.

    ``operands`` are all W, then all A, B, biases and seeds.
    """

    @staticmethod
    def forward(
        ctx: Any, X: Tensor, spec: MultiLinearSpec, *operands: Tensor | None
    ) -> tuple[Tensor, ...]:
        W, A, B, bias, seed = _of_layers(operands, len(spec.t))
        need_X, _, *needs = ctx.needs_input_grad
        need_W, need_A, need_B, *_ = _of_layers(needs, len(spec.t))
        Y, S, mask = spec.backend.multi_forward(
            X, [W_i.to(X.dtype) for W_i in W], bias, A, B, spec.c, spec.t, seed
        )
        ctx.spec = spec
        # an output that nothing was made of costs nothing in backward
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            X if any((*need_A, *need_W)) else None,
            *(W_i if need_X else None for W_i in W),
            *_where(A, [need_X or need for need in need_A]),
            *B,
            *_where(S, need_B),
            *_where(mask, [need_X or need for need in need_A]),
        )
        return tuple(map(_returned, Y))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dYs: Tensor | None) -> tuple[Tensor | None, ...]:
        spec, count = ctx.spec, len(dYs)
        used = [i for i, dY in enumerate(dYs) if dY is not None]
        if not used:
            return (None,) * len(ctx.needs_input_grad)
        X, *saved = ctx.saved_tensors
        need_X, _, *needs = ctx.needs_input_grad
        W, A, B, S, mask = (_pick(of, used) for of in _of_layers(saved, count))
        need_W, need_A, need_B, need_bias, _ = (_pick(of, used) for of in _of_layers(needs, count))
        dY = [_dense(dY) for dY in dYs if dY is not None]
        dX, dA, dB = spec.backend.multi_backward(
            dY,
            X,
            [W_i.to(dY[0].dtype) if need_X else None for W_i in W],
            A,
            B,
            S,
            mask,
            _pick(spec.c, used),
            need_X,
            need_A,
            need_B,
        )
        dW = [dY_i.t() @ X if need else None for dY_i, need in zip(dY, need_W, strict=True)]
        dbias = [dY_i.sum(0) if need else None for dY_i, need in zip(dY, need_bias, strict=True)]
        gradients: list[Tensor | None] = []
        for of in (dW, dA, dB, dbias, [None] * len(used)):
            found = dict(zip(used, of, strict=True))
            gradients += [found.get(i) for i in range(count)]
        return dX, None, *gradients


def _of_layers(values: Sequence[Any], count: int) -> list[list[Any]]:
    """Lists of ``count``: those of the first kind of operand, of the second, and so on."""
    return [list(values[i : i + count]) for i in range(0, len(values), count)]


def _pick(values: Sequence[Any], indices: Sequence[int]) -> list[Any]:
    return [values[i] for i in indices]


def _where(tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> Iterator[Tensor | None]:
    return (t if need else None for t, need in zip(tensors, needed, strict=True))


def _dense(dY: Tensor) -> Tensor:
    """Itself, but for the gradient of a sum, of which each product would make its own copy."""
    if torch.compiler.is_compiling():
        # Dynamo, asked for strides it does not know yet, would make every dY contiguous
        return dY
    return dY.contiguous() if 0 in dY.stride() else dY


@dataclass(frozen=True)
class EmbeddingSpec:
    """What a call of :class:`LoRAEmbedding` knows besides its tensors; as in ``F.embedding``."""

    scaling: float | Tensor
    padding_idx: int
    scale_grad_by_freq: bool


class LoRAEmbedding(torch.autograd.Function):
    """``Y = W[index] + S Bᵀ`` with ``S = scaling * A[:, index]ᵀ``; index is (M,)."""

    @staticmethod
    def forward(
        ctx: Any, index: Tensor, W: Tensor, A: Tensor, B: Tensor, spec: EmbeddingSpec
    ) -> Tensor:
        S = reference_embedding.shrink(index, A, spec.scaling, W.dtype)
        ctx.spec, ctx.V, ctx.dtype_A = spec, W.shape[0], A.dtype
        ctx.save_for_backward(index, B, S if ctx.needs_input_grad[3] else None)
        return _returned(reference_embedding.expand(index, W, S, B))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        index, B, S = ctx.saved_tensors
        _, need_W, need_A, need_B, _ = ctx.needs_input_grad
        spec = ctx.spec
        dW = dA = None
        dS, dB = reference.grad_expand(
            dY, S, B, spec.scaling, Blocks.single(B.shape[0]), need_dS=need_A, need_dB=need_B
        )
        options = (ctx.V, spec.padding_idx, spec.scale_grad_by_freq)
        if dS is not None:
            dA = reference_embedding.scatter(index, dS, *options).t().to(ctx.dtype_A)
        if need_W:
            dW = reference_embedding.scatter(index, dY, *options)
        return None, dW, dA, dB, None


@dataclass(frozen=True)
class ConvSpec:
    """What a call of :class:`LoRAConv` or :class:`DenseLoRAConv` knows besides its tensors."""

    c: float | Tensor
    t: int
    at: reference_conv.Geometry


class LoRAConv(torch.autograd.Function):
    """``Y = conv(X, W) + bias + B S`` with ``S = c * conv(m∘X, A)``; B is (O, r)."""

    @staticmethod
    def forward(
        ctx: Any,
        X: Tensor,
        W: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        spec: ConvSpec,
    ) -> Tensor:
        need_X, need_W, need_A, need_B, *_ = ctx.needs_input_grad
        mask = reference_conv.draw_mask(X, spec.t, seed, spec.at)
        S = reference_conv.shrink(X, A, spec.c, mask, spec.at)
        ctx.spec, ctx.shape = spec, X.shape
        ctx.save_for_backward(
            X if need_A or need_W else None,
            W if need_X or need_W else None,
            A if need_X or need_A else None,
            B,
            S if need_B else None,
            mask if need_X or need_A else None,
        )
        return _returned(reference_conv.expand(X, W.to(X.dtype), bias, S, B, spec.at))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        X, W, A, B, S, mask = ctx.saved_tensors
        need_X, need_W, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
        spec, at = ctx.spec, ctx.spec.at
        dX = dW = dA = dS = dB = None
        if need_X or need_A or need_B:
            dS, dB = reference_conv.grad_expand(
                dY, S, B, spec.c, at, need_dS=need_X or need_A, need_dB=need_B
            )
        if need_A and dS is not None:
            dA = reference_conv.grad_shrink(dS, X, mask, A, at)
        if need_X:
            dX = reference_conv.grad_input(dY, W.to(dY.dtype), dS, A, mask, ctx.shape, at)
        if need_W:
            dW = reference_conv.conv_weight_grad(dY, X, W.shape, at)
        return dX, dW, dA, dB, _channel_sum(dY) if need_bias else None, None, None


class DenseLoRAConv(torch.autograd.Function):
    """``Y = conv(X, W) + bias + c * conv(m∘X, B A)``, the product reshaped to W: loralib's factors.

    Their product is no pair of convolutions, so it is formed; it is formed anew in backward
    rather than kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        X: Tensor,
        W: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        spec: ConvSpec,
    ) -> Tensor:
        at = spec.at
        mask = reference_conv.draw_mask(X, spec.t, seed, at)
        ctx.spec, ctx.shape = spec, X.shape
        _, need_W, need_A, need_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(X if need_W or need_A or need_B else None, W, A, B, mask)
        delta = _dense_delta(A, B, spec.c, W.shape)
        if mask is None:
            return reference_conv.conv(X, (W + delta).to(X.dtype), bias, at)
        Y = reference_conv.conv(X, W.to(X.dtype), bias, at)
        Y += reference_conv.conv(reference_conv.keep(X, mask, at), delta.to(X.dtype), None, at)
        return _returned(Y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        X, W, A, B, mask = ctx.saved_tensors
        need_X, need_W, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
        spec, at = ctx.spec, ctx.spec.at
        dX = dW = dA = dB = None
        if need_X:
            delta = _dense_delta(A, B, spec.c, W.shape)
            if mask is None:
                whole = (W + delta).to(dY.dtype)
                dX = reference_conv.conv_input_grad(dY, whole, ctx.shape, at)
            else:
                dX = reference_conv.conv_input_grad(dY, W.to(dY.dtype), ctx.shape, at)
                through_delta = reference_conv.conv_input_grad(
                    dY, delta.to(dY.dtype), ctx.shape, at
                )
                dX += reference_conv.keep(through_delta, mask, at)
        if need_A or need_B:
            kept = reference_conv.keep(X, mask, at)
            d_delta = reference_conv.conv_weight_grad(dY, kept, W.shape, at)
            d_delta = d_delta.reshape(B.shape[0], A.shape[1]).to(A.dtype) * spec.c
            dA = B.t() @ d_delta if need_A else None
            dB = d_delta @ A.t() if need_B else None
        if need_W:
            dW = reference_conv.conv_weight_grad(dY, X, W.shape, at)
        return dX, dW, dA, dB, _channel_sum(dY) if need_bias else None, None, None


class TuckerKernel(torch.autograd.Function):
    """``D[g, s, c, k] = Σᵣ mid[g, s, r, k] A[g, r, c]``: two kernels as one, in each group."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, mid: Tensor) -> Tensor:
        ctx.save_for_backward(A, mid)
        return torch.einsum("gsrk,grc->gsck", mid, A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dD: Tensor) -> tuple[Tensor | None, ...]:
        A, mid = ctx.saved_tensors
        need_A, need_mid = ctx.needs_input_grad
        dA = torch.einsum("gsrk,gsck->grc", mid, dD) if need_A else None
        return dA, torch.einsum("gsck,grc->gsrk", dD, A) if need_mid else None


def _dense_delta(A: Tensor, B: Tensor, c: float | Tensor, shape: torch.Size) -> Tensor:
    return (B @ A).mul_(c).view(shape)


def _channel_sum(dY: Tensor) -> Tensor:
    return dY.sum([d for d in range(dY.dim()) if d != 1])
