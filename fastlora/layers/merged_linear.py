"""``MergedLinear``: one weight that is several projections, each adapted or not."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastlora import checks
from fastlora.backends import reference
from fastlora.layers.base import Options
from fastlora.layers.linear import BlockLinear


class MergedLinear(BlockLinear):
    """A linear layer that holds several projections, say q, k and v; drop-in for loralib's.

    Each adapted block has its own factors; a block that is not adapted is the plain product, bit
    for bit. No ``ΔW`` is formed in forward or backward.

    Args:
        in_features: Size of the input.
        out_features: Size of the whole output.
        r: Rank of each adapted block; 0 gives a plain, trainable ``nn.Linear``.
        lora_alpha: ``scaling = lora_alpha / r``.
        lora_dropout: Dropout probability of the LoRA branch's input; one mask for all blocks.
        enable_lora: Which blocks are adapted.
        fan_in_fan_out: The weight is stored as (in_features, out_features).
        merge_weights: ``eval()`` merges the update into the weight, ``train()`` takes it out again.
        out_splits: Sizes of the blocks (grouped-query attention: ``[n_q, n_kv, n_kv]``); None:
            equal sizes.
        interleave: 1: each block is contiguous (``q | k | v``). H: the blocks alternate in H parts
            (``q0 k0 v0 | q1 k1 v1 | ...``), as where a fused qkv weight is laid out by head.
        use_rslora: ``scaling = lora_alpha / sqrt(r)``.
        lora_bias: Adds a trainable bias to the up factors, scaled like them.
        init_lora_weights: As for :class:`fastlora.Linear`.
        lora_dtype: As for :class:`fastlora.Linear`.
        backend: As for :class:`fastlora.Linear`.
        **kwargs: ``bias``, ``device`` and ``dtype`` of ``nn.Linear``.

    Raises:
        ValueError, TypeError: an option is wrong, or the blocks do not divide; nothing was built.

    Shape:
        weight (out, in), or (in, out) with ``fan_in_fan_out``; lora_A (G * r, in) for G adapted
        blocks; lora_B (sum of their sizes, r).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        out_splits: Sequence[int] | None = None,
        interleave: int = 1,
        use_rslora: bool = False,
        lora_bias: bool = False,
        init_lora_weights: bool | str = True,
        lora_dtype: Any = None,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        blocks = checks.blocks(out_features, enable_lora, out_splits, interleave)
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
        self._init_blocks(blocks, fan_in_fan_out, lora_bias)
        self.enable_lora = list(blocks.enabled)

    @classmethod
    def from_linear(
        cls, module: nn.Module, r: int, enable_lora: Sequence[bool], **options: Any
    ) -> "MergedLinear":
        """A LoRA layer over an existing one, whose weight and bias it shares.

        Args:
            module: ``nn.Linear``, or Hugging Face's ``Conv1D`` (weight stored as (in, out)).
            r: Rank of each adapted block.
            enable_lora: Which blocks are adapted.
            **options: As for the class, but for the sizes, ``fan_in_fan_out`` and ``bias``.

        Raises:
            TypeError: another kind of module.
        """
        return cls.like(module, r=r, enable_lora=enable_lora, **options).adopt(module)

    def merge_AB(self) -> Tensor:
        """``ΔW / scaling`` in the shape of the weight, as in loralib; factors get gradients."""
        delta = reference.delta(self.lora_A, self.lora_B, 1.0, self.blocks)
        return delta.t() if self.fan_in_fan_out else delta

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, enable_lora={self.enable_lora}"
        if len(set(self.blocks.splits)) > 1:
            text += f", out_splits={list(self.blocks.splits)}"
        return (
            text if self.blocks.interleave == 1 else f"{text}, interleave={self.blocks.interleave}"
        )
