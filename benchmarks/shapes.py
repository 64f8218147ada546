"""The layers that are measured: linear layers of real models, at real token counts."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """One adapted linear layer.

    Attributes:
        M: Tokens, the flattened batch.
        K: ``in_features``.
        N: ``out_features``.
        r: Rank.
        p: Dropout probability of the LoRA branch.
        enable_lora: Blocks of a ``MergedLinear`` that are adapted; ``None`` for a ``Linear``.
        dtype: Of the input and the weight.
        factor_dtype: Of the factors; ``None`` for ``dtype``.
    """

    M: int
    K: int
    N: int
    r: int
    p: float
    enable_lora: tuple[bool, ...] | None = None
    dtype: torch.dtype = torch.float32
    factor_dtype: torch.dtype | None = None

    @property
    def label(self) -> str:
        """``M x K -> N``, with the adapted blocks of a merged layer and what its factors are."""
        blocks = "".join("FT"[on] for on in self.enable_lora or ())
        mixed = " fp32 A, B" if self.factors != self.dtype else ""
        return f"{self.M}×{self.K}→{self.N}" + (f" [{blocks}]" if blocks else "") + mixed

    def as_json(self) -> dict[str, Any]:
        """Plain values only; the factors' dtype where it differs."""
        values = asdict(self)
        for name in ("dtype", "factor_dtype"):
            if values[name] is None:
                del values[name]
            else:
                values[name] = str(values[name]).removeprefix("torch.")
        return values

    @property
    def factors(self) -> torch.dtype:
        """The dtype of the factors."""
        return self.factor_dtype or self.dtype


DROPOUT = (0.0, 0.1)
# 768: BERT-base, GPT-2, ViT-B; 1024 -> 4096: the MLP of the -large / -medium models
CPU_LAYERS = ((768, 768), (768, 3072), (1024, 4096))
CPU_TOKENS = (32, 512, 2048, 8192)
# GPT-2's c_attn, the layer that MergedLinear was written for: q and v adapted, k not
QKV = (768, 2304, (True, False, True))
# Llama-3-8B attention and MLP, Llama-2-13B attention, Llama-3-70B attention, BERT-base
GPU_LAYERS = (
    (8192, 4096, 4096),
    (8192, 4096, 14336),
    (8192, 5120, 5120),
    (4096, 8192, 8192),
    (2048, 768, 768),
)
GPU_RANKS = (8, 16, 64)
# a fused qkv of Llama-2-7B's size, and GPT-2's
GPU_QKV = ((8192, 4096, 12288), (2048, 768, 2304))


def cpu_shapes(quick: bool) -> Iterator[Shape]:
    """The CPU grid; ``quick`` keeps rank 8, the 768-wide layers and up to 2048 tokens."""
    layers, tokens, ranks = CPU_LAYERS, CPU_TOKENS, (8, 16)
    if quick:
        layers, tokens, ranks = layers[:2], tokens[:3], ranks[:1]
    for (K, N), M, r, p in product(layers, tokens, ranks, DROPOUT):
        yield Shape(M, K, N, r, p)
    K, N, enable_lora = QKV
    for M, p in product(tokens, DROPOUT):
        yield Shape(M, K, N, 8, p, enable_lora)


def gpu_shapes(quick: bool) -> Iterator[Shape]:
    """The GPU grid in bfloat16; ``quick`` keeps rank 16, dropout 0.1 and three layers.

    What matters most comes first: a run can be out of time before its end.
    """
    bf16, blocks, usual = torch.bfloat16, QKV[2], 16
    layers, ranks, dropout, qkv = GPU_LAYERS, GPU_RANKS, DROPOUT[::-1], GPU_QKV
    if quick:
        layers, ranks, dropout, qkv = (layers[0], layers[-1]), (usual,), dropout[:1], qkv[:1]
    first, *others = layers
    for (M, K, N), p in product([first], dropout):
        yield Shape(M, K, N, usual, p, dtype=bf16)
    for (M, K, N), p in product(qkv, dropout):
        yield Shape(M, K, N, usual, p, blocks, dtype=bf16)
    for (M, K, N), p in product(others, dropout):
        yield Shape(M, K, N, usual, p, dtype=bf16)
    # PEFT's default
    M, K, N = first
    yield Shape(M, K, N, usual, DROPOUT[1], dtype=bf16, factor_dtype=torch.float32)
    for r, (M, K, N), p in product(ranks, layers, dropout):
        if r != usual:
            yield Shape(M, K, N, r, p, dtype=bf16)


def grid(device: torch.device, quick: bool) -> list[Shape]:
    """The shapes for ``device``."""
    return list(gpu_shapes(quick) if device.type == "cuda" else cpu_shapes(quick))
