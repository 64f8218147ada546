"""The competitors: each turns the same weights, factors and input into a step to be timed."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shapes import Shape

BASELINE = "frozen linear"
LORA_ALPHA = 16


class Skipped(Exception):
    """A provider that cannot run this shape here; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """What all providers of one shape share."""

    x: Tensor
    grad: Tensor
    weight: Tensor
    bias: Tensor
    lora_A: Tensor
    lora_B: Tensor

    @classmethod
    def make(cls, shape: Shape, device: torch.device) -> "Inputs":
        """Draw them from a fixed seed, at the scale of a trained layer."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = shape.dtype) -> Tensor:
            values = torch.randn(*size, generator=generator, device=device) * scale
            return values.to(dtype)

        blocks = shape.enable_lora or (True,)
        adapted = sum(blocks)
        return cls(
            x=normal(shape.M, shape.K).requires_grad_(),
            grad=normal(shape.M, shape.N),
            weight=normal(shape.N, shape.K, scale=shape.K**-0.5),
            bias=normal(shape.N),
            lora_A=normal(adapted * shape.r, shape.K, scale=shape.K**-0.5, dtype=shape.factors),
            lora_B=normal(
                adapted * shape.N // len(blocks), shape.r, scale=0.02, dtype=shape.factors
            ),
        )


@dataclass(frozen=True)
class Case:
    """One provider, ready to run one shape.

    Attributes:
        module: The layer.
        inputs: What it runs on.
        context: In which it runs.
        ours: It is fastlora, which rounds its dropout probability to 2**-16.
    """

    module: nn.Module
    inputs: Inputs
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    ours: bool = False

    def forward(self) -> Tensor:
        """The layer's output."""
        with self.context():
            return self.module(self.inputs.x)

    def step(self) -> tuple[Tensor, ...]:
        """Forward and backward: gradients of the input and of whatever the layer trains."""
        trained = [p for p in self.module.parameters() if p.requires_grad]
        with self.context():
            output = self.module(self.inputs.x)
            return torch.autograd.grad(output, [self.inputs.x, *trained], self.inputs.grad)

    def resident(self) -> list[Tensor]:
        """Tensors that live outside the step: not activations."""
        return [*self.module.parameters(), *self.module.buffers(), self.inputs.x, self.inputs.grad]


Setup = Callable[[Shape, Inputs], Case]


def _load(module: nn.Module, inputs: Inputs) -> nn.Module:
    """Give a layer with loralib's attribute names the shared weights."""
    values = {name: getattr(inputs, name) for name in ("weight", "bias", "lora_A", "lora_B")}
    module.load_state_dict({k: v for k, v in values.items() if hasattr(module, k)}, strict=False)
    module.weight.requires_grad_(False)
    module.bias.requires_grad_(False)
    module.train()  # loralib's train() returns None
    return module


def _place(inputs: Inputs) -> dict[str, object]:
    return {"device": inputs.x.device, "dtype": inputs.x.dtype}


def _layer_like_loralib(library: Any, shape: Shape, inputs: Inputs) -> nn.Module:
    options = {"r": shape.r, "lora_alpha": LORA_ALPHA, "lora_dropout": shape.p, **_place(inputs)}
    if shape.enable_lora is None:
        layer = library.Linear(shape.K, shape.N, **options)
    else:
        layer = library.MergedLinear(
            shape.K, shape.N, enable_lora=list(shape.enable_lora), **options
        )
    if shape.factors != shape.dtype:
        for name in ("lora_A", "lora_B"):
            setattr(layer, name, nn.Parameter(getattr(layer, name).detach().to(shape.factors)))
    return _load(layer, inputs)


def _one_dtype(shape: Shape, who: str) -> None:
    if shape.factors != shape.dtype:
        raise Skipped(f"{who} takes all operands in one dtype")


def _no_blocks(shape: Shape, who: str) -> None:
    if shape.enable_lora is not None:
        raise Skipped(f"{who} has no merged layer with blocks left out")


def frozen_linear(shape: Shape, inputs: Inputs) -> Case:
    """``nn.Linear`` with frozen parameters: the floor, no adapter at all."""
    return Case(_load(nn.Linear(shape.K, shape.N, **_place(inputs)), inputs), inputs)


def loralib(shape: Shape, inputs: Inputs) -> Case:
    """microsoft/loralib."""
    try:
        import loralib as library
    except ImportError as error:
        raise Skipped("loralib is not installed") from error
    _one_dtype(shape, "loralib")
    return Case(_layer_like_loralib(library, shape, inputs), inputs)


