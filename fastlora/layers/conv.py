"""Convolutions with a low-rank update: loralib's factors, LoCon's, and Tucker's."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from fastlora import autograd, checks, functional
from fastlora.backends.reference import accumulation_dtype
from fastlora.blocks import Blocks
from fastlora.layers.base import LoRALayer, Options, active_dropout
from fastlora.merge import Term

FACTORIZATIONS = ("loralib", "locon", "tucker")
_FACTORS = ("lora_A", "lora_mid", "lora_B")


def use_plain_names(state_dict: dict[str, Any], prefix: str) -> None:
    """Renames a layer's ``conv.weight`` and ``conv.bias`` in a checkpoint as in ``nn.Conv2d``.

    loralib 0.1.2 keeps them under the former names, its later sources under both.
    """
    for name in ("weight", "bias"):
        if f"{prefix}conv.{name}" in state_dict:
            state_dict[prefix + name] = state_dict.pop(f"{prefix}conv.{name}")


class ConvLoRA(LoRALayer, nn.modules.conv._ConvNd):
    """A convolution with a low-rank update; :class:`Conv1d`, :class:`Conv2d` and :class:`Conv3d`.

    With groups, each group has factors of its own (but for "loralib", whose product mixes them).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: One number, or one a dimension.
        r: Rank; 0 gives a plain, trainable convolution.
        lora_alpha: ``scaling = lora_alpha / r``.
        lora_dropout: Dropout probability of each element of the LoRA branch's input.
        merge_weights: ``eval()`` merges the update into the kernel, ``train()`` takes it out again.
        factorization: What ``ΔW / scaling`` is.
            "loralib": the matrix ``B A`` read as a tensor of the kernel's shape, as in
            ``loralib.Conv2d``; its rank is up to ``r * kernel_size``, and training forms ``ΔW``.
            "locon": a kernel-sized convolution A to r channels, then a 1x1 convolution B.
            "tucker": 1x1 (A), kernel-sized within r channels (``lora_mid``), 1x1 (B).
        use_rslora: ``scaling = lora_alpha / sqrt(r)``.
        lora_bias: Adds a trainable bias to the up factor, scaled like it.
        init_lora_weights: As for :class:`fastlora.Linear`.
        lora_dtype: As for :class:`fastlora.Linear`.
        **kwargs: Those of ``nn.Conv2d`` and its siblings (``stride``, ``padding``, ``dilation``,
            ``groups``, ``bias``, ``padding_mode``, ``device``, ``dtype``).

    Raises:
        ValueError, TypeError: an option is wrong; nothing was built.

    Shape:
        weight (O, C / g, *k). "loralib": lora_A (r * k0, C * rest), lora_B (O / g * k0, r * k0),
        where k0 is the kernel's first size and rest the product of the others (1-d: k0 = 1).
        "locon": lora_A (g * r, C / g, *k), lora_B (O, r, 1...). "tucker": lora_A (g * r, C / g,
        1...), lora_mid (g * r, r, *k), lora_B (O, r, 1...).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        *,
        factorization: str = "loralib",
        use_rslora: bool = False,
        lora_bias: bool = False,
        init_lora_weights: bool | str = True,
        lora_dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        options = Options(
            r,
            lora_alpha,
            lora_dropout,
            merge_weights,
            use_rslora,
            init_lora_weights,
            lora_dtype,
        )
        if factorization not in FACTORIZATIONS:
            expected = ", ".join(repr(f) for f in FACTORIZATIONS)
            raise ValueError(f"factorization: got {factorization!r}, expected one of {expected}")
        # the plain convolution is next but one in the order of resolution: Conv2d -> ConvLoRA -> it
        super().__init__(in_channels, out_channels, kernel_size, **kwargs)  # type: ignore[arg-type]
        self.factorization = factorization
        self._init_lora(options)
        if r > 0:
            shapes = self._factor_shapes()
            self._add_factors(**shapes, **({"lora_bias": (out_channels,)} if lora_bias else {}))
        self.reset_parameters()

    @classmethod
    def from_conv(cls, module: nn.Module, r: int, **options: Any) -> Self:
        """A LoRA layer over an existing convolution of as many dimensions, whose kernel it shares.

        Args:
            module: The plain convolution itself (``nn.Conv2d`` for ``Conv2d``), not a subclass.
            r: Rank.
            **options: ``lora_alpha`` and those after it, as for the class.

        Raises:
            TypeError: another kind of module.
        """
        return cls.like(module, r=r, **options).adopt(module)

    @classmethod
    def like(cls, module: nn.Module, **options: Any) -> Self:
        """A layer of the sizes of ``module``, on the meta device; see :meth:`from_conv`."""
        plain = getattr(nn, cls.__name__)
        if type(module) is not plain:
            raise TypeError(
                f"module: got {type(module).__qualname__}, expected {plain.__qualname__} itself"
            )
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
        kept = {name: getattr(module, name) for name in (*names, "groups", "padding_mode")}
        return cls._with_sizes_of({**kept, "bias": module.bias is not None}, options)

    def _factor_shapes(self) -> dict[str, tuple[int, ...]]:
        r, groups, kernel = self.r, self.groups, tuple(self.kernel_size)
        one = (1,) * len(kernel)
        if self.factorization == "loralib":
            first = kernel[0] if len(kernel) > 1 else 1
            rest = math.prod(kernel) // first
            rows = self.out_channels // groups * first
            return {"lora_A": (r * first, self.in_channels * rest), "lora_B": (rows, r * first)}
        channels, up = self.in_channels // groups, (self.out_channels, r, *one)
        if self.factorization == "locon":
            return {"lora_A": (groups * r, channels, *kernel), "lora_B": up}
        return {
            "lora_A": (groups * r, channels, *one),
            "lora_mid": (groups * r, r, *kernel),
            "lora_B": up,
        }

    def _down_factors(self) -> list[nn.Parameter]:
        return [p for name, p in self.lora_parameters().items() if name in ("lora_A", "lora_mid")]

    def _down_kernel(self, lora: Mapping[str, Tensor]) -> Tensor:
        """The kernel-sized down factor, (g * r, C / g, *k)."""
        if self.factorization == "locon":
            return lora["lora_A"]
        wide = accumulation_dtype(lora["lora_A"].dtype)
        with checks.without_autocast(lora["lora_A"].device):
            A = lora["lora_A"].to(wide).flatten(1).unflatten(0, (self.groups, self.r))
            mid = lora["lora_mid"].to(wide).flatten(2).unflatten(0, (self.groups, self.r))
            kernel = autograd.TuckerKernel.apply(A, mid)
        return kernel.reshape(self.groups * self.r, -1, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """As the plain convolution."""
        # by name: the parameters of DataParallel's replicas are plain attributes
        found = {name: getattr(self, name, None) for name in _FACTORS}
        lora: dict[str, Tensor] = {name: t for name, t in found.items() if t is not None}
        bias = self._merged_bias()
        if self._uses_base_only():
            return self._conv_forward(x, self.weight, bias)
        p, training = active_dropout(self.lora_dropout)
        if self.factorization == "loralib":
            function, down, up = functional.lora_conv_dense, lora["lora_A"], lora["lora_B"]
        else:
            function, down = functional.lora_conv, self._down_kernel(lora)
            up = lora["lora_B"].flatten(1).to(down.dtype)
        return function(
            x,
            self.weight,
            down,
            up,
            scaling=self.scaling,
            bias=bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
            p=p,
            training=training,
        )

    def _merged_bias(self) -> Tensor | None:
        lora_bias = getattr(self, "lora_bias", None)
        if lora_bias is None:
            return self.bias
        whole = Blocks.single(self.out_channels)
        return functional.add_lora_bias(
            self.bias, lora_bias, self.scaling, whole, self.weight.dtype
        )

    def _merge_terms(self, weight: Tensor, lora: Mapping[str, Tensor]) -> list[Term]:
        if self.factorization == "loralib":
            return [Term(weight, lora["lora_B"], lora["lora_A"], divisible=False)]
        up = lora["lora_B"].flatten(1).chunk(self.groups)
        down = self._down_kernel(lora).flatten(1).chunk(self.groups)
        return [Term(*parts) for parts in zip(weight.chunk(self.groups), up, down, strict=True)]

    @property
    def conv(self) -> "ConvLoRA":
        """The layer itself, where loralib has the inner convolution."""
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        use_plain_names(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, {self._lora_repr()}"
        return f"{text}, factorization={self.factorization!r}" if self.adapted else text


class Conv1d(ConvLoRA, nn.Conv1d):
    """``nn.Conv1d`` with a low-rank update; see :class:`ConvLoRA`."""


class Conv2d(ConvLoRA, nn.Conv2d):
    """``nn.Conv2d`` with a low-rank update, as ``loralib.Conv2d``; see :class:`ConvLoRA`."""


class Conv3d(ConvLoRA, nn.Conv3d):
    """``nn.Conv3d`` with a low-rank update; see :class:`ConvLoRA`."""
