"""Train all methods together, one step each in turn, so that they share the same minutes."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from benchmarks import harness, memory
from benchmarks.finetune import methods
from benchmarks.finetune.tasks import Batch, Quality, Task

WARMUP = 3
OnStep = Callable[[int, Mapping[str, float]], None]


@dataclass
class Run:
    """One method: its model, its optimiser and what was seen of it while it trained."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, task: Task, model: nn.Module, lr: float, steps: int) -> "Run":
        """AdamW without weight decay, the rate going down linearly to zero."""
        head, body = [], []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                (head if methods.in_head(name) else body).append(parameter)
        groups = [{"params": body, "lr": lr}, {"params": head, "lr": task.head_learning_rate}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        return cls(model, optimizer, schedule)

    def step(self, task: Task, batch: Batch) -> torch.Tensor:
        """Forward, backward, update."""
        loss = task.loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def trainable(self) -> int:
        """Number of parameters that are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def build_runs(
    task: Task, names: Sequence[str], steps: int, dropout: float
) -> tuple[dict[str, Run], dict[str, str]]:
    """A run for each method, and the reasons why some have none."""
    runs, skipped = {}, {}
    for name in names:
        try:
            model = methods.build(task, name, dropout)
        except methods.MissingLibrary as error:
            skipped[name] = str(error)
        else:
            runs[name] = Run.start(task, model, methods.learning_rate(task, name), steps)
    return runs, skipped


def train(task: Task, runs: Mapping[str, Run], steps: int, seed: int, on_step: OnStep) -> None:
    """Train all runs on the same batches.

    Every step of every method starts from the same random state, so the dropout of the backbone
    draws the same masks in all of them.
    """
    batches = itertools.islice(task.batches(seed), steps)
    for index, batch in enumerate(batches):
        for name in harness.rotated(list(runs), index):
            run = runs[name]
            torch.manual_seed(seed + index)
            start = time.perf_counter()
            loss = run.step(task, batch)
            harness.synchronize(task.device)
            run.seconds.append(time.perf_counter() - start)
            run.losses.append(loss.item())
            run.schedule.step()
        on_step(index, {name: run.losses[-1] for name, run in runs.items()})


@dataclass(frozen=True)
class Footprint:
    """Memory of one method, in bytes.

    Attributes:
        resident: Weights and optimiser state, which are there between steps.
        saved: What autograd keeps from forward to backward.
        peak: Most that a step holds at once on top of ``resident``, gradients included.
    """

    resident: int
    saved: int
    peak: int


def footprint(task: Task, run: Run, batch: Batch) -> Footprint:
    """Measure one step; the run trains a little more by it."""
    state = [v for s in run.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    weights = [*run.model.parameters(), *run.model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in [*weights, *state]}
    run.model.train()
    return Footprint(
        resident=sum(storage.nbytes() for storage in storages.values()),
        saved=memory.saved_bytes(lambda: task.loss(run.model, batch), [*weights, *batch.values()]),
        peak=memory.peak_bytes(lambda: run.step(task, batch), task.device),
    )


def step_times(runs: Mapping[str, Run]) -> dict[str, list[float]]:
    """Seconds of each step after the warm-up."""
    return {name: run.seconds[WARMUP:] for name, run in runs.items()}


@dataclass(frozen=True)
class Result:
    """What the report says about one method."""

    trainable: int
    learning_rate: float
    seconds: harness.Spread
    ratio: harness.Spread | None
    memory: Footprint
    quality: Quality
    losses: list[float]
    step_seconds: list[float]


def summarise(
    task: Task, runs: Mapping[str, Run], on_method: Callable[[str], None]
) -> dict[str, Result]:
    """Quality and memory of the trained runs."""
    times = step_times(runs)
    baseline = methods.ADAPTERS[0]
    ratios = harness.ratios(times, baseline) if baseline in times else {}
    batch = next(task.batches(seed=0))
    results = {}
    for name, run in runs.items():
        on_method(name)
        quality = task.evaluate(run.model)
        results[name] = Result(
            trainable=run.trainable(),
            learning_rate=methods.learning_rate(task, name),
            seconds=harness.Spread.of(times[name]),
            ratio=ratios.get(name),
            memory=footprint(task, run, batch),
            quality=quality,
            losses=run.losses,
            step_seconds=[round(value, 6) for value in run.seconds],
        )
    return results