def peft(shape: Shape, inputs: Inputs) -> Case:
    """Hugging Face PEFT around a one-layer model, factors in the dtype of the shape."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise Skipped("peft is not installed") from error
    _no_blocks(shape, "PEFT")
    model = nn.Sequential()
    model.add_module("layer", frozen_linear(shape, inputs).module)
    config = LoraConfig(
        r=shape.r, lora_alpha=LORA_ALPHA, lora_dropout=shape.p, target_modules=["layer"]
    )
    wide = shape.factors == torch.float32
    model = get_peft_model(model, config, autocast_adapter_dtype=wide)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for factor in ("lora_A", "lora_B"):
                if factor in name:
                    parameter.copy_(getattr(inputs, factor))
    return Case(model.train(), inputs)


def peft_compiled(shape: Shape, inputs: Inputs) -> Case:
    """PEFT under ``torch.compile``."""
    case = peft(shape, inputs)
    return Case(torch.compile(case.module), inputs)


def blocks_of(shape: Shape) -> list[tuple[slice, slice, slice]]:
    """Of each adapted block: its output features, rows of A and rows of B."""
    enabled = shape.enable_lora or (True,)
    width, r = shape.N // len(enabled), shape.r
    features = [i * width for i, on in enumerate(enabled) if on]
    return [
        (slice(n, n + width), slice(g * r, (g + 1) * r), slice(g * width, (g + 1) * width))
        for g, n in enumerate(features)
    ]


class Layer(nn.Module):
    """The parameters of an adapted layer; what is made of them is up to the subclass."""

    def __init__(self, shape: Shape, inputs: Inputs) -> None:
        super().__init__()
        self.shape, self.scaling, self.blocks = shape, LORA_ALPHA / shape.r, blocks_of(shape)
        for name in ("weight", "bias", "lora_A", "lora_B"):
            values = getattr(inputs, name).detach().clone()
            setattr(self, name, nn.Parameter(values, requires_grad=name.startswith("lora")))


class Chain(Layer):
    """Base, dropout, A, B, scale, add: one operation after the other."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        S = F.linear(F.dropout(x.to(self.lora_A.dtype), self.shape.p), self.lora_A)
        if self.shape.enable_lora is None:
            return (y + F.linear(S, self.lora_B) * self.scaling).to(y.dtype)
        for features, ranks, rows in self.blocks:
            y[:, features] += F.linear(S[:, ranks], self.lora_B[rows]) * self.scaling
        return y


def chain(shape: Shape, inputs: Inputs) -> Case:
    """Plain PyTorch, eager."""
    return Case(Chain(shape, inputs), inputs)


def chain_compiled(shape: Shape, inputs: Inputs) -> Case:
    """Plain PyTorch under ``torch.compile``, compiled for this shape alone; at one rank, for time.

    The steps of other shapes are forgotten, or it would be compiled for any shape from the second
    on, and not at all from the ninth.
    """
    if shape.r != 16:
        raise Skipped("compiled at r = 16 only")
    torch.compiler.reset()
    return Case(torch.compile(Chain(shape, inputs), dynamic=False), inputs)


class AddmmFunction(torch.autograd.Function):
    """The base product first, and each low-rank term added to it in place by ``addmm_``.

    ``dropped`` is the dropped x, or None where it is x itself. dY B is computed once.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, W: Tensor, bias: Tensor, *rest: Any
    ) -> Tensor:
        A, B, scaling, blocks = rest
        ctx.scaling, ctx.blocks, ctx.separate = scaling, blocks, dropped is not None
        source = x if dropped is None else dropped
        y = torch.addmm(bias, x, W.t())
        S = source @ A.t()
        for features, ranks, rows in blocks:
            y[:, features].addmm_(S[:, ranks], B[rows].t(), alpha=scaling)
        ctx.save_for_backward(source, W, A, B, S)
        return y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        source, W, A, B, S = ctx.saved_tensors
        dS, dB = torch.empty_like(S), torch.empty_like(B)
        for features, ranks, rows in ctx.blocks:
            for out, left, right in (
                (dS[:, ranks], dY[:, features], B[rows]),
                (dB[rows], dY[:, features].t(), S[:, ranks]),
            ):
                out.addmm_(left, right, beta=0, alpha=ctx.scaling)
        dX, dA = dY @ W, dS.t() @ source
        d_dropped = dS @ A if ctx.separate else None
        if not ctx.separate:
            dX.addmm_(dS, A)
        return dX, d_dropped, None, None, dA, dB, None, None


class Addmm(Layer):
    """Unsloth's order: no pass of its own for the scale or the addition."""

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.shape.p) if self.shape.p else None
        return AddmmFunction.apply(
            x,
            dropped,
            self.weight,
            self.bias,
            self.lora_A,
            self.lora_B,
            self.scaling,
            self.blocks,
        )


