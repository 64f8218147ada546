"""Merging a layer's update into its weight and out again; the state_dict is the same either way."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from typing_extensions import Self

from fastlora import checks
from fastlora import merge as merging

NOT_LOADED = "nothing of this layer was loaded"
# the scaling of a merge or unmerge that was interrupted: equal to none, so that it counts as stale
PARTLY = math.nan
# which layer's update the memory at an address holds, for layers of one weight in several models
_HOLDERS: "WeakValueDictionary[int, Mergeable]" = WeakValueDictionary()


class Mergeable(nn.Module):
    """A layer whose frozen weight can take its low-rank update in and give it back, bit for bit.

    A merged layer notices, and says at the next forward, that its factors or its weight were
    replaced, or changed as autograd sees it. Edits in place through ``.data``, as in a moving
    average of the factors, cannot be seen: give such a copy ``merge_weights=False``.

    Attributes:
        scaling: Factor of the update.
        merge_weights: Whether ``eval()`` merges and ``train()`` unmerges.
        weight_is_shared: Whether another module holds the same weight, which then is never merged.
    """

    scaling: float
    merge_weights: bool
    weight_is_shared: bool
    weight: Tensor
    _merge_record: merging.MergeRecord | None
    _merged_factors: dict[str, int]
    _merged_scaling: float
    _merged_counters: list[tuple[int, int | None, int | None]]
    _merged_memory: list[StorageWeakRef]
    _told_of_weight: bool

    @property
    def adapted(self) -> bool:
        """Whether the layer has factors (``r > 0`` and a block to adapt)."""
        return hasattr(self, "lora_A")

    def _merge_terms(self, weight: Tensor, lora: Mapping[str, Tensor]) -> list[merging.Term]:
        """The parts of ``weight`` (this layer's, or one like it) and their deltas by ``lora``."""
        raise TypeError(f"{type(self).__name__} does not say how its delta is merged")

    @property
    def merged(self) -> bool:
        """Whether the weight now holds ``W0 + ΔW``."""
        return self._merge_record is not None

    @property
    def merge_nbytes(self) -> int:
        """Bytes kept to undo the merge; 0 where the layer is not merged."""
        return self._merge_record.nbytes if self._merge_record else 0

    def why_not_merged(self) -> str | None:
        """Why the weight cannot take the update in, in words, or None."""
        if self.weight_is_shared:
            return (
                "its weight is shared with another module, whose output would change with it; "
                "untie the weights first"
            )
        if computed := self._computed():
            return f"its {computed[0]} is computed from other tensors (pruned or parametrized)"
        if not _is_plain(self.weight):
            kind = "meta tensor" if self.weight.is_meta else type(self.weight.data).__name__
            return f"its weight is a {kind}, which has no memory of its own here"
        if getattr(self, "_is_fsdp_managed_module", False):
            return "its weight is FSDP's, which puts its own in the place of a merged one"
        holder = _HOLDERS.get(self.weight.data_ptr())
        if holder is None or holder is self or not holder.merged:
            return None
        if holder.weight.data_ptr() != self.weight.data_ptr():
            return None
        return "its weight now holds the update of another layer, which shares it"

    def _computed(self) -> list[str]:
        """Which of the tensors of a merge are not parameters, but computed from some."""
        return [name for name in ("weight", "lora_A", "lora_B") if name not in self._parameters]

    def delta_weight(self) -> Tensor:
        """``ΔW``, the update the factors stand for: shape and dtype of the weight.

        Raises:
            ValueError: the weight is distributed, or has no data.
        """
        if not _is_plain(self.weight):
            raise ValueError(f"delta_weight: {self.why_not_merged()}")
        delta = torch.zeros_like(self.weight)
        if self.adapted:
            merging.add_delta(self._merge_terms(delta, self.lora_parameters()), float(self.scaling))
        return delta

    def merged_parameters(self) -> dict[str, Tensor]:
        """Weight and bias, if there is one, of the plain layer that this one is when it is merged.

        Raises:
            MergeError: NaN or Inf in the factors, or overflow.
            ValueError: the weight is distributed, or has no data.
        """
        if not _is_plain(self.weight):
            raise ValueError(f"merged_parameters: {self.why_not_merged()}")
        weight = self.weight.detach().clone()
        if self._merge_record is not None:
            self._merge_record.unmerge(self._merge_terms(weight, self.lora_parameters()))
        terms = self._merge_terms(weight, self.lora_parameters())
        merging.check(terms, float(self.scaling))
        merging.add_delta(terms, float(self.scaling))
        bias = self._merged_bias()
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias.detach()}

    def _merged_bias(self) -> Tensor | None:
        """The bias of the plain layer that this one is when it is merged."""
        bias: Tensor | None = getattr(self, "bias", None)
        return bias

    def merge(self) -> None:
        """Adds ``ΔW`` to the weight in place, rounded once; anew, if the factors have changed.

        Raises:
            MergeError: NaN or Inf in the factors, or overflow; the layer is as it was.
            ValueError: the weight cannot take the update in, as :meth:`why_not_merged` says.
        """
        if self.merged and not self._holds_update():
            self.unmerge()
        if not self.adapted or (self.merged and not self._merge_is_stale()):
            return
        if reason := self.why_not_merged():
            raise ValueError(f"merge: this {type(self).__name__} cannot be merged: {reason}")
        self._merge(self.lora_parameters(), float(self.scaling))

    def unmerge(self) -> None:
        """Gives back the weight as it was before :meth:`merge`, bit for bit.

        Raises:
            MergeError: the weight was edited or replaced while merged; the layer is as it was.
        """
        if self._merge_record is not None:
            self._check_undoing()
            own = self._merge_terms(self.weight.detach(), self.lora_parameters())
            before, self._merged_scaling = self._merged_scaling, PARTLY
            try:
                self._merge_record.unmerge(own)
            except merging.MergeError:
                self._merged_scaling = before
                raise
            self._forget_merge()

    def _check_undoing(self) -> None:
        """Raises MergeError where the weight that was merged is out of reach."""
        if self._computed() or not _is_plain(self.weight):
            raise merging.MergeError(f"weight: was merged before {self.why_not_merged()}")

    def _forget_merge(self) -> None:
        """What the weight holds now is its own."""
        self._merge_record, self._merged_factors = None, {}

    def switch(self, factors: Mapping[str, Tensor], scaling: float | None = None) -> None:
        """Takes other factors; a merged weight goes from one delta to the other in one pass.

        Args:
            factors: This layer's ``lora_*`` tensors by name; all of them, in their shapes.
            scaling: Scaling of the new factors; None keeps the present one.

        Raises:
            KeyError: a factor is missing or unknown.
            ValueError: a factor's shape is wrong, or the scaling is not finite.
            MergeError: NaN or Inf in the factors, or overflow; the layer is as it was.
        """
        self.check_factors(factors)
        scaling = self.scaling if scaling is None else scaling
        checks.scaling("scaling", scaling)
        own = self.lora_parameters()
        with torch.no_grad():
            if self.merged:
                new = {name: factors[name].to(p.device, p.dtype) for name, p in own.items()}
                self._merge(new, float(scaling))
            for name, parameter in own.items():
                parameter.copy_(factors[name])
        self.scaling = scaling
        self._remember()

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

    def _merge(self, lora: Mapping[str, Tensor], scaling: float) -> None:
        terms = self._merge_terms(self.weight.detach(), lora)
        record = merging.MergeRecord(terms, scaling, self._merge_record)
        # before the first block is written, as it undoes also a part
        self._merge_record, self._merged_scaling = record, PARTLY
        _HOLDERS[self.weight.data_ptr()] = self
        try:
            record.merge(terms, scaling)
        except BaseException:
            self.unmerge()
            raise
        self._merged_factors = {name: merging.checksum(t) for name, t in lora.items()}
        self._merged_scaling = scaling
        self._remember()

    def _remember(self) -> None:
        """Notes which weight and factors are merged, for forward to tell others from them."""
        self._merged_counters = self._counters()
        found = map(_storage, (self._parameters.get("weight"), *self.lora_parameters().values()))
        # a weak reference keeps what is identified by its address from being another's
        self._merged_memory = [StorageWeakRef(storage) for storage in found if storage is not None]

    def _counters(self) -> list[tuple[int, int | None, int | None]]:
        own = self._parameters.items()
        seen = [p for n, p in own if p is not None and (n == "weight" or n.startswith("lora_"))]
        try:
            return [(id(p), p._version, p.untyped_storage()._cdata) for p in seen]
        except RuntimeError:
            # tensors of inference mode have no counter, those of torch.func no memory
            return [(id(p), None, _memory(p)) for p in seen]

    def _holds_update(self) -> bool:
        """Whether a merged layer's weight is what was merged, or a copy of that.

        Not so where it was replaced: ``state_dict()`` gives W0 to those who do that.
        """
        # computed, a replica's, traced or transformed: made of the weight that was merged
        if self._computed() or not _is_plain(self.weight):
            return True
        weight = self.weight.detach()
        if self._merged_memory and _memory(weight) == self._merged_memory[0].cdata:
            return True
        assert self._merge_record is not None
        return self._merge_record.is_held_by(self._merge_terms(weight, self.lora_parameters()))

    def _merge_is_stale(self) -> bool:
        """Whether a merged layer's factors or scaling have changed since."""
        return self._merged_scaling != float(self.scaling) or any(
            merging.checksum(p) != self._merged_factors.get(name)
            for name, p in self.lora_parameters().items()
            if name != "lora_bias" and _is_plain(p)
        )

    def _uses_base_only(self) -> bool:
        """Whether forward is the plain layer's; warns where a merged one is not what is wanted."""
        if not self.merged:
            return not self.adapted
        if torch.compiler.is_compiling():
            return True
        changed = self._counters() != self._merged_counters
        if changed and not self._holds_update():
            if not self._told_of_weight:
                self._told_of_weight = True
                warnings.warn(
                    f"{type(self).__name__}: its weight is not the one that was merged, and is "
                    "taken for the base weight, to which the update is added; unmerge() a layer "
                    "before its weight is replaced or offloaded, or set merge_weights=False",
                    stacklevel=3,
                )
            return False
        if self.training and torch.is_grad_enabled():
            warnings.warn(
                f"{type(self).__name__}: is merged, so its factors get no gradient; unmerge() to "
                "train, or use torch.no_grad()",
                stacklevel=3,
            )
        # comparing factors synchronises a GPU: only where they may have changed
        if changed or self._merged_scaling != self.scaling:
            if self._merge_is_stale():
                warnings.warn(
                    f"{type(self).__name__}: the factors have changed since they were merged, and "
                    "the output does not show it; call merge() again, or unmerge()",
                    stacklevel=3,
                )
            self._remember()
        return True

    def __getstate__(self) -> dict[str, Any]:
        # an address means nothing in a copy; whether it is that of the weight does
        held = [m.cdata for m in self._merged_memory[:1]] == [
            _memory(self._parameters.get("weight"))
        ]
        return {**self.__dict__, "_merged_memory": held, "_merged_counters": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_merged_memory": []})
        if state["_merged_memory"]:
            self._remember()

    def train(self, mode: bool = True) -> Self:
        """Sets training mode; with ``merge_weights``, ``False`` merges and ``True`` unmerges.

        A layer that cannot be merged (NaN in its factors, say) stays unmerged, with a warning.

        Raises:
            MergeError: the weight was edited while merged.
        """
        super().train(mode)
        if self.merge_weights and self.adapted:
            if mode:
                self.unmerge()
            else:
                self._merge_if_possible()
        return self

    def _merge_if_possible(self) -> None:
        """Merges, or says why not: the unmerged layer computes the same."""
        # there is nothing to merge yet, or flag_shared_weights has said so
        if self.weight.is_meta or self.weight_is_shared:
            return
        try:
            self.merge()
        except (merging.MergeError, ValueError) as error:
            if self.merged:
                raise
            warnings.warn(f"{type(self).__name__}: was not merged: {error}", stacklevel=3)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # a merged weight cannot follow a change of dtype or device exactly: its pristine self can
        merged = self.merged
        self.unmerge()
        super()._apply(fn, recurse)
        if merged:
            self._merge_if_possible()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._merge_record is not None and not self.weight.is_meta:
            self._check_undoing()
            pristine = self.weight.detach().clone()
            self._merge_record.unmerge(self._merge_terms(pristine, self.lora_parameters()))
            destination[prefix + "weight"] = (
                nn.Parameter(pristine, requires_grad=False) if keep_vars else pristine
            )

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
        try:
            self.unmerge()
        except merging.MergeError:
            if prefix + "weight" not in state_dict:
                raise
            # edited, and now replaced
            self._forget_merge()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if merged:
            self.merge()

    def _checkpoint_problems(self, state_dict: Mapping[str, Any], prefix: str) -> Iterator[str]:
        """Reasons to refuse this layer's part of a checkpoint, found before anything is copied."""
        own, wrong = {**self._parameters, **self._buffers}, False
        for name, t in own.items():
            new = state_dict.get(prefix + name)
            if t is not None and isinstance(new, Tensor) and new.shape != t.shape:
                got, expected = tuple(new.shape), tuple(t.shape)
                wrong = True
                yield f"{prefix}{name}: got shape {got}, expected {expected}; {NOT_LOADED}"
        if wrong:
            return
        lora = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
        lora = {name: t for name, t in lora.items() if name.startswith("lora_")}
        if missing := sorted(self.lora_parameters().keys() - lora.keys()) if lora else []:
            yield (
                f"{prefix}{missing[0]}: is missing, while {sorted(lora)} are there; {NOT_LOADED}"
            )
            return
        weight = state_dict.get(prefix + "weight")
        if weight is not None and lora and self.looks_merged(weight, lora):
            yield (
                f"{prefix}weight: already holds the update of {sorted(lora)}, which would count "
                "twice (loralib saves so in eval mode); load it with fastlora.adapters.load(model, "
                f"state_dict, assume_merged=True); {NOT_LOADED}"
            )

    def looks_merged(self, weight: Tensor, lora: Mapping[str, Tensor]) -> bool:
        """Whether ``weight`` is this layer's own base plus the delta of ``lora``."""
        tensors = (self.weight, weight, *lora.values())
        if not self.adapted or self._computed() or not all(map(_is_plain, tensors)):
            return False
        try:
            base = self.state_dict()["weight"]
        except merging.MergeError:
            # edited: what its own base was is not known
            return False
        weight = weight.to(base.device, base.dtype)
        lora = {name: t.to(base.device) for name, t in lora.items()}
        return merging.is_merged(
            self._merge_terms(base, lora), self._merge_terms(weight, lora), float(self.scaling)
        )


def _is_plain(t: Tensor) -> bool:
    """Whether all of it is in memory here: not on the meta device, not distributed, no subclass."""
    return _memory(t) is not None and type(t.data) is Tensor and not t.is_meta


def _storage(t: Tensor | None) -> torch.UntypedStorage | None:
    """The memory of a tensor; None where it is not to be had, as in transforms of torch.func."""
    try:
        return None if t is None else t.untyped_storage()
    except NotImplementedError:
        return None


def _memory(t: Tensor | None) -> int | None:
    """What tells a tensor's memory from others', wherever it is moved."""
    storage = _storage(t)
    return None if storage is None else storage._cdata
