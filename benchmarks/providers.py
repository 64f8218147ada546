"""The competitors: each turns the same weights, factors and input into a step to be timed."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
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
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(*size, generator=generator) * scale
            return values.to(device, shape.dtype)

        blocks = shape.enable_lora or (True,)
        adapted = sum(blocks)
        return cls(
            x=normal(shape.M, shape.K).requires_grad_(),
            grad=normal(shape.M, shape.N),
            weight=normal(shape.N, shape.K, scale=shape.K**-0.5),
            bias=normal(shape.N),
            lora_A=normal(adapted * shape.r, shape.K, scale=shape.K**-0.5),
            lora_B=normal(adapted * shape.N // len(blocks), shape.r, scale=0.02),
        )


@dataclass(frozen=True)
class Case:
    """One provider, ready to run one shape."""

    module: nn.Module
    inputs: Inputs
    context: Callable[[], AbstractContextManager[object]] = nullcontext

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


def _layer_like_loralib(library: object, shape: Shape, inputs: Inputs) -> nn.Module:
    options = {"r": shape.r, "lora_alpha": LORA_ALPHA, "lora_dropout": shape.p, **_place(inputs)}
    if shape.enable_lora is None:
        layer = library.Linear(shape.K, shape.N, **options)
    else:
        layer = library.MergedLinear(
            shape.K, shape.N, enable_lora=list(shape.enable_lora), **options
        )
    return _load(layer, inputs)


def frozen_linear(shape: Shape, inputs: Inputs) -> Case:
    """``nn.Linear`` with frozen parameters: the floor, no adapter at all."""
    return Case(_load(nn.Linear(shape.K, shape.N, **_place(inputs)), inputs), inputs)


def loralib(shape: Shape, inputs: Inputs) -> Case:
    """microsoft/loralib."""
    try:
        import loralib as library
    except ImportError as error:
        raise Skipped("loralib is not installed") from error
    return Case(_layer_like_loralib(library, shape, inputs), inputs)


def peft(shape: Shape, inputs: Inputs) -> Case:
    """Hugging Face PEFT around a one-layer model, factors in the layer's dtype."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise Skipped("peft is not installed") from error
    if shape.enable_lora is not None:
        raise Skipped("PEFT has no merged layer with blocks left out")
    model = nn.Sequential()
    model.add_module("layer", frozen_linear(shape, inputs).module)
    config = LoraConfig(
        r=shape.r, lora_alpha=LORA_ALPHA, lora_dropout=shape.p, target_modules=["layer"]
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
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


def fastlora_with(backend: str) -> Setup:
    """fastlora on one backend; ``auto`` is what a user gets."""

    def setup(shape: Shape, inputs: Inputs) -> Case:
        try:
            import fastlora
        except ImportError as error:
            raise Skipped(f"not importable: {error}") from error
        if backend == "auto":
            return Case(_layer_like_loralib(fastlora, shape, inputs), inputs)
        if reason := fastlora.backends.available().get(backend, "no such backend"):
            raise Skipped(reason)
        layer = _layer_like_loralib(fastlora, shape, inputs)
        return Case(layer, inputs, lambda: fastlora.use_backend(backend))

    return setup


def fastlora_backends() -> list[str]:
    """Usable backends that ``auto`` does not choose: the other ways to run the same layer."""
    try:
        from fastlora import backends
    except ImportError:
        return []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = backends.select("auto", device).name
    return [name for name, reason in backends.available().items() if not reason and name != chosen]


def providers(compiled: bool = False) -> dict[str, Setup]:
    """All providers by name, the baseline first; ``compiled`` adds PEFT under torch.compile."""
    table: dict[str, Setup] = {BASELINE: frozen_linear, "loralib": loralib, "PEFT": peft}
    if compiled:
        table["PEFT compiled"] = peft_compiled
    table["fastlora"] = fastlora_with("auto")
    for backend in fastlora_backends():
        table[f"fastlora ({backend})"] = fastlora_with(backend)
    return table
