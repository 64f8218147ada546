"""Fused LoRA layers for PyTorch: a drop-in for loralib that trains faster in less memory.

>>> import fastlora as lora
>>> layer = lora.Linear(768, 768, r=8, lora_alpha=16)
"""

from fastlora import adapters, flops, functional, utils
from fastlora.backends import use_backend
from fastlora.injection import Report, inject
from fastlora.layers import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvLoRA,
    Embedding,
    Linear,
    LoRALayer,
    MergedLinear,
)
from fastlora.merge import MergeError
from fastlora.models import (
    explain,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merged,
    merged_state_dict,
    switch,
)
from fastlora.version import __version__

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergeError",
    "MergedLinear",
    "Report",
    "__version__",
    "adapters",
    "explain",
    "flops",
    "functional",
    "inject",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merged",
    "merged_state_dict",
    "switch",
    "use_backend",
    "utils",
]
