"""Command line: ``python -m benchmarks.finetune [--full] [--steps N] [--out DIR]``."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.finetune import checks, methods
from benchmarks.finetune.data import MissingPackage
from benchmarks.finetune.report import Outcome, publish
from benchmarks.finetune.tasks import Dialogue, Task, Topics
from benchmarks.finetune.train import WARMUP, build_runs, summarise, train
from benchmarks.report import folder_for
from benchmarks.terminal import Console, Progress

PARITY_STEPS = 30


def _live(bar: Progress, task: Any) -> Callable[[int, Mapping[str, float]], None]:
    def on_step(index: int, losses: Mapping[str, float]) -> None:
        status = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        bar.update(task, completed=index + 1, status=status)

    return on_step


def run(task: Task, steps: int, seed: int, folder: Path, console: Console) -> Outcome:
    """Train, judge, compare; the trained adapter goes to ``folder``."""
    runs, skipped = build_runs(task, methods.names(task), steps, methods.DROPOUT)
    with console.progress() as bar:
        before = task.evaluate(task.build())
        training = bar.add_task("training", total=steps)
        train(task, runs, steps, seed, _live(bar, training))
        judging = bar.add_task("judging", total=len(runs))
        results = summarise(task, runs, lambda name: bar.update(judging, advance=1, status=name))
        adapter = None
        if "fastlora" in runs:
            adapter = checks.adapter_check(task, runs["fastlora"].model, folder)
        runs.clear()  # the parity runs need the memory
        count = min(PARITY_STEPS, steps)
        comparing = bar.add_task("parity", total=count)
        parity = checks.parity(task, count, seed, _live(bar, comparing))
    return Outcome(task, steps, seed, before, results, parity, adapter, skipped)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.finetune", description=__doc__)
    parser.add_argument("--full", action="store_true", help="a 135 M language model instead")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for the results")
    options = parser.parse_args()
    device = torch.device(options.device)
    console = Console()
    kind = Dialogue if options.full else Topics
    try:
        with console.status(f"loading {kind.model_name}"):
            task = kind(device)
    except MissingPackage as missing:
        console.print(f"skipped: fine-tuning {kind.model_name} needs: {missing}", style="yellow")
        return
    steps = options.steps or task.steps
    if steps <= WARMUP + 1:
        parser.error(f"--steps: got {steps}, expected more than {WARMUP + 1}")
    folder = folder_for(device, options.out)
    publish(run(task, steps, options.seed, folder, console), device, folder, console)


if __name__ == "__main__":
    main()
