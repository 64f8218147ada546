"""The LoRA layers, under loralib's names."""

from fastlora.layers.base import LoRALayer
from fastlora.layers.conv import Conv1d, Conv2d, Conv3d, ConvLoRA
from fastlora.layers.embedding import Embedding
from fastlora.layers.linear import Linear
from fastlora.layers.merged_linear import MergedLinear

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
]
