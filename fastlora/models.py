"""A whole model's adapters: which parameters train, what a checkpoint holds, merged or not."""

import warnings
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from fastlora import backends, checks, functional
from fastlora.dispatch import Case
from fastlora.layers import LoRALayer
from fastlora.layers.linear import BlockLinear

BIAS = ("none", "all", "lora_only")

# modules around others, whose name torch leaves out of a state_dict
_WRAPPERS = ("_checkpoint_wrapped_module",)


def saved_modules(
    model: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()``, but under the names that ``state_dict()`` has for them."""
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        yield ".".join(part for part in name.split(".") if part not in _WRAPPERS), module


def lora_layers(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, LoRALayer]]:
    """``(name, layer)`` of every layer that has factors, named as in ``state_dict()``."""
    for name, module in saved_modules(model, remove_duplicate):
        if isinstance(module, LoRALayer) and module.adapted:
            yield name, module


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Makes the factors trainable, and nothing else but the biases asked for.

    Args:
        model: Any module. Its factors are all parameters that are named ``lora_...``, as for
            loralib: also those of other libraries' layers.
        bias: "none"; "all": every bias of the model; "lora_only": those of the LoRA layers.

    Raises:
        ValueError: another ``bias``; nothing was changed.
    """
    wanted = _adapter(model, bias)
    if not _adapter(model, "none"):
        warnings.warn(
            "mark_only_lora_as_trainable: got a model without factors, expected LoRA layers, as "
            "inject() makes them",
            stacklevel=2,
        )
    for parameter in model.parameters():
        parameter.requires_grad = False
    for parameter in wanted.values():
        parameter.requires_grad = True
    flag_shared_weights(model)


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """The factors by name, and the biases asked for: a checkpoint of the adapter alone.

    Args:
        model: Any module.
        bias: As for :func:`mark_only_lora_as_trainable`, like what counts as a factor.

    Returns:
        The model's own tensors, detached, under the keys of loralib and of ``state_dict()``.

    Raises:
        ValueError: another ``bias``.
    """
    return {name: p.detach() for name, p in _adapter(model, bias).items()}


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block every layer is merged; afterwards its weight is exactly what it was.

    Also where the block raises. Layers that were merged already stay so; a layer that cannot be
    merged, because its weight is shared with another module, say, is left as it is, with a warning.
    ``state_dict()`` holds the base weights here too: see :func:`merged_state_dict`.

    Raises:
        MergeError: a layer's factors hold NaN or Inf, or overflow; no layer is left merged.
    """
    flag_shared_weights(model, warn=False)
    with ExitStack() as restore:
        for name, layer in lora_layers(model):
            if layer.merged:
                continue
            if reason := layer.why_not_merged():
                warnings.warn(f"{name}: is not merged: {reason}", stacklevel=3)
                continue
            restore.callback(layer.unmerge)
            layer.merge()
        yield model


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the model as if it had no factors: their updates are in the weights.

    For a server, or a model of plain layers; the model itself is not touched, merged or not. Where
    the weight of a LoRA layer is that of another module too, the two are not the same any more, and
    a warning names them.

    Returns:
        New tensors for the weights of LoRA layers, and for biases that ``lora_bias`` is added to;
        the model's own, detached, for all else.

    Raises:
        MergeError: a layer's factors hold NaN or Inf, or overflow.
        ValueError: a weight is distributed, or has no data.
    """
    for name, others in _shared_weights(model).items():
        warnings.warn(
            f"{name}: its weight, which is also {others}, holds the update here, and differs from "
            "that; a model in which the two are tied cannot hold both",
            stacklevel=2,
        )
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, layer in lora_layers(model, remove_duplicate=False):
        prefix = f"{name}." if name else ""
        for leaf, t in layer.merged_parameters().items():
            state[prefix + leaf] = t
        for leaf in layer.lora_parameters():
            del state[prefix + leaf]
    return state


def switch(model: nn.Module, adapter: Mapping[str, Tensor], scaling: float | None = None) -> None:
    """Puts another adapter in the place of the present one; merged weights change in one pass.

    Args:
        model: A model with LoRA layers.
        adapter: The factors of every LoRA layer, as :func:`lora_state_dict` names them.
        scaling: Scaling of the new adapter in every layer; None keeps each layer's own.

    Raises:
        KeyError: factors of a layer are missing, or there is no such layer, of fastlora's.
        ValueError: a factor's shape is wrong.
        MergeError: NaN or Inf in the factors, or overflow.

    Whatever is raised, the model is as it was.
    """
    layers = dict(lora_layers(model))
    per_layer: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, factor in adapter.items():
        name, _, leaf = key.rpartition(".")
        per_layer[name][leaf] = factor
    if unknown := sorted(per_layer.keys() - layers.keys()):
        raise KeyError(
            f"adapter: got factors for {unknown[0]!r}, which is no fastlora layer of this model"
        )
    for name, layer in layers.items():
        try:
            layer.check_factors(per_layer[name])
        except (KeyError, ValueError) as error:
            raise type(error)(f"{name}: {error.args[0]}") from None
    old = {key: t.clone() for key, t in lora_state_dict(model).items()}
    with ExitStack() as undo:
        for name, layer in layers.items():
            before = {leaf: old[f"{name}.{leaf}" if name else leaf] for leaf in per_layer[name]}
            undo.callback(layer.switch, before, layer.scaling)
            layer.switch(per_layer[name], scaling)
        undo.pop_all()


def flag_shared_weights(model: nn.Module, warn: bool = True) -> list[str]:
    """Finds LoRA layers whose weight another module holds too, such as a tied output head.

    Merging would change the other module's output, so these layers stay unmerged (their update is
    added in ``forward`` as in training).

    Args:
        model: Any module.
        warn: Say so of layers that were not known to be such.

    Returns:
        The names of these layers.
    """
    shared = _shared_weights(model)
    for name, layer in lora_layers(model):
        if warn and name in shared and not layer.weight_is_shared:
            warnings.warn(
                f"{name}: its weight is also {shared[name]}; the layer will not be merged, because "
                "that would change the other module's output",
                stacklevel=3,
            )
        layer.weight_is_shared = name in shared
    return list(shared)


def _shared_weights(model: nn.Module) -> dict[str, str]:
    """Of each LoRA layer whose weight lies where other parameters do, their names."""
    holders: dict[Hashable, list[tuple[str, int, int]]] = defaultdict(list)
    for name, module in saved_modules(model):
        for leaf, parameter in module.named_parameters(recurse=False):
            memory, first, end = _place(parameter)
            holders[memory].append((f"{name}.{leaf}" if name else leaf, first, end))
    shared = {}
    for name, layer in lora_layers(model):
        own = f"{name}.weight" if name else "weight"
        memory, first, end = _place(layer.weight)
        names = [n for n, start, stop in holders[memory] if start < end and first < stop]
        if others := [n for n in names if n != own]:
            shared[name] = ", ".join(others)
    return shared


def _place(t: Tensor) -> tuple[Hashable, int, int]:
    """The memory that a parameter lies in, and from where to where; else the parameter itself."""
    if t.is_meta or type(t.data) is not Tensor or not t.numel():
        return id(t), 0, 1
    last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    first, end = t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
    return (t.device, t.untyped_storage().data_ptr()), first, end


def explain(layer: LoRALayer, x: Tensor | None = None) -> str:
    """What a forward of ``layer`` would do, and why, in words.

    Args:
        layer: A LoRA layer.
        x: The input it would get; None leaves out what depends on it.
    """
    if not isinstance(layer, LoRALayer):
        raise TypeError(f"layer: got {type(layer).__name__}, expected a fastlora layer")
    lines = [f"{type(layer).__name__}({layer.extra_repr()})"]
    if not layer.adapted:
        lines.append("path: the plain layer (no factors)")
    elif layer.merged and layer._holds_update():
        lines.append(
            f"path: the plain layer (merged; {layer.merge_nbytes / layer.weight.numel():.2f} bytes "
            "a weight are kept to undo that)"
        )
    else:
        device = (layer.weight if x is None else x).device.type
        dtype = layer.weight.dtype if x is None else functional.compute_dtype(x)
        p = getattr(layer.lora_dropout, "p", 0.0) if layer.lora_dropout.training else 0.0
        if isinstance(layer, BlockLinear):
            case = _case(layer, x, dtype, p > 0)
            backend = backends.select(layer.backend, device, dtype, case)
            reason = backends.why(layer.backend, device, dtype, case)
        else:
            backend, reason = backends.select("reference"), "such a layer has no other path"
        lines.append(f"path: {backend.name} ({backend.description()})")
        lines.append(f"chosen: {reason}")
        for name, missing in backends.available(device).items():
            not_alone = backends.passed_over(name, device)
            if missing is None and not_alone and name != backend.name:
                missing = f"usable by name: {not_alone}"
            lines.append(f"  {name}: {missing or 'usable'}")
        lines.append(f"dropout: {f'p={p}' if p else 'inactive'}")
        if x is not None:
            autocast = checks.under_autocast(x.device)
            lines.append(
                f"dtypes: {dtype} input and weight{' (autocast)' if autocast else ''}, "
                f"{layer.lora_A.dtype} factors, on {x.device}"
            )
    if layer.adapted and (no_merge := layer.why_not_merged()):
        lines.append(f"merging: no, {no_merge}")
    return "\n".join(lines)


def _case(layer: BlockLinear, x: Tensor | None, dtype: torch.dtype, dropout: bool) -> Case:
    """What a forward of ``layer`` asks the tables for."""
    M = None if x is None else x.numel() // layer.in_features
    factors = functional.for_input(layer.lora_B, dtype).dtype
    return Case(M, layer.in_features, layer.out_features, layer.r, dtype, factors, dropout)


def _adapter(model: nn.Module, bias: str) -> dict[str, nn.Parameter]:
    """The factors, and the biases asked for, by the names that ``state_dict()`` has for them."""
    if bias not in BIAS:
        raise ValueError(f"bias: got {bias!r}, expected one of {', '.join(map(repr, BIAS))}")
    found: dict[str, nn.Parameter] = {}
    for name, module in saved_modules(model, remove_duplicate=False):
        own = {n: p for n, p in module._parameters.items() if p is not None}
        # what a parametrized factor is computed from
        inside = "parametrizations.lora_" in name
        factors = {leaf for leaf in own if inside or leaf.startswith("lora_")}
        wanted = set(factors)
        adapted = factors or (isinstance(module, LoRALayer) and module.adapted)
        if bias == "all" or (bias == "lora_only" and adapted):
            wanted.update(filter(_is_bias, own))
        found.update((f"{name}.{n}" if name else n, p) for n, p in own.items() if n in wanted)
    return found


def _is_bias(leaf: str) -> bool:
    # "bias", "in_proj_bias", "bias_ih_l0"; not a module called relative_attention_bias
    return leaf == "bias" or leaf.endswith("_bias") or leaf.startswith("bias_")