def addmm_order(shape: Shape, inputs: Inputs) -> Case:
    """Base first, low-rank terms added in place."""
    _one_dtype(shape, "this order")
    return Case(Addmm(shape, inputs), inputs)


def _with_triton(inputs: Inputs) -> Any:
    """The module of our own Triton layers."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise Skipped("triton is not installed") from error
    try:
        from benchmarks import lorafusion as module
    except ImportError as error:
        raise Skipped(f"fastlora is not importable: {error}") from error
    from triton import knobs

    if inputs.x.device.type == "cpu" and not knobs.runtime.interpret:
        raise Skipped("Triton needs a GPU")
    return module


def lorafusion(shape: Shape, inputs: Inputs) -> Case:
    """LoRAFusion's dataflow in kernels of our own: see ``lorafusion.py``."""
    _no_blocks(shape, "LoRAFusion")
    _one_dtype(shape, "LoRAFusion")
    return Case(_with_triton(inputs).LoRAFusion(shape, inputs), inputs)


class _Everywhere(frozenset[Any]):
    """The shapes of a table of tiles in which the fused products are always the faster ones."""

    def __bool__(self) -> bool:
        return True

    def __contains__(self, shape: object) -> bool:
        return True


def fastlora_fused(shape: Shape, inputs: Inputs) -> Case:
    """fastlora with each low-rank term in the accumulator of the base product, at every shape."""
    _no_blocks(shape, "the fused product")
    _with_triton(inputs)
    import fastlora
    from fastlora.kernels import configs, launch

    table = configs.table(launch.architecture(inputs.x.device))
    everywhere = replace(table, fused=_Everywhere())

    @contextmanager
    def fused() -> Iterator[None]:
        with (
            fastlora.use_backend("triton"),
            mock.patch.object(configs, "table", lambda architecture: everywhere),
        ):
            yield

    return Case(_layer_like_loralib(fastlora, shape, inputs), inputs, fused, ours=True)


def fastlora_with(backend: str) -> Setup:
    """fastlora on one backend; ``auto`` is what a user gets."""

    def setup(shape: Shape, inputs: Inputs) -> Case:
        try:
            import fastlora
        except ImportError as error:
            raise Skipped(f"not importable: {error}") from error
        if backend == "auto":
            return Case(_layer_like_loralib(fastlora, shape, inputs), inputs, ours=True)
        reasons = fastlora.backends.available(inputs.x.device.type)
        if reason := reasons.get(backend, "no such backend"):
            raise Skipped(reason)
        layer = _layer_like_loralib(fastlora, shape, inputs)
        return Case(layer, inputs, lambda: fastlora.use_backend(backend), ours=True)

    return setup


def usable_backends(device: str) -> list[str]:
    """Names of the backends that have kernels for ``device``; Triton's interpreter is none."""
    from fastlora import backends

    usable = [name for name, reason in backends.available(device).items() if reason is None]
    return [name for name in usable if (name, device) != ("triton", "cpu")]


def fastlora_backends() -> list[str]:
    """Usable backends that ``auto`` does not choose: the other ways to run the same layer."""
    try:
        from fastlora import backends
    except ImportError:
        return []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = backends.select("auto", device).name
    return [name for name in usable_backends(device) if name != chosen]


# beside the libraries on a GPU; anywhere by name
COMPOSITIONS: dict[str, Setup] = {
    "PyTorch chain": chain,
    "PyTorch chain, compiled": chain_compiled,
    "addmm order": addmm_order,
    "LoRAFusion's dataflow": lorafusion,
    "fastlora (fused)": fastlora_fused,
}


def providers(compiled: bool = False) -> dict[str, Setup]:
    """All providers by name, the baseline first; ``compiled`` adds PEFT under torch.compile."""
    table: dict[str, Setup] = {BASELINE: frozen_linear, "loralib": loralib, "PEFT": peft}
    if compiled:
        table["PEFT compiled"] = peft_compiled
    if torch.cuda.is_available():
        table |= COMPOSITIONS
    table["fastlora"] = fastlora_with("auto")
    for backend in fastlora_backends():
        table[f"fastlora ({backend})"] = fastlora_with(backend)
    return table
