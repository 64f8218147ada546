"""LoRA layers as functions: validate, flatten to 2-D, call the autograd Function."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import autograd, checks, dropout
from fastlora.backends import select
from fastlora.backends.reference_conv import Geometry
from fastlora.blocks import Blocks
from fastlora.dispatch import Case

__all__ = [
    "grouped_lora_linear",
    "lora_conv",
    "lora_conv_dense",
    "lora_embedding",
    "lora_linear",
    "multi_lora_linear",
]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor,
    bias: Tensor | None = None,
    lora_bias: Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Linear layer with a low-rank update.

    ``y = x Wᵀ + bias + scaling * (dropout(x) Aᵀ Bᵀ + lora_bias)``

    Args:
        x: Input, shape ``(..., in_features)``; float32, bfloat16, float16 or float64, any strides.
        weight: Base weight, shape ``(out_features, in_features)``, dtype of ``x``, any strides (a
            weight stored as ``(in, out)`` is passed as ``weight.t()``).
        lora_A: Down factor, shape ``(r, in_features)``, dtype of ``x``, or float32 over a 16-bit
            ``x``; ``x`` is not copied for it.
        lora_B: Up factor, shape ``(out_features, r)``, dtype of ``lora_A``.
        scaling: ``lora_alpha / r``, dimensionless; a number, or a tensor of one element (read
            without synchronising) that gets no gradient.
        bias: Bias of the base layer, shape ``(out_features,)``, dtype of ``x``.
        lora_bias: Bias of the up factor, shape ``(out_features,)``, scaled like it.
        p: Dropout probability of the LoRA branch's input, rounded to a multiple of 1/65536.
        training: Whether dropout is active.
        seed: Dropout seed, one int64 on the device of ``x``, to replay a mask; None draws one from
            torch's default generator of that device.
        backend: "auto", or a name of :func:`fastlora.backends.available`.

    Returns:
        Shape ``(..., out_features)``, dtype of ``x`` (of autocast where it is enabled); sums are
        accumulated in float32 (float64 for float64). Gradients reach whichever of ``x``,
        ``weight``, ``lora_A``, ``lora_B`` and the biases ask for one.

    Raises:
        ValueError: shapes, devices or options that do not fit, or a backend not usable here.
        TypeError: dtypes that do not fit.

    Reference:
        Hu et al. 2021, arXiv:2106.09685, eq. 3; truth in :mod:`fastlora.backends.reference`.
    """
    checks.base_weight("weight", weight)
    return block_lora_linear(
        x,
        weight,
        lora_A,
        lora_B,
        scaling=scaling,
        blocks=Blocks.single(weight.shape[0]),
        bias=bias,
        lora_bias=lora_bias,
        p=p,
        training=training,
        seed=seed,
        backend=backend,
    )


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor,
    enable_lora: Sequence[bool],
    out_splits: Sequence[int] | None = None,
    interleave: int = 1,
    bias: Tensor | None = None,
    lora_bias: Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Linear layer whose output is several blocks, each with its own low-rank update or none.

    One weight that holds q, k and v, say. All adapted blocks share one read of ``x`` and one
    dropout mask; a block that is not adapted gets the plain base product, bit for bit.

    Args:
        x: As for :func:`lora_linear`.
        weight: As for :func:`lora_linear`; the blocks lie along ``out_features``.
        lora_A: Down factors of the G adapted blocks, stacked: shape ``(G * r, in_features)``.
        lora_B: Up factors of the adapted blocks, stacked: shape ``(sum of their sizes, r)``.
        scaling: As for :func:`lora_linear`.
        enable_lora: Which blocks are adapted.
        out_splits: Sizes of the blocks; None: equal sizes.
        interleave: 1: each block is contiguous (``q | k | v``). H: the blocks alternate in H parts
            (``q0 k0 v0 | q1 k1 v1 | ...``), as where a fused qkv weight is laid out by head.
        bias: As for :func:`lora_linear`.
        lora_bias: Shape ``(sum of the adapted sizes,)``.
        p: As for :func:`lora_linear`.
        training: As for :func:`lora_linear`.
        seed: As for :func:`lora_linear`.
        backend: As for :func:`lora_linear`.

    Returns:
        As for :func:`lora_linear`.

    Raises:
        ValueError: as for :func:`lora_linear`, or blocks that do not divide ``out_features``.
        TypeError: as for :func:`lora_linear`.
    """
    checks.base_weight("weight", weight)
    blocks = checks.blocks(weight.shape[0], enable_lora, out_splits, interleave)
    if not blocks.count:
        return F.linear(x, weight, bias)
    return block_lora_linear(
        x,
        weight,
        lora_A,
        lora_B,
        scaling=scaling,
        blocks=blocks,
        bias=bias,
        lora_bias=lora_bias,
        p=p,
        training=training,
        seed=seed,
        backend=backend,
    )


def multi_lora_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor | None],
    lora_B: Sequence[Tensor | None],
    *,
    scaling: float | Tensor | Sequence[float | Tensor],
    bias: Sequence[Tensor | None] | None = None,
    lora_bias: Sequence[Tensor | None] | None = None,
    p: float | Sequence[float] = 0.0,
    training: bool = True,
    seeds: Sequence[Tensor | None] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Several linear layers of the same input, each with its own low-rank update or none.

    A model's q, k and v projections, say, or gate and up. Output i is that of :func:`lora_linear`
    with element i of each list, bit for bit, as are the gradients of its parameters; the gradient
    of ``x`` is summed up in one buffer, and ``x`` is saved for backward once. Where the parameters
    are those of one weight, :func:`grouped_lora_linear` has one mask for all and needs fewer
    products.

    Args:
        x: As for :func:`lora_linear`.
        weights: Base weights, shapes ``(out_features_i, in_features)``, dtype of ``x``.
        lora_A: Down factors, shapes ``(r_i, in_features)``; None, here and in ``lora_B``, for a
            layer that has none.
        lora_B: Up factors, shapes ``(out_features_i, r_i)``, each in the dtype of its down factor.
        scaling: As for :func:`lora_linear`: one for all layers, or a list or tuple of them, like
            ``p``.
        bias: Biases of the base layers, shapes ``(out_features_i,)``, each may be None.
        lora_bias: Biases of the up factors, shapes ``(out_features_i,)``, each may be None.
        p: Dropout probability; each layer has a mask of its own.
        training: As for :func:`lora_linear`.
        seeds: Dropout seeds, each as for :func:`lora_linear`; those that are None are drawn in the
            order of the layers.
        backend: As for :func:`lora_linear`.

    Returns:
        Of each layer what :func:`lora_linear` returns.

    Raises:
        ValueError: as for :func:`lora_linear`, or lists that are not of one length.
        TypeError: as for :func:`lora_linear`, or no lists.
    """
    checks.count("weights", weights)
    n, dtype = len(weights), compute_dtype(x)
    checks.count("lora_A", lora_A, n)
    checks.count("lora_B", lora_B, n)
    biases, lora_biases = _optional("bias", bias, n), _optional("lora_bias", lora_bias, n)
    scalings = _for_each("scaling", scaling, n, checks.scaling)
    rates, seeds = _for_each("p", p, n, checks.probability), _optional("seeds", seeds, n)
    layers = []
    for i, W in enumerate(weights):
        checks.base_weight(f"weights[{i}]", W)
        A, B = _factors(W, lora_A[i], lora_B[i], dtype)
        blocks = Blocks.single(W.shape[0])
        checks.linear(x, W, A, B, biases[i], lora_biases[i], blocks, dtype, at=i)
        checks.seed(f"seeds[{i}]", seeds[i], x.device)
        if not len(W):
            # of no features: there is nothing to adapt
            A, B = A[:0], B[:, :0]
        rate = rates[i] if training and B.shape[1] else 0.0
        layers.append((A, B, scalings[i], blocks, biases[i], lora_biases[i], rate, seeds[i]))
    x = x.to(dtype)
    X = _rows(x)
    # the first stands for all
    _, B, *_, rate, _ = layers[0]
    chosen = select(backend, x.device.type, dtype, Case.of(X, weights[0], B, rate > 0))
    # seeds are drawn here, after the last check
    prepared = (_prepare(x, *layer) for layer in layers)
    As, Bs, total_biases, drawn, c, t = zip(*prepared, strict=True)
    spec = autograd.MultiLinearSpec(c, t, chosen)
    with checks.without_autocast(x.device):
        Y = autograd.LoRAMultiLinear.apply(X, spec, *weights, *As, *Bs, *total_biases, *drawn)
    return tuple(_unflatten(Y_i, x.shape[:-1]) for Y_i in Y)


