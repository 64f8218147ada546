"""``inject``: LoRA layers in the place of a model's own, with a report of what was done and why."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.utils.parametrize
from torch import nn

from fastlora import checks
from fastlora.layers import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoRALayer, MergedLinear
from fastlora.layers.linear import is_hf_conv1d
from fastlora.models import flag_shared_weights

ALL_LINEAR = "all-linear"

_REPLACEABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Report:
    """What :func:`inject` did.

    Attributes:
        replaced: Name of each layer that was replaced, and what stands there now.
        skipped: Name of each targeted module that was not, and why.
        shared: Names of layers whose weight another module holds too; they are never merged.
        trainable: Number of elements of all factors added.
        total: Number of elements of all the model's parameters, factors included.
    """

    replaced: dict[str, str]
    skipped: dict[str, str]
    shared: list[str]
    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        lines = [
            f"{len(self.replaced)} layers replaced, {len(self.skipped)} skipped; "
            f"{self.trainable:,} of {self.total:,} parameters in factors ({share:.3f} %)"
        ]
        lines += [f"  + {name}: {what}" for name, what in self.replaced.items()]
        lines += [f"  - {name}: {why}" for name, why in self.skipped.items()]
        lines += [
            f"  ! {name}: weight shared with another module, never merged" for name in self.shared
        ]
        return "\n".join(lines)


def inject(
    model: nn.Module,
    target_modules: str | Sequence[str],
    r: int = 8,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    *,
    exclude_modules: str | Sequence[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    merge_weights: bool = True,
    enable_lora: Sequence[bool] | None = None,
    out_splits: Sequence[int] | None = None,
    interleave: int = 1,
    factorization: str = "locon",
    use_rslora: bool = False,
    lora_bias: bool = False,
    init_lora_weights: bool | str = True,
    lora_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Report:
    """Replaces layers of ``model`` by LoRA layers in place; they share the base parameters.

    Linear layers (also Hugging Face's ``Conv1D``), embeddings and convolutions are replaced; their
    base weights are frozen, the rest of the model is left as it is
    (:func:`fastlora.mark_only_lora_as_trainable` freezes it).

    Args:
        model: Any module that holds others, changed in place.
        target_modules: Names, each of which selects the modules it is or that end in ``.name``; or
            one regular expression for whole names; or "all-linear", every linear layer but the
            output head (``model.get_output_embeddings()``, where there is one).
        r: Rank.
        lora_alpha: ``scaling = lora_alpha / r``; None: the rank of the layer.
        lora_dropout: Dropout probability of the LoRA branch's input.
        exclude_modules: What not to take, like ``target_modules``.
        rank_pattern: Ranks of some layers, by a regular expression for the end of the name.
        alpha_pattern: ``lora_alpha`` of some layers, likewise.
        merge_weights: As for the layers.
        enable_lora: Makes the linear layers :class:`fastlora.MergedLinear`, with these blocks.
        out_splits: Sizes of these blocks.
        interleave: Layout of these blocks.
        factorization: Of convolutions: "locon", "tucker" or "loralib".
        use_rslora: As for the layers.
        lora_bias: As for the layers (embeddings have none).
        init_lora_weights: As for the layers.
        lora_dtype: Dtype of the factors; None: that of each weight.
        backend: As for the layers.

    Returns:
        What was replaced and what was not, and why.

    Raises:
        ValueError: a target, exclusion or pattern that matches nothing, targets that cannot be
            replaced, or a wrong option; the model is as it was.
        TypeError: an option of a wrong type; the model is as it was.
    """
    for name, rank in {"r": r, **(rank_pattern or {})}.items():
        checks.rank(name, rank)
        if rank == 0:
            raise ValueError(f"{name}: got rank 0, expected 1 or more")
    if enable_lora is not None and not any(checks.enabled(enable_lora)):
        raise ValueError(f"enable_lora: got {enable_lora}, expected a block to adapt")
    ranks = _patterns("rank_pattern", rank_pattern)
    alphas = _patterns("alpha_pattern", alpha_pattern)
    if enable_lora is None and (out_splits is not None or interleave != 1):
        raise ValueError("out_splits, interleave: got a layout, expected enable_lora with it")
    common: dict[str, Any] = {
        "merge_weights": merge_weights,
        "use_rslora": use_rslora,
        "init_lora_weights": init_lora_weights,
        "lora_dtype": lora_dtype,
    }
    branch: dict[str, Any] = {**common, "lora_dropout": lora_dropout, "lora_bias": lora_bias}
    linear: dict[str, Any] = {**branch, "backend": backend}
    blocks: dict[str, Any] = {
        "enable_lora": enable_lora,
        "out_splits": out_splits,
        "interleave": interleave,
    }
    conv: dict[str, Any] = {**branch, "factorization": factorization}
    makers: dict[type[nn.Module], Callable[..., LoRALayer]] = {
        nn.Linear: partial(Linear.like, **linear)
        if enable_lora is None
        else partial(MergedLinear.like, **linear, **blocks),
        nn.Embedding: partial(Embedding.like, **common),
        nn.Conv1d: partial(Conv1d.like, **conv),
        nn.Conv2d: partial(Conv2d.like, **conv),
        nn.Conv3d: partial(Conv3d.like, **conv),
    }

    if type(model) in _REPLACEABLE or is_hf_conv1d(model):
        raise ValueError(
            f"model: got a {type(model).__name__} itself, which cannot be replaced in place; use "
            "from_linear, from_embedding or from_conv of the LoRA layer"
        )
    chosen = _choose(model, target_modules, exclude_modules)
    _check_used("rank_pattern", rank_pattern, ranks, chosen)
    _check_used("alpha_pattern", alpha_pattern, alphas, chosen)
    skipped = {name: why for name, module in chosen.items() if (why := _why_not(module))}
    if len(skipped) == len(chosen):
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
        raise ValueError(
            f"target_modules: got {target_modules!r}, which selects nothing that can be replaced "
            f"({reasons}); expected linear layers, embeddings or convolutions"
        )
    # everything that can fail happens on the meta device, before the model is touched
    layers: dict[nn.Module, LoRALayer] = {}
    for name, module in chosen.items():
        if name not in skipped and module not in layers:
            rank = _by_pattern(ranks, name, r)
            alpha = _by_pattern(alphas, name, rank if lora_alpha is None else lora_alpha)
            make = makers[nn.Linear if is_hf_conv1d(module) else type(module)]
            layers[module] = make(module, r=rank, lora_alpha=alpha)
    # but for memory, and warnings that are errors
    with ExitStack() as undo:
        for module, layer in layers.items():
            weight = module.weight
            undo.callback(setattr, weight, "requires_grad", weight.requires_grad)
            layer.adopt(module)
        replaced = {}
        for name, module in chosen.items():
            if name not in skipped:
                layer = layers[module]
                parent, _, leaf = name.rpartition(".")
                owner = model.get_submodule(parent)
                undo.callback(setattr, owner, leaf, module)
                setattr(owner, leaf, layer)
                sizes = "x".join(str(n) for n in layer.weight.shape)
                replaced[name] = (
                    f"{type(layer).__name__} {sizes}, r={layer.r}, scaling={layer.scaling:g}"
                )
        trainable = sum(p.numel() for m in layers.values() for p in m.lora_parameters().values())
        total = sum(p.numel() for p in model.parameters())
        report = Report(replaced, skipped, flag_shared_weights(model), trainable, total)
        undo.pop_all()
    return report


def _choose(
    model: nn.Module, targets: str | Sequence[str], excluded: str | Sequence[str]
) -> dict[str, nn.Module]:
    """The modules that ``targets`` select, by name; nothing inside a LoRA layer."""
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    inside = tuple(f"{name}." for name, m in modules.items() if isinstance(m, LoRALayer))
    modules = {name: m for name, m in modules.items() if not name.startswith(inside)}
    exclude = _matcher("exclude_modules", excluded)
    _check_known("exclude_modules", excluded, modules)
    if targets == ALL_LINEAR:
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        linear = {
            name: m
            for name, m in modules.items()
            if m is not head and (type(m) is nn.Linear or is_hf_conv1d(m))
        }
        if not linear:
            raise ValueError(
                f"target_modules: got {ALL_LINEAR!r}, but the model has no linear layer"
            )
        return {name: m for name, m in linear.items() if not exclude(name)}
    if not isinstance(targets, str) and not targets:
        raise ValueError("target_modules: got an empty list, expected at least one name")
    match = _matcher("target_modules", targets)
    _check_known("target_modules", targets, modules)
    return {name: m for name, m in modules.items() if match(name) and not exclude(name)}


def _check_known(argument: str, targets: str | Sequence[str], names: Iterable[str]) -> None:
    """Raises ValueError where a target matches none of the names."""
    for target in [targets] if isinstance(targets, str) else targets:
        match = _matcher(argument, target if isinstance(targets, str) else [target])
        if not any(map(match, names)):
            leaves = sorted({name.rpartition(".")[2] for name in names})
            close = difflib.get_close_matches(target.rpartition(".")[2], leaves) or leaves[:8]
            raise ValueError(
                f"{argument}: got {target!r}, which no module of the model matches; "
                f"names that it has: {', '.join(close)}"
            )


def _check_used(
    argument: str,
    given: Mapping[str, Any] | None,
    patterns: Iterable[re.Pattern[str]],
    names: Iterable[str],
) -> None:
    """Raises ValueError where a pattern, which is there as it was given too, matches no name."""
    for text, pattern in zip(given or {}, patterns, strict=True):
        if not any(map(pattern.fullmatch, names)):
            raise ValueError(
                f"{argument}: got {text!r}, which matches none of the modules selected"
            )


def _matcher(argument: str, targets: str | Sequence[str]) -> Callable[[str], bool]:
    """Whether a name is selected: by a regular expression, or a list of names or their ends."""
    if isinstance(targets, str):
        pattern = _compile(argument, targets)
        return lambda name: pattern.fullmatch(name) is not None
    ends = tuple(f".{t}" for t in targets)
    exact = set(targets)
    return lambda name: name in exact or name.endswith(ends)


def _compile(argument: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{argument}: got {pattern!r}, expected a regular expression ({error})"
        ) from None


def _why_not(module: nn.Module) -> str | None:
    """Why a module cannot be replaced; None where it can."""
    if isinstance(module, LoRALayer):
        return "is a LoRA layer already"
    if type(module) not in _REPLACEABLE and not is_hf_conv1d(module):
        base = next((c.__name__ for c in _REPLACEABLE if isinstance(module, c)), None)
        if base is not None:
            return (
                f"{type(module).__name__} is a subclass of {base}, whose own forward would be lost"
            )
        return f"{type(module).__name__} has no LoRA layer"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "has parametrized weights"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "has hooks, which would be lost"
    if "forward" in module.__dict__:
        return "has a forward of its own, which would be lost"
    weight = module.weight
    if type(weight) is not nn.Parameter or weight.dtype not in checks.FLOAT_DTYPES:
        return f"its weight is a {type(weight).__name__} of {weight.dtype}"
    if getattr(module, "max_norm", None) is not None:
        return "has max_norm, which rewrites the table at every lookup"
    return None


def _by_pattern(patterns: Mapping[re.Pattern[str], Any], name: str, default: Any) -> Any:
    return next((value for p, value in patterns.items() if p.fullmatch(name)), default)


def _patterns(argument: str, values: Mapping[str, Any] | None) -> dict[re.Pattern[str], Any]:
    """Values by patterns for the end of a name."""
    for pattern in values or {}:
        _compile(argument, pattern)
    return {re.compile(rf"(.*\.)?({p})"): value for p, value in (values or {}).items()}
