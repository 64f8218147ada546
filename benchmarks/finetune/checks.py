"""What has to hold beside speed: the same losses as loralib, and adapters that survive a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.finetune import methods
from benchmarks.finetune.tasks import Quality, Task
from benchmarks.finetune.train import OnStep, Run, build_runs, train

TRUTH = "loralib, float64"


@dataclass(frozen=True)
class Difference:
    """How far two loss curves are apart.

    Attributes:
        first: At the first step, from the same weights.
        largest: At the worst step; rounding grows from step to step as the weights follow it.
        relative: ``largest`` as a share of the loss.
    """

    first: float
    largest: float
    relative: float

    @classmethod
    def of(cls, losses: Sequence[float], reference: Sequence[float]) -> "Difference":
        """Compare step by step."""
        gaps = [abs(a - b) for a, b in zip(losses, reference, strict=True)]
        shares = [gap / abs(b) for gap, b in zip(gaps, reference, strict=True)]
        return cls(gaps[0], max(gaps), max(shares))


@dataclass(frozen=True)
class Parity:
    """Losses of the LoRA libraries without LoRA dropout, where they should be the same numbers."""

    losses: dict[str, list[float]]

    def differences(self) -> dict[str, Difference]:
        """Each library against loralib, and each against the float64 run."""
        pairs = [(n, methods.ADAPTERS[0]) for n in methods.ADAPTERS[1:]]
        pairs += [(n, TRUTH) for n in methods.ADAPTERS]
        return {
            f"{name} vs {other}": Difference.of(self.losses[name], self.losses[other])
            for name, other in pairs
            if name in self.losses and other in self.losses
        }


def parity(task: Task, steps: int, seed: int, on_step: OnStep) -> Parity:
    """Train the LoRA libraries without LoRA dropout, and loralib in float64 as the truth."""
    runs, _ = build_runs(task, methods.ADAPTERS, steps, dropout=0.0)
    if (baseline := methods.ADAPTERS[0]) in runs:
        model = methods.build(task, baseline, dropout=0.0).double()
        runs[TRUTH] = Run.start(task, model, methods.learning_rate(task, baseline), steps)
    train(task, runs, steps, seed, on_step)
    return Parity({name: run.losses for name, run in runs.items()})


@dataclass(frozen=True)
class AdapterCheck:
    """Held-out quality of one trained adapter, served in different ways.

    Attributes:
        trained: By the model that was trained, unmerged.
        reloaded: By a fresh model that read the adapter from a file.
        merged: With the update added to the weights.
        file_bytes: Size of the adapter's file.
        restored: Whether unmerging gave every weight back bit for bit.
    """

    trained: Quality
    reloaded: Quality
    merged: Quality
    file_bytes: int
    restored: bool


def adapter_check(task: Task, model: nn.Module, folder: Path) -> AdapterCheck:
    """Save the trained fastlora adapter, load it into a fresh model, merge and unmerge it."""
    import fastlora

    fresh = methods.build(task, "fastlora")
    path = folder / f"finetune-{task.name}.safetensors"
    fastlora.adapters.save(model, path)
    fastlora.adapters.load(fresh, path)
    file_bytes = path.stat().st_size
    heads = {k: v for k, v in model.state_dict().items() if methods.in_head(k)}
    fresh.load_state_dict(heads, strict=False)

    for module in [*model.modules(), *fresh.modules()]:
        if hasattr(module, "merge_weights"):
            module.merge_weights = False  # else eval() merges, and there is nothing to compare
    trained, reloaded = task.evaluate(model), task.evaluate(fresh)
    before = _bits(model)
    with fastlora.merged(model):
        merged = task.evaluate(model)
    after = _bits(model)
    restored = all(torch.equal(before[name], after[name]) for name in before)
    return AdapterCheck(trained, reloaded, merged, file_bytes, restored)


def _bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone().view(torch.uint8) for name, p in model.named_parameters()}
