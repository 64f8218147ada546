"""The ways to fine-tune one model: loralib, PEFT, fastlora, everything, the head alone."""

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.finetune.tasks import Task

RANK, ALPHA, DROPOUT = 8, 16, 0.1
ADAPTERS = ("loralib", "PEFT", "fastlora")
FULL, HEAD = "full fine-tuning", "head only"


class MissingLibrary(RuntimeError):
    """A method whose library is not installed; the message says so."""


def _replace(model: nn.Module, targets: tuple[str, ...], make: Callable[..., nn.Module]) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(module))


def _loralib(model: nn.Module, targets: tuple[str, ...], dropout: float) -> nn.Module:
    try:
        import loralib
    except ImportError as error:
        raise MissingLibrary("loralib is not installed") from error

    def adapted(base: nn.Linear) -> nn.Module:
        layer = loralib.Linear(
            base.in_features,
            base.out_features,
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=dropout,
            bias=base.bias is not None,
            device=base.weight.device,
        )
        layer.load_state_dict(base.state_dict(), strict=False)
        return layer

    _replace(model, targets, adapted)
    loralib.mark_only_lora_as_trainable(model)
    return model


def _peft(model: nn.Module, targets: tuple[str, ...], dropout: float) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise MissingLibrary("peft is not installed") from error
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=list(targets)
    )
    return peft.get_peft_model(model, config)


def _fastlora(model: nn.Module, targets: tuple[str, ...], dropout: float) -> nn.Module:
    try:
        import fastlora
    except ImportError as error:
        raise MissingLibrary(f"not importable: {error}") from error
    fastlora.inject(
        model, target_modules=list(targets), r=RANK, lora_alpha=ALPHA, lora_dropout=dropout
    )
    fastlora.mark_only_lora_as_trainable(model)
    return model


BUILDERS = {"loralib": _loralib, "PEFT": _peft, "fastlora": _fastlora}


@torch.no_grad()
def _draw_factors(model: nn.Module) -> None:
    """Give every method the same A, layer by layer; B is zero in all of them."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.copy_(values)
        elif "lora_B" in name:
            parameter.zero_()


def in_head(name: str) -> bool:
    """Whether a parameter belongs to the new head, which every method trains."""
    return "head" in name.split(".")


def names(task: Task) -> list[str]:
    """The methods that make sense for a task, loralib (the baseline) first."""
    return [*ADAPTERS, FULL, *([HEAD] if task.head_learning_rate else [])]


def learning_rate(task: Task, method: str) -> float:
    """Of the backbone or its adapters; the head has the same one in all methods."""
    return {FULL: task.full_learning_rate, HEAD: 0.0}.get(method, task.adapter_learning_rate)


def build(task: Task, method: str, dropout: float = DROPOUT) -> nn.Module:
    """The task's model, ready to be trained with ``method``, in training mode.

    Raises:
        MissingLibrary: The method's library is not installed.
    """
    model = task.build()
    if method in BUILDERS:
        model = BUILDERS[method](model, task.targets, dropout)
        _draw_factors(model)
    elif method == HEAD:
        model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if in_head(name):
            parameter.requires_grad_(True)
    model.train()
    return model
