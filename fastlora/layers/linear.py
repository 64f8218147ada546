"""``Linear`` with a low-rank update."""

from collections.abc import Mapping
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from fastlora import checks, functional
from fastlora.blocks import Blocks
from fastlora.layers.base import LoRALayer, Options, active_dropout
from fastlora.merge import Term


class BlockLinear(LoRALayer, nn.Linear):
    """What Linear and MergedLinear share: a linear layer whose output is one or several blocks."""

    blocks: Blocks
    fan_in_fan_out: bool

    def _init_blocks(self, blocks: Blocks, fan_in_fan_out: bool, lora_bias: bool) -> None:
        """Adds the factors, draws all parameters, turns the weight if it is stored (in, out)."""
        self.blocks = blocks
        self.fan_in_fan_out = False
        if self.r > 0 and blocks.count:
            n = blocks.adapted_features
            shapes = {"lora_A": (self.r * blocks.count, self.in_features), "lora_B": (n, self.r)}
            self._add_factors(**shapes, **({"lora_bias": (n,)} if lora_bias else {}))
        self.reset_parameters()
        if fan_in_fan_out:
            self.weight.data = self.weight.data.t().contiguous()
            self.fan_in_fan_out = True

    @classmethod
    def like(cls, module: nn.Module, **options: Any) -> Self:
        """A layer of the sizes of ``module``, on the meta device; see ``from_linear``."""
        conv1d = is_hf_conv1d(module)
        if type(module) is not nn.Linear and not conv1d:
            raise TypeError(
                f"module: got {type(module).__qualname__}, expected torch.nn.Linear or Hugging "
                "Face's Conv1D itself (a subclass's own forward would be lost)"
            )
        first, second = cast(Tensor, module.weight).shape
        sizes = (first, second) if conv1d else (second, first)
        kept = {"in_features": sizes[0], "out_features": sizes[1], "fan_in_fan_out": conv1d}
        return cls._with_sizes_of({**kept, "bias": module.bias is not None}, options)

    def reset_parameters(self) -> None:
        """Draws the base weight like ``nn.Linear``, then the factors."""
        stored_transposed = getattr(self, "fan_in_fan_out", False)
        if stored_transposed:
            self.weight.data = self.weight.data.t()
        super().reset_parameters()
        if stored_transposed:
            self.weight.data = self.weight.data.t()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of shape (..., in_features) to (..., out_features)."""
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        if self._uses_base_only():
            return F.linear(x, weight, self._merged_bias())
        p, training = active_dropout(self.lora_dropout)
        return functional.block_lora_linear(
            x,
            weight,
            self.lora_A,
            self.lora_B,
            scaling=self.scaling,
            blocks=self.blocks,
            bias=self.bias,
            lora_bias=getattr(self, "lora_bias", None),
            p=p,
            training=training,
            backend=self.backend,
        )

    def _acts_as_plain(self) -> bool:
        return super()._acts_as_plain() and not self.fan_in_fan_out

    def _merged_bias(self) -> Tensor | None:
        lora_bias = getattr(self, "lora_bias", None)
        if lora_bias is None:
            return self.bias
        dtype = self.weight.dtype
        return functional.add_lora_bias(self.bias, lora_bias, self.scaling, self.blocks, dtype)

    def _merge_terms(self, weight: Tensor, lora: Mapping[str, Tensor]) -> list[Term]:
        A, B = lora["lora_A"], lora["lora_B"]
        checks.block_factors(A, B, self.blocks, self.in_features)
        out_first = weight.t() if self.fan_in_fan_out else weight
        terms = []
        for g, (A_g, B_g) in enumerate(self.blocks.factors(A, B)):
            # (width, K) of each repeat of the pattern, beside the rows of B that adapt it
            parts = self.blocks.output(out_first.t(), g).permute(1, 2, 0)
            for part, rows in zip(parts, B_g.chunk(len(parts)), strict=True):
                if self.fan_in_fan_out:
                    terms.append(Term(part.t(), A_g.t(), rows.t()))
                else:
                    terms.append(Term(part, rows, A_g))
        return terms

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, {self._lora_repr()}"
        return text + ", fan_in_fan_out=True" if self.fan_in_fan_out else text


class Linear(BlockLinear):
    """``nn.Linear`` with a low-rank update; a drop-in for ``loralib.Linear``.

    ``y = x Wᵀ + bias + scaling * dropout(x) Aᵀ Bᵀ``, with the base weight frozen.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        r: Rank; 0 gives a plain, trainable ``nn.Linear``.
        lora_alpha: ``scaling = lora_alpha / r``.
        lora_dropout: Dropout probability of the LoRA branch's input.
        fan_in_fan_out: The weight is stored as (in_features, out_features).
        merge_weights: ``eval()`` merges the update into the weight, ``train()`` takes it out again.
        use_rslora: ``scaling = lora_alpha / sqrt(r)``.
        lora_bias: Adds a trainable bias to the up factor, scaled like it.
        init_lora_weights: True (A Kaiming uniform, B zero), "gaussian" (A normal with standard
            deviation 1 / r, B zero) or False (neither zero).
        lora_dtype: Dtype of the factors; None: that of the weight. float32 over a 16-bit weight is
            the usual mixed precision; any other dtype than the weight's takes autocast to train.
        backend: "auto", or a name of :func:`fastlora.backends.available`.
        **kwargs: ``bias``, ``device`` and ``dtype`` of ``nn.Linear``.

    Raises:
        ValueError, TypeError: an option is wrong; nothing was built.

    Shape:
        weight (out, in), or (in, out) with ``fan_in_fan_out``; lora_A (r, in); lora_B (out, r);
        lora_bias (out).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        use_rslora: bool = False,
        lora_bias: bool = False,
        init_lora_weights: bool | str = True,
        lora_dtype: Any = None,
        backend: str = "auto",
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
            backend,
        )
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        self._init_lora(options)
        self._init_blocks(Blocks.single(out_features), fan_in_fan_out, lora_bias)

    @classmethod
    def from_linear(cls, module: nn.Module, r: int, **options: Any) -> "Linear":
        """A LoRA layer over an existing one, whose weight and bias it shares.

        While the layer is merged, which ``eval()`` does by default, so is the weight of ``module``.

        Args:
            module: ``nn.Linear``, or Hugging Face's ``Conv1D`` (weight stored as (in, out)).
            r: Rank.
            **options: As for the class, but for the sizes, ``fan_in_fan_out`` and ``bias``.

        Raises:
            TypeError: another kind of module.
        """
        return cls.like(module, r=r, **options).adopt(module)


def is_hf_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``, the linear layer of GPT-2 (weight (in, out))."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")
