"""How right a backend is: its error against fp64, beside that of the plain PyTorch composition.

No tolerance is picked. For each output and gradient, given the same mask, a path passes when its
rms error is at most 1.05 times, and its largest error at most twice, that of base, dropout, A, B,
scale and add done one after the other in the same dtypes; plus, to either, the rounding allowance
that FlashAttention's tests use: twice the (rms or largest) error of adding and taking off 0.3.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import dropout, functional
from fastlora.blocks import Blocks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RMS_RATIO = 1.05
MAX_RATIO = 2.0


@dataclass(frozen=True)
class Inputs:
    """The operands of one LoRA linear, forward and backward; sizes as in ``docs/math.md``."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    grad: Tensor
    blocks: Blocks
    scaling: float
    p: float
    seed: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same values in another dtype."""
        names = ("x", "weight", "lora_A", "lora_B", "bias", "grad")
        old: dict[str, Tensor | None] = {name: getattr(self, name) for name in names}
        new: dict[str, Any] = {name: t if t is None else t.to(dtype) for name, t in old.items()}
        return replace(self, **new)


def make_inputs(
    M: int,
    K: int,
    N: int,
    r: int,
    *,
    p: float = 0.0,
    dtype: torch.dtype = torch.float32,
    factor_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    bias: bool = True,
    blocks: Blocks | None = None,
    scaling: float = 2.0,
    seed: int = 0,
) -> Inputs:
    """Random operands of the sizes a trained layer has, so that outputs are of order 1."""
    blocks = blocks or Blocks.single(N)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(of)

    of = factor_dtype or dtype
    return Inputs(
        x=normal(M, K),
        weight=normal(N, K, std=K**-0.5),
        lora_A=normal(blocks.count * r, K, std=K**-0.5, of=of),
        lora_B=normal(blocks.adapted_features, r, std=0.3 * r**-0.5, of=of),
        bias=normal(N) if bias else None,
        grad=normal(M, N),
        blocks=blocks,
        scaling=scaling,
        p=p,
        seed=torch.tensor([seed + 1], device=device),
    )


def fused(inputs: Inputs, backend: str = "auto") -> dict[str, Tensor]:
    """Output and gradients of the library, by name."""
    i = inputs

    def layer(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
        return functional.block_lora_linear(
            x,
            i.weight,
            A,
            B,
            scaling=i.scaling,
            blocks=i.blocks,
            bias=bias,
            p=i.p,
            seed=i.seed,
            backend=backend,
        )

    return _run(i, layer)


def composition(inputs: Inputs) -> dict[str, Tensor]:
    """The same from plain PyTorch, one operation after the other, with the library's own mask."""
    i = inputs
    t = dropout.threshold(i.p)
    M, K = i.x.shape
    keep = dropout.unpack_mask(dropout.draw_mask(i.seed, M, K, t), K)

    def layer(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(x, i.weight, bias)
        dropped = x.to(A.dtype) * keep * dropout.inverse_keep(t)
        r = B.shape[1]
        S = dropped @ A.t()
        # PEFT's order for 16-bit inputs under fp32 factors: add in fp32, then round
        result = y.to(A.dtype).clone()
        for g, (S_g, (_, B_g)) in enumerate(
            zip(S.split(r, 1), i.blocks.factors(A, B), strict=True)
        ):
            out = i.blocks.output(result, g)
            out += ((S_g @ B_g.t()) * i.scaling).view(out.shape)
        return result.to(y.dtype)

    return _run(i, layer)


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """The same in fp64, from the same (already rounded) operands."""
    return composition(inputs.to(torch.float64))


def assert_no_worse(
    got: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    *,
    slack: float = 1.0,
) -> None:
    """Raises AssertionError unless every tensor of ``got`` passes the rule of this module.

    Args:
        got: Output and gradients under test.
        plain: Those of the composition in the same dtypes.
        exact: Those in fp64.
        slack: How many times the rule's errors are allowed.
    """
    _hold(got.keys() == plain.keys() == exact.keys(), f"{list(got)}: not {list(exact)}")
    for name, reference in exact.items():
        _hold(got[name].dtype == plain[name].dtype, f"{name}: dtype {got[name].dtype}")
        _hold(got[name].shape == reference.shape, f"{name}: shape {tuple(got[name].shape)}")
        if not reference.numel():
            continue
        ours, theirs = ((t[name].double() - reference).abs() for t in (got, plain))
        rounded = reference.to(got[name].dtype)
        rounding = ((rounded + 0.3 - 0.3) - rounded).double().abs()
        worst = slack * (MAX_RATIO * theirs.max().item() + 2 * rounding.max().item())
        rms = slack * (RMS_RATIO * _rms(theirs) + 2 * _rms(rounding))
        largest = ours.max().item()
        _hold(largest <= worst, f"{name}: max error {largest:.3g}, allowed {worst:.3g}")
        _hold(_rms(ours) <= rms, f"{name}: rms error {_rms(ours):.3g}, allowed {rms:.3g}")


def _hold(condition: bool, message: str) -> None:
    # no statement of assert, which python -O leaves out
    if not condition:
        raise AssertionError(message)


def check_linear(
    M: int,
    K: int,
    N: int,
    r: int,
    *,
    backend: str = "auto",
    p: float = 0.0,
    dtype: torch.dtype = torch.float32,
    factor_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    blocks: Blocks | None = None,
    bias: bool = True,
) -> None:
    """Raises AssertionError unless ``backend`` is right at this shape, forward and backward."""
    draws = make_draws(
        M,
        K,
        N,
        r,
        p=p,
        dtype=dtype,
        factor_dtype=factor_dtype,
        device=device,
        blocks=blocks,
        bias=bias,
    )
    got = stacked(fused(inputs, backend) for inputs in draws)
    assert_no_worse(got, stacked(map(composition, draws)), stacked(map(truth, draws)))


def make_draws(M: int, K: int, N: int, r: int, **options: Any) -> list[Inputs]:
    """Operands to be judged together, as :func:`make_inputs` makes them.

    Small shapes are drawn several times: the error of dB comes from S, and a handful of elements of
    it says nothing about an rms error.
    """
    draws = max(1, min(64, (1 << 13) // max(1, M * r)))
    return [make_inputs(M, K, N, r, seed=seed, **options) for seed in range(draws)]


def stacked(results: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The outputs and gradients of several draws as one, by name."""
    every = list(results)
    return {name: torch.stack([result[name] for result in every]) for name in every[0]}


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def _run(inputs: Inputs, layer: Callable[..., Tensor]) -> dict[str, Tensor]:
    names = ("x", "lora_A", "lora_B", "bias")
    leaves = {
        name: t.detach().clone().requires_grad_()
        for name in names
        if (t := getattr(inputs, name)) is not None
    }
    y = layer(*(leaves.get(name) for name in names))
    y.backward(inputs.grad)
    return {"y": y.detach(), **{f"d_{name}": t.grad for name, t in leaves.items()}}