def _factors(
    W: Tensor, A: Tensor | None, B: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The factors of a layer; where there are none, some of rank 0."""
    if A is None and B is None:
        return W.new_empty(0, W.shape[1], dtype=dtype), W.new_empty(W.shape[0], 0, dtype=dtype)
    # where there is one, the other is asked for by name
    return cast(Tensor, A), cast(Tensor, B)


def _optional(name: str, values: Sequence[Tensor | None] | None, n: int) -> Sequence[Tensor | None]:
    """The values of ``n`` layers; None: none has one."""
    if values is None:
        return [None] * n
    checks.count(name, values, n)
    return values


def _for_each(name: str, value: Any, n: int, check: Callable[[str, Any], Any]) -> Sequence[Any]:
    """The values of ``n`` layers, or the one of all of them, checked."""
    if not isinstance(value, list | tuple):
        return [check(name, value)] * n
    checks.count(name, value, n)
    return [check(f"{name}[{i}]", of_one) for i, of_one in enumerate(value)]


def block_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor,
    blocks: Blocks,
    bias: Tensor | None = None,
    lora_bias: Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`grouped_lora_linear` for a layout that is at hand as :class:`Blocks`."""
    dtype = compute_dtype(x)
    checks.linear(x, weight, lora_A, lora_B, bias, lora_bias, blocks, dtype)
    scaling = checks.scaling("scaling", scaling)
    p = checks.probability("p", p)
    checks.seed("seed", seed, x.device)
    if not len(weight):
        # of no features: there is nothing to adapt
        return F.linear(x, weight, bias)
    x = x.to(dtype)
    A, B, bias, seed, c, t = _prepare(
        x, lora_A, lora_B, scaling, blocks, bias, lora_bias, p if training else 0.0, seed
    )
    X = _rows(x)
    case = Case.of(X, weight, B, t > 0)
    spec = autograd.LinearSpec(c, t, blocks, select(backend, x.device.type, dtype, case))
    with checks.without_autocast(x.device):
        Y = autograd.LoRALinear.apply(X, weight, A, B, bias, seed, spec)
    return _unflatten(Y, x.shape[:-1])


def _prepare(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    blocks: Blocks,
    bias: Tensor | None,
    lora_bias: Tensor | None,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float | Tensor, int]:
    """The factors, bias and seed, c and threshold that a layer of this ``x`` computes with."""
    c, t = dropout_factors(scaling, p, training=True)
    if t and seed is None:
        seed = dropout.draw_seed(x.device)
    bias = add_lora_bias(bias, lora_bias, scaling, blocks, x.dtype)
    return for_input(lora_A, x.dtype), for_input(lora_B, x.dtype), bias, seed, c, t


def lora_embedding(
    index: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """Embedding with a low-rank update: ``y = W[index] + scaling * A[:, index]ᵀ Bᵀ``.

    Args:
        index: Rows to look up, int64 or int32, any shape.
        weight: Base table, shape ``(num_embeddings, embedding_dim)``.
        lora_A: Down factor, shape ``(r, num_embeddings)``, dtype of ``weight`` or float32 over a
            16-bit one.
        lora_B: Up factor, shape ``(embedding_dim, r)``, dtype of ``lora_A``.
        scaling: ``lora_alpha / r``.
        padding_idx: Row that gets no gradient, in the table and in ``lora_A``.
        scale_grad_by_freq: Divide a row's gradient by how often it was looked up.

    Returns:
        Shape ``(*index.shape, embedding_dim)``, dtype of ``weight``.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that do not fit.
        IndexError: an index outside the table.
    """
    checks.embedding(index, weight, lora_A, lora_B, padding_idx)
    scaling = checks.scaling("scaling", scaling)
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    spec = autograd.EmbeddingSpec(scaling, padding, scale_grad_by_freq)
    with checks.without_autocast(weight.device):
        Y = autograd.LoRAEmbedding.apply(index.reshape(-1), weight, lora_A, lora_B, spec)
    return _unflatten(Y, index.shape)


def lora_conv(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int = 1,
    padding_mode: str = "zeros",
    p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """Convolution with a low-rank update (LoCon).

    ``y = conv(x, W) + bias + scaling * B conv(dropout(x), A)``

    Equals the convolution by ``W + scaling * B A`` for every stride, padding, dilation, number of
    groups and padding mode.

    Args:
        x: Input, shape ``(batch, in_channels, *size)`` of one to three dimensions.
        weight: Base kernel, shape ``(out_channels, in_channels / groups, *kernel)``.
        lora_A: Down kernel, shape ``(groups * r, in_channels / groups, *kernel)``.
        lora_B: Up factor (a 1x1 kernel), shape ``(out_channels, r)``.
        scaling: ``lora_alpha / r``.
        bias: Shape ``(out_channels,)``.
        stride: One number, or one a dimension, as in ``torch.nn.Conv2d`` and its siblings, like
            ``padding`` (or "same", "valid"), ``dilation``, ``groups`` and ``padding_mode``.
        padding: See ``stride``.
        dilation: See ``stride``.
        groups: See ``stride``.
        padding_mode: See ``stride``.
        p: Dropout probability, for each element of ``x``.
        training: Whether dropout is active.
        seed: Dropout seed, as for :func:`lora_linear`.

    Returns:
        What the convolution returns, in the dtype of ``x``.

    Raises:
        ValueError: shapes, devices or options that do not fit.
        TypeError: dtypes that do not fit.

    Reference:
        LoCon, as in LyCORIS (arXiv:2309.14859, section 3.1).
    """
    r = lora_B.shape[-1]
    expected_A = (groups * r, *weight.shape[1:])
    checks.conv(x, weight, bias, groups, compute_dtype(x))
    checks.conv_factors(x, lora_A, lora_B, expected_A, (len(weight), r), compute_dtype(x))
    function = autograd.LoRAConv
    geometry = (stride, padding, dilation, groups, padding_mode)
    return _conv(function, x, weight, lora_A, lora_B, bias, geometry, scaling, p, training, seed)


def lora_conv_dense(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int = 1,
    padding_mode: str = "zeros",
    p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """Convolution with loralib's factors.

    ``y = conv(x, W) + bias + scaling * conv(dropout(x), ΔW)``

    ``ΔW`` is the product ``B A`` read as a tensor of the kernel's shape. Where dropout is inactive
    this is one convolution, by ``W + scaling * ΔW``.

    Args:
        x: As for :func:`lora_conv`, like all that is not listed here.
        weight: As for :func:`lora_conv`.
        lora_A: Shape ``(R, k)``.
        lora_B: Shape ``(n, R)``, where ``n * k`` is the number of elements of ``weight``.
        scaling: ``lora_alpha / r``.
        bias: As for :func:`lora_conv`.
        stride: As for :func:`lora_conv`.
        padding: As for :func:`lora_conv`.
        dilation: As for :func:`lora_conv`.
        groups: As for :func:`lora_conv`.
        padding_mode: As for :func:`lora_conv`.
        p: As for :func:`lora_conv`.
        training: As for :func:`lora_conv`.
        seed: As for :func:`lora_conv`.

    Returns:
        As for :func:`lora_conv`.

    Raises:
        ValueError: as for :func:`lora_conv`.
        TypeError: as for :func:`lora_conv`.
    """
    rank, columns = lora_A.shape[0], lora_A.shape[-1]
    expected_B = (weight.numel() // max(columns, 1), rank)
    checks.conv(x, weight, bias, groups, compute_dtype(x))
    checks.conv_factors(x, lora_A, lora_B, (rank, columns), expected_B, compute_dtype(x))
    function = autograd.DenseLoRAConv
    geometry = (stride, padding, dilation, groups, padding_mode)
    return _conv(function, x, weight, lora_A, lora_B, bias, geometry, scaling, p, training, seed)


def _conv(
    function: type[torch.autograd.Function],
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    geometry: tuple[int | Sequence[int], int | Sequence[int] | str, int | Sequence[int], int, str],
    scaling: float | Tensor,
    p: float,
    training: bool,
    seed: Tensor | None,
) -> Tensor:
    scaling = checks.scaling("scaling", scaling)
    p = checks.probability("p", p)
    checks.seed("seed", seed, x.device)
    kernel, (stride, padding, dilation, groups, padding_mode) = weight.shape[2:], geometry
    stride = checks.per_dimension("stride", stride, len(kernel))
    dilation = checks.per_dimension("dilation", dilation, len(kernel))
    padding = checks.padding(padding, padding_mode, stride)
    dtype = compute_dtype(x)
    c, t = dropout_factors(scaling, p, training)
    if t and seed is None:
        seed = dropout.draw_seed(x.device)
    with checks.without_autocast(x.device):
        # in the dtype of x, in which the gradients of an element and its copies are then summed
        X = x if x.dim() == weight.dim() else x.unsqueeze(0)
        X, at = _pad(X, kernel, stride, padding, dilation, groups, padding_mode)
        spec = autograd.ConvSpec(c, t, at)
        Y = function.apply(
            X.to(dtype),
            weight,
            for_input(lora_A, dtype),
            for_input(lora_B, dtype),
            bias if bias is None else bias.to(dtype),
            seed,
            spec,
        )
    return Y if x.dim() == weight.dim() else Y.squeeze(0)


def _pad(
    X: Tensor,
    kernel: Sequence[int],
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
    padding_mode: str,
) -> tuple[Tensor, Geometry]:
    """The input, padded where the convolution cannot do that by itself, and the geometry left."""
    if padding_mode == "zeros" and not isinstance(padding, str):
        return X, Geometry(stride, padding, dilation, groups)
    ends: list[int] = []
    for i in reversed(range(len(kernel))):
        if isinstance(padding, str):
            total = dilation[i] * (kernel[i] - 1)
            ends += [total // 2, total - total // 2]
        else:
            ends += [padding[i], padding[i]]
    mode = "constant" if padding_mode == "zeros" else padding_mode
    at = Geometry(stride, (0,) * len(kernel), dilation, groups, tuple(ends), mode)
    return F.pad(X, ends, mode), at


def _rows(x: Tensor) -> Tensor:
    """The rows of x (..., K): (M, K)."""
    if x.dim() == 2:
        return x
    # no -1, which says nothing where K is 0
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def _unflatten(Y: Tensor, shape: torch.Size) -> Tensor:
    """Y (M, N) as (*shape, N), but no view, as from torch's own layers.

    An in-place operation on a view would make FSDP lose its hook on the output.
    """
    if len(shape) == 1:
        return Y
    unflattened: Tensor = torch.ops.aten._unsafe_view(Y, [*shape, Y.shape[-1]])
    return unflattened


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a layer computes in: autocast's dtype where it applies to ``x``, else that of ``x``."""
    checks.dense("x", x)
    # like torch's own layers, autocast leaves fp64 alone
    if checks.under_autocast(x.device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def for_input(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor as it is used for an input of ``dtype``: as it is, but for 16 bits over fp32."""
    return factor if factor.dtype in (dtype, torch.float32) else factor.to(dtype)


def dropout_factors(
    scaling: float | Tensor, p: float, training: bool
) -> tuple[float | Tensor, int]:
    """``c = scaling / (1 - p)`` and the threshold of the mask, both for the exact p."""
    t = dropout.threshold(p) if training else 0
    if t and isinstance(scaling, Tensor):
        # not rounded to the tensor's own dtype, which may be short
        scaling = scaling.float() if scaling.device.type == "mps" else scaling.double()
    return scaling * dropout.inverse_keep(t), t


def add_lora_bias(
    bias: Tensor | None,
    lora_bias: Tensor | None,
    scaling: float | Tensor,
    blocks: Blocks,
    dtype: torch.dtype,
) -> Tensor | None:
    """The one bias a layer adds, ``bias + scaling * lora_bias``, in ``dtype``."""
    if lora_bias is None:
        return bias if bias is None else bias.to(dtype)
    scaling = checks.scaling("scaling", scaling)
    total = lora_bias.new_zeros(blocks.out_features) if bias is None else bias.to(lora_bias.dtype)
    if blocks.count == 1 and blocks.adapted_features == blocks.out_features:
        return (total + scaling * lora_bias).to(dtype)
    total = total.clone()
    for g in range(blocks.count):
        out = blocks.output(total, g)
        out += (scaling * lora_bias[blocks.rows_of_B(g)]).view(out.shape)
    return total.to(dtype)
