"""What every LoRA layer shares: options, factors, merging, and a state_dict that merging cannot change."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from typing_extensions import Self

import torch
from torch import Tensor, nn

from fastlora import checks
from fastlora import merge as merging

INITS = (True, False, "gaussian")

# how a layer is built before it adopts the parameters of another: no memory, no random numbers
META = {"device": "meta"}


class LoRALayer(nn.Module):
    """Mixin of the LoRA layers; comes before the ``torch.nn`` layer it adapts.

    Attributes:
        r: Rank; 0 is the plain layer.
        lora_alpha: Numerator of ``scaling``.
        scaling: ``lora_alpha / r`` (``/ sqrt(r)`` with ``use_rslora``); only where factors exist. A
            new value takes effect at the next forward.
        lora_dropout: ``nn.Dropout`` or ``nn.Identity``, applied to the input of the LoRA branch.
        merge_weights: Whether ``eval()`` merges and ``train()`` unmerges.
        weight_is_shared: Whether another module holds the same weight, which then is never merged.
    """

    r: int
    lora_alpha: float
    scaling: float
    lora_dropout: nn.Module
    merge_weights: bool
    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def _init_lora(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        merge_weights: bool,
        use_rslora: bool,
        init_lora_weights: bool | str,
        lora_dtype: torch.dtype | None,
        backend: str,
    ) -> None:
        """Sets the options; ``nn.Module.__init__`` has run."""
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.merge_weights = merge_weights
        self.use_rslora = use_rslora
        self.init_lora_weights = init_lora_weights
        self.backend = backend
        self._lora_dtype = lora_dtype
        self.weight_is_shared = False
        self._merge_record: merging.MergeRecord | None = None
        self._merged_state: tuple[Any, ...] = ()

    def _add_factors(self, **shapes: tuple[int, ...]) -> None:
        """Registers factors of these shapes, sets ``scaling`` and freezes the base weight."""
        dtype = self._lora_dtype or self.weight.dtype
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(self.weight.new_zeros(shape, dtype=dtype)))
        self.scaling = self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
        self.weight.requires_grad = False

    def adopt(self, module: nn.Module) -> Self:
        """Takes over the weight, bias and mode of ``module`` and draws factors beside them.

        The parameters are shared, not copied. For a layer built on the meta device.
        """
        weight = module.weight
        if weight.dtype not in checks.FLOAT_DTYPES or type(weight) is not nn.Parameter:
            raise TypeError(
                f"module.weight: got {type(weight).__name__} of {weight.dtype}, "
                "expected a plain floating-point nn.Parameter"
            )
        self.weight = weight
        if getattr(module, "bias", None) is not None:
            self.bias = module.bias
        self.training = module.training
        self.lora_dropout.training = module.training
        for name, factor in self.lora_parameters().items():
            dtype = self._lora_dtype or weight.dtype
            empty = torch.empty_like(factor, device=weight.device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty))
        if self.adapted:
            weight.requires_grad = False
            self.reset_lora_parameters()
        return self

    @property
    def adapted(self) -> bool:
        """Whether the layer has factors (``r > 0`` and a block to adapt)."""
        return hasattr(self, "lora_A")

    # ---- initialisation

    def reset_parameters(self) -> None:
        """Draws the base weight like the plain layer, then the factors."""
        super().reset_parameters()  # type: ignore[misc]
        if self.adapted:
            self.reset_lora_parameters()

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Draws the factors anew as ``init_lora_weights`` says.

        True: A uniform (Kaiming, a = sqrt(5)), B zero, as in loralib. "gaussian": A normal with
        standard deviation 1 / r, B zero, as in the paper. False: both uniform, so that the layer
        starts away from the base (for tests).
        """
        down, *others = self._down_factors()
        if self.init_lora_weights == "gaussian":
            down.normal_(std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        for factor in others:
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        if self.init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B.flatten(1), a=math.sqrt(5))
        else:
            self.lora_B.zero_()
        if hasattr(self, "lora_bias"):
            self.lora_bias.zero_()

    def _down_factors(self) -> list[nn.Parameter]:
        return [self.lora_A]

    # ---- merging

    def _merge_terms(self, weight: Tensor, lora: Mapping[str, Tensor]) -> list[merging.Term]:
        """The parts of ``weight`` (this layer's, or one like it) and their deltas by factors ``lora``."""
        raise TypeError(f"{type(self).__name__} does not say how its delta is merged")

    @property
    def merged(self) -> bool:
        """Whether the weight now holds ``W0 + ΔW``."""
        return self._merge_record is not None

    @property
    def merge_nbytes(self) -> int:
        """Bytes kept to undo the merge; 0 where the layer is not merged."""
        return self._merge_record.nbytes if self._merge_record else 0

    def delta_weight(self) -> Tensor:
        """``ΔW``, the update the factors stand for: shape and dtype of the weight."""
        delta = torch.zeros_like(self.weight)
        if self.adapted:
            merging.add_delta(self._merge_terms(delta, self.lora_parameters()), float(self.scaling))
        return delta

    def merge(self) -> None:
        """Adds ``ΔW`` to the weight in place, rounded once; merges anew if the factors have changed.

        Raises:
            MergeError: NaN or Inf in the factors, or overflow; the layer is as it was.
            ValueError: the weight is shared with another module, whose output would change.
        """
        if not self.adapted or (self.merged and not self._merge_is_stale()):
            return
        if self.weight_is_shared:
            raise ValueError(
                f"merge: the weight of this {type(self).__name__} is shared with another module, "
                "whose output would change with it; untie the weights first"
            )
        self._merge(self.lora_parameters(), float(self.scaling))

    def unmerge(self) -> None:
        """Gives back the weight as it was before :meth:`merge`, bit for bit.

        Raises:
            MergeError: the weight was edited while merged; the layer is as it was.
        """
        if self._merge_record is not None:
            self._merge_record.unmerge(self._weight_parts())
            self._merge_record, self._merged_state = None, ()

    def switch(self, factors: Mapping[str, Tensor], scaling: float | None = None) -> None:
        """Takes other factors; a merged weight goes from one delta to the other in one pass.

        Args:
            factors: This layer's ``lora_*`` tensors by name; all of them, in their shapes.
            scaling: Scaling of the new factors; None keeps the present one.

        Raises:
            KeyError: a factor is missing or unknown.
            ValueError: a factor's shape is wrong.
            MergeError: NaN or Inf in the factors, or overflow; the layer is as it was.
        """
        self.check_factors(factors)
        scaling = self.scaling if scaling is None else scaling
        own = self.lora_parameters()
        with torch.no_grad():
            if self.merged:
                rounded = {name: factors[name].to(p.device, p.dtype) for name, p in own.items()}
                self._merge(rounded, float(scaling))
            for name, parameter in own.items():
                parameter.copy_(factors[name])
        self.scaling = scaling
        self._merged_state = self._factor_state() if self.merged else ()

    def check_factors(self, factors: Mapping[str, Tensor]) -> None:
        """Raises KeyError or ValueError unless ``factors`` are this layer's, by name and shape."""
        own = self.lora_parameters()
        if own.keys() != factors.keys():
            raise KeyError(f"factors: got {sorted(factors)}, expected {sorted(own)}")
        for name, parameter in own.items():
            checks.shape(name, factors[name], tuple(parameter.shape), "shape in this layer")

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """The layer's factors (and ``lora_bias``) by name."""
        own = self._parameters.items()
        return {name: p for name, p in own if p is not None and name.startswith("lora_")}

    def _weight_parts(self) -> list[merging.Term]:
        return self._merge_terms(self.weight.detach(), self.lora_parameters())

    def _merge(self, lora: Mapping[str, Tensor], scaling: float) -> None:
        terms = self._merge_terms(self.weight.detach(), lora)
        if self._merge_record is None:
            self._merge_record = merging.merge(terms, scaling)
        else:
            self._merge_record = merging.switch(terms, scaling, self._merge_record)
        self._merged_state = self._factor_state()

    def _factor_state(self) -> tuple[Any, ...]:
        # the identity is kept with the counter: a copied or unpickled layer has other counters
        counters = (
            (id(p), None if p.is_inference() else p._version)
            for name, p in self.lora_parameters().items()
            if name != "lora_bias"
        )
        return (float(self.scaling), *counters)

    def _merge_is_stale(self) -> bool:
        """Whether factors or scaling were changed since the merge, as far as autograd's counters see."""
        if not self.merged:
            return False
        (scaling, *then), (scaling_now, *now) = self._merged_state, self._factor_state()
        return scaling != scaling_now or any(
            a != b for a, b in zip(then, now, strict=True) if a[0] == b[0]
        )

    def _uses_base_only(self) -> bool:
        """Whether forward is the plain layer's; warns where the merged delta is out of date."""
        if not self.merged:
            return not self.adapted
        if not torch.compiler.is_compiling() and self._merge_is_stale():
            warnings.warn(
                f"{type(self).__name__}: the factors have changed since they were merged, and the "
                "output does not show it; call merge() again, or train() to unmerge",
                stacklevel=3,
            )
        return True

    # ---- nn.Module's protocol

    def train(self, mode: bool = True) -> "LoRALayer":
        """Sets training mode; with ``merge_weights``, ``False`` merges and ``True`` unmerges."""
        super().train(mode)
        if self.merge_weights and self.adapted:
            if mode:
                self.unmerge()
            elif not self.weight_is_shared:
                self.merge()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRALayer":
        # a merged weight cannot follow a change of dtype or device exactly: its pristine self can
        merged = self.merged
        self.unmerge()
        super()._apply(fn, recurse)
        if merged:
            self.merge()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._merge_record is not None:
            pristine = self.weight.detach().clone()
            self._merge_record.unmerge(self._merge_terms(pristine, self.lora_parameters()))
            destination[prefix + "weight"] = pristine

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problems = list(self._checkpoint_problems(state_dict, prefix))
        if problems:
            error_msgs.extend(problems)
            return
        merged = self.merged
        self.unmerge()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if merged:
            self.merge()

    def _checkpoint_problems(self, state_dict: Mapping[str, Any], prefix: str) -> Iterator[str]:
        """Reasons to refuse this layer's part of a checkpoint, found before anything is copied."""
        own = {**self._parameters, **self._buffers}
        for name, t in own.items():
            new = state_dict.get(prefix + name)
            if t is not None and isinstance(new, Tensor) and new.shape != t.shape:
                got, expected = tuple(new.shape), tuple(t.shape)
                yield f"{prefix}{name}: got shape {got}, expected {expected}; this layer was not loaded"
        lora = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
        lora = {name: t for name, t in lora.items() if name.startswith("lora_")}
        if missing := sorted(self.lora_parameters().keys() - lora.keys()) if lora else []:
            yield (
                f"{prefix}{missing[0]}: is missing, while {sorted(lora)} are there; "
                "this layer was not loaded"
            )
            return
        weight = state_dict.get(prefix + "weight")
        if lora and weight is not None and weight.shape == self.weight.shape:
            if self.looks_merged(weight, lora):
                yield (
                    f"{prefix}weight: already holds the delta of {sorted(lora)} (a checkpoint saved "
                    "in eval mode by loralib), which would count twice; load it with "
                    "fastlora.adapters.load(model, state_dict, assume_merged=True); "
                    "this layer was not loaded"
                )

    def looks_merged(self, weight: Tensor, lora: Mapping[str, Tensor]) -> bool:
        """Whether ``weight`` is this layer's own base plus the delta of ``lora``."""
        if self.weight.is_meta or weight.is_meta or not self.adapted:
            return False
        base = self.state_dict()["weight"]
        weight = weight.to(base.device, base.dtype)
        lora = {name: t.to(base.device) for name, t in lora.items()}
        return merging.is_merged(
            self._merge_terms(base, lora), self._merge_terms(weight, lora), float(self.scaling)
        )

    def _lora_repr(self) -> str:
        """The LoRA part of ``extra_repr``."""
        if not self.adapted:
            return f"r={self.r}"
        text = f"r={self.r}, lora_alpha={self.lora_alpha}, scaling={float(self.scaling):g}"
        if self.use_rslora:
            text += ", use_rslora=True"
        if self.merged:
            text += ", merged=True"
        return text


def check_options(
    r: int, lora_alpha: float, lora_dropout: float, init_lora_weights: bool | str
) -> None:
    """The options every layer takes, checked before anything is built.

    Raises:
        ValueError: a negative rank, a dropout outside [0, 1], an unknown initialisation.
        TypeError: a rank that is not an int.
    """
    checks.rank("r", r)
    checks.probability("lora_dropout", lora_dropout)
    if not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha: got {lora_alpha}, expected a finite number")
    if init_lora_weights not in INITS:
        expected = ", ".join(repr(i) for i in INITS)
        raise ValueError(f"init_lora_weights: got {init_lora_weights!r}, expected one of {expected}")


def active_dropout(module: nn.Module) -> tuple[float, bool]:
    """``(p, training)`` of a layer's ``lora_dropout``.

    Raises:
        TypeError: neither ``nn.Dropout`` nor ``nn.Identity``.
    """
    if type(module) is nn.Identity:
        return 0.0, False
    if type(module) is nn.Dropout:
        return module.p, module.training
    raise TypeError(
        f"lora_dropout: got {type(module).__name__}, expected nn.Dropout or nn.Identity"
    )
