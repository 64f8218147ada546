"""loralib's checkpoints, both ways, checked as a whole before anything is copied."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastlora import merge as merging
from fastlora.adapters.sharded import placed_like
from fastlora.layers import ConvLoRA, LoRALayer
from fastlora.layers.conv import use_plain_names
from fastlora.models import flag_shared_weights, lora_layers, lora_state_dict, saved_modules


def load_state_dict(
    model: nn.Module, state: Mapping[str, Any], *, assume_merged: bool = False
) -> None:
    """Loads a loralib checkpoint: the adapter alone, or with base weights, in any of its layouts.

    Of a model that is sharded over processes, every one of them has to call this.

    Takes what ``loralib.lora_state_dict`` or a whole model's ``state_dict`` gives, also inside
    ``{"model_state_dict": ...}``; a convolution's kernel under ``conv.weight`` (loralib 0.1.2),
    under both names (its later sources) or under ``weight`` (a plain convolution). The model may be
    in any mode, merged or not.

    Args:
        model: A model with LoRA layers.
        state: Tensors by name. All factors that ``lora_state_dict(model)`` has; anything else is
            optional.
        assume_merged: The base weights of ``state`` already hold the update, as in a checkpoint
            that loralib saved in eval mode; it is taken out again (to rounding).

    Raises:
        KeyError: factors are missing, or there is no place for an entry.
        ValueError: a shape is wrong, or a weight is this model's own with its update in it, and
            ``assume_merged`` is not set. Of another base, none can tell whether it holds an update.
        TypeError: an entry is not a tensor.

    Whatever is raised, the model is as it was.
    """
    flag_shared_weights(model)
    state = dict(state.get("model_state_dict", state))
    layers = dict(lora_layers(model))
    for prefix in _conv_prefixes(model):
        use_plain_names(state, prefix)
    own = model.state_dict()
    for key, t in state.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{key}: got {type(t).__name__}, expected a torch.Tensor")
        if key not in own:
            raise KeyError(f"{key}: the model has no such parameter")
        if t.shape != own[key].shape:
            got, expected = tuple(t.shape), tuple(own[key].shape)
            raise ValueError(f"{key}: got shape {got}, expected {expected}")
    if missing := [key for key in lora_state_dict(model) if key not in state]:
        raise KeyError(f"{missing[0]}: is missing from the checkpoint")
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        lora = {leaf: state[prefix + leaf] for leaf in layer.lora_parameters()}
        if prefix + "weight" not in state:
            continue
        weight = state[prefix + "weight"]
        if assume_merged:
            state[prefix + "weight"] = _without_delta(layer, weight, lora)
        elif layer.looks_merged(weight, lora):
            raise ValueError(
                f"{prefix}weight: already holds the update of its factors (a checkpoint saved in "
                "eval mode), which would count twice; expected the base, or assume_merged=True"
            )
    before = {key: own[key].clone() for key in state}
    state = {key: placed_like(t, own[key]) for key, t in state.items()}
    merged = [layer for layer in layers.values() if layer.merged]
    try:
        model.load_state_dict(state, strict=False)
    except Exception:
        # what only merging can find out: NaN in a factor, an update that overflows the dtype
        model.load_state_dict(before, strict=False)
        for layer in merged:
            layer.merge()
        raise


def export_state_dict(
    model: nn.Module, *, conv_names: str = "0.1.2", adapter_only: bool = False
) -> dict[str, Tensor]:
    """The model's state under the names of loralib, whose layers it then can be loaded into.

    Args:
        model: A model with LoRA layers, merged or not: the weights are those before merging.
        conv_names: "0.1.2": a convolution's kernel is ``conv.weight``, as in the released loralib;
            "HEAD": at both ``weight`` and ``conv.weight``, as in its later sources.
        adapter_only: The factors alone.

    Raises:
        ValueError: another ``conv_names``.
    """
    if conv_names not in ("0.1.2", "HEAD"):
        raise ValueError(f"conv_names: got {conv_names!r}, expected '0.1.2' or 'HEAD'")
    state = dict(model.state_dict())
    for prefix in _conv_prefixes(model):
        for leaf in ("weight", "bias"):
            if prefix + leaf in state:
                state[f"{prefix}conv.{leaf}"] = state[prefix + leaf]
                if conv_names == "0.1.2":
                    del state[prefix + leaf]
    if adapter_only:
        factors = lora_state_dict(model).keys()
        state = {key: t for key, t in state.items() if key in factors}
    return state


def _conv_prefixes(model: nn.Module) -> list[str]:
    modules = saved_modules(model, remove_duplicate=False)
    return [f"{name}." if name else "" for name, m in modules if isinstance(m, ConvLoRA)]


def _without_delta(layer: LoRALayer, weight: Tensor, lora: Mapping[str, Tensor]) -> Tensor:
    pristine = weight.to(layer.weight.device, layer.weight.dtype, copy=True)
    lora = {leaf: t.to(pristine.device) for leaf, t in lora.items()}
    merging.add_delta(layer._merge_terms(pristine, lora), -float(layer.scaling))
    return pristine
