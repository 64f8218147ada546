"""What every LoRA layer shares: its options, its factors and how they are drawn."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from fastlora import backends, checks
from fastlora.layers.mergeable import Mergeable

INITS = (True, False, "gaussian")

# how a layer is built before it adopts the parameters of another: no memory, no random numbers
META: dict[str, Any] = {"device": "meta"}


# torch counts its own from 0
_HOOK = -1


def _no_hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Changes nothing, should the module be called."""


@dataclass(frozen=True)
class Options:
    """The options that every layer takes, checked before anything is built.

    Raises:
        ValueError: a negative rank, a dropout outside [0, 1], an unknown initialisation or backend.
        TypeError: a rank that is not an int, a dropout that is no number, a ``merge_weights`` that
            is no bool, factors that are not floating-point.
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    merge_weights: bool
    use_rslora: bool
    init_lora_weights: bool | str
    lora_dtype: torch.dtype | None
    backend: str = "auto"

    def __post_init__(self) -> None:
        checked = {
            "r": checks.rank("r", self.r),
            "lora_alpha": checks.number("lora_alpha", self.lora_alpha),
            "lora_dropout": checks.probability("lora_dropout", self.lora_dropout),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        checks.boolean("merge_weights", self.merge_weights)
        init = self.init_lora_weights
        # 0 and 1 equal False and True, but are compared by identity
        if not isinstance(init, bool | str) or init not in INITS:
            expected = ", ".join(map(repr, INITS))
            raise ValueError(f"init_lora_weights: got {init!r}, expected one of {expected}")
        if self.lora_dtype is not None:
            checks.float_dtype("lora_dtype", self.lora_dtype)
        backends.check_name(self.backend)


class LoRALayer(Mergeable):
    """Mixin of the LoRA layers; comes before the ``torch.nn`` layer it adapts.

    Attributes:
        r: Rank; 0 is the plain layer.
        lora_alpha: Numerator of ``scaling``.
        scaling: ``lora_alpha / r`` (``/ sqrt(r)`` with ``use_rslora``); only where factors exist. A
            new value takes effect at the next forward.
        lora_dropout: ``nn.Dropout`` or ``nn.Identity``, applied to the input of the LoRA branch.
    """

    r: int
    lora_alpha: float
    lora_dropout: nn.Module
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def _init_lora(self, options: Options) -> None:
        """Sets the options; ``nn.Module.__init__`` has run."""
        self.r = options.r
        self.lora_alpha = options.lora_alpha
        p = options.lora_dropout
        self.lora_dropout = nn.Dropout(p) if p > 0 else nn.Identity()
        self.merge_weights = options.merge_weights
        self.use_rslora = options.use_rslora
        self.init_lora_weights = options.init_lora_weights
        self.backend = options.backend
        self._lora_dtype = options.lora_dtype
        self.weight_is_shared = False
        self._merge_record = None
        self._merged_factors = {}
        self._merged_scaling = 0.0
        self._merged_counters, self._merged_memory = [], []
        self._told_of_weight = False

    def _ask_to_be_called(self) -> None:
        """Keeps torch from computing with ``weight`` and ``bias`` in the place of a call.

        ``nn.TransformerEncoderLayer`` does so in eval mode, unless any module in it has a hook:
        here one that is never called has one where that would be wrong, which costs a forward
        nothing.
        """
        never_called = self._modules.get("lora_dropout")
        if never_called is None:
            # torch's own constructor, which draws parameters, too
            return
        if self._acts_as_plain():
            never_called._forward_pre_hooks.pop(_HOOK, None)
        else:
            never_called._forward_pre_hooks[_HOOK] = _no_hook

    def _acts_as_plain(self) -> bool:
        """Whether the output is made of ``weight`` and ``bias`` alone, and as in torch."""
        return not self.adapted or (self.merged and "lora_bias" not in self.lora_parameters())

    def merge(self) -> None:
        if self.weight.numel():
            super().merge()
        self._ask_to_be_called()

    def _forget_merge(self) -> None:
        super()._forget_merge()
        self._ask_to_be_called()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self._ask_to_be_called()
        return self

    def _add_factors(self, **shapes: tuple[int, ...]) -> None:
        """Registers factors of these shapes, sets ``scaling`` and freezes the base weight."""
        dtype = self._lora_dtype or self.weight.dtype
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(self.weight.new_zeros(shape, dtype=dtype)))
        self.scaling = self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
        self.weight.requires_grad = False

    @classmethod
    def _with_sizes_of(cls, kept: dict[str, Any], options: dict[str, Any]) -> Self:
        """A layer on the meta device, with ``kept`` of a module and ``options`` of the caller."""
        if taken := sorted(options.keys() & {*kept, *META, "dtype"}):
            raise TypeError(f"{taken[0]}: got a value, expected none: it is that of the module")
        return cls(**kept, **options, **META)

    def adopt(self, module: nn.Module) -> Self:
        """Takes over the weight, bias and mode of ``module`` and draws factors beside them.

        The parameters are shared, not copied. For a layer built on the meta device.
        """
        weight = module.weight
        if weight.dtype not in checks.FLOAT_DTYPES or type(weight) is not nn.Parameter:
            raise TypeError(
                f"module.weight: got {type(weight).__name__} of {weight.dtype}, "
                "expected a plain floating-point nn.Parameter"
            )
        self.weight = weight
        if "bias" in module._parameters:
            self.register_parameter("bias", module._parameters["bias"])
        self.training = module.training
        self.lora_dropout.training = module.training
        for name, factor in self.lora_parameters().items():
            dtype = self._lora_dtype or weight.dtype
            empty = torch.empty_like(factor, device=weight.device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty))
        if self.adapted:
            weight.requires_grad = False
            self.reset_lora_parameters()
        return self

    def reset_parameters(self) -> None:
        """Draws the base weight like the plain layer, then the factors."""
        # a merge is of the values that go now
        self._forget_merge()
        super().reset_parameters()  # type: ignore[misc]  # the torch.nn layer's
        if self.adapted:
            self.reset_lora_parameters()

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Draws the factors anew as ``init_lora_weights`` says.

        True: A uniform (Kaiming, a = sqrt(5)), B zero, as in loralib. "gaussian": A normal with
        standard deviation 1 / r, B zero, as in the paper. False: both uniform, so that the layer
        starts away from the base (for tests).
        """
        down, *others = self._down_factors()
        if self.init_lora_weights == "gaussian":
            down.normal_(std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        for factor in others:
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        if self.init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B.flatten(1), a=math.sqrt(5))
        else:
            self.lora_B.zero_()
        if "lora_bias" in self.lora_parameters():
            self.lora_parameters()["lora_bias"].zero_()

    def _down_factors(self) -> list[nn.Parameter]:
        return [self.lora_A]

    def _lora_repr(self) -> str:
        """The LoRA part of ``extra_repr``."""
        if not self.adapted:
            return f"r={self.r}"
        text = f"r={self.r}, lora_alpha={self.lora_alpha}, scaling={float(self.scaling):g}"
        if self.use_rslora:
            text += ", use_rslora=True"
        if self.merged:
            text += ", merged=True"
        return text


def active_dropout(module: nn.Module) -> tuple[float, bool]:
    """``(p, training)`` of a layer's ``lora_dropout``.

    Raises:
        TypeError: neither ``nn.Dropout`` nor ``nn.Identity``.
    """
    if type(module) is nn.Identity:
        return 0.0, False
    if type(module) is nn.Dropout:
        return module.p, module.training
    raise TypeError(
        f"lora_dropout: got {type(module).__name__}, expected nn.Dropout or nn.Identity"
    )
