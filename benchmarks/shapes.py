"""The layers that are measured: linear layers of real models, at real token counts."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

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
        dtype: Of the input, the weight and the factors.
    """

    M: int
    K: int
    N: int
    r: int
    p: float
    enable_lora: tuple[bool, ...] | None = None
    dtype: torch.dtype = torch.float32

    @property
    def label(self) -> str:
        """``M x K -> N``, with the adapted blocks of a merged layer."""
        blocks = "".join("FT"[on] for on in self.enable_lora or ())
        return f"{self.M}×{self.K}→{self.N}" + (f" [{blocks}]" if blocks else "")


DROPOUT = (0.0, 0.1)
# 768: BERT-base, GPT-2, ViT-B; 1024 -> 4096: the MLP of the -large / -medium models
CPU_LAYERS = ((768, 768), (768, 3072), (1024, 4096))
CPU_TOKENS = (32, 512, 2048, 8192)
# GPT-2's c_attn, the layer that MergedLinear was written for: q and v adapted, k not
QKV = (768, 2304, (True, False, True))
# Llama-3-8B attention and MLP, Llama-2-13B attention, Llama-3-70B attention
GPU_LAYERS = ((8192, 4096, 4096), (8192, 4096, 14336), (8192, 5120, 5120), (4096, 8192, 8192))
GPU_QKV = (4096, 12288, (True, False, True))


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
    """The GPU grid in bfloat16; ``quick`` keeps dropout 0.1 only."""
    dropout = DROPOUT[1:] if quick else DROPOUT
    for (M, K, N), p in product(GPU_LAYERS, dropout):
        yield Shape(M, K, N, 16, p, dtype=torch.bfloat16)
    K, N, enable_lora = GPU_QKV
    for p in dropout:
        yield Shape(8192, K, N, 16, p, enable_lora, dtype=torch.bfloat16)


def grid(device: torch.device, quick: bool) -> list[Shape]:
    """The shapes for ``device``."""
    return list(gpu_shapes(quick) if device.type == "cuda" else cpu_shapes(quick))
