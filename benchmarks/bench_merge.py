"""Merging an adapter into a weight, out of it again, and from one adapter to another.

Run with ``python -m benchmarks.bench_merge [--quick] [--out DIR]``.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, memory, providers, report
from benchmarks.harness import Spread, Step
from benchmarks.providers import LORA_ALPHA, Inputs, Skipped
from benchmarks.shapes import Shape
from benchmarks.terminal import Console

RANK = 16
PLAIN = "plain PyTorch"
# (K, N): one block of BERT-large; attention and MLP of Llama-3-8B
LAYERS = ((1024, 1024), (4096, 4096), (4096, 14336))
DTYPES = (torch.bfloat16, torch.float32)


def grid(quick: bool) -> list[Shape]:
    """The weights; ``quick`` leaves out the largest. No tokens take part: M is 1."""
    layers = LAYERS[:2] if quick else LAYERS
    return [Shape(1, K, N, RANK, 0.0, dtype=dtype) for (K, N), dtype in product(layers, DTYPES)]


@dataclass(frozen=True)
class Merger:
    """One provider's weight and what is done to it, in this order, again and again."""

    weight: Tensor
    merge: Step
    switch: Step
    unmerge: Step
    kept: Callable[[], int] = lambda: 0

    def steps(self) -> dict[str, Step]:
        """By name."""
        return {"merge": self.merge, "switch": self.switch, "unmerge": self.unmerge}


Setup = Callable[[Shape, Inputs, Inputs], Merger]


def plain(shape: Shape, first: Inputs, second: Inputs) -> Merger:
    """What one writes by hand: the floor, and inexact."""
    weight, scaling = first.weight.clone(), LORA_ALPHA / shape.r
    present, other = first, second

    def merge() -> None:
        weight.add_((present.lora_B @ present.lora_A) * scaling)

    def unmerge() -> None:
        weight.sub_((present.lora_B @ present.lora_A) * scaling)

    def switch() -> None:
        nonlocal present, other
        unmerge()
        present, other = other, present
        merge()

    return Merger(weight, merge, switch, unmerge)


def peft(shape: Shape, first: Inputs, second: Inputs) -> Merger:
    """PEFT's layer with two adapters; to switch, it unmerges the one and merges the other."""
    model = providers.peft(shape, first).module
    config = model.peft_config["default"]
    model.add_adapter("other", config, autocast_adapter_dtype=False)
    layer = model.base_model.model.layer
    layer.lora_A["other"].weight.copy_(second.lora_A)
    layer.lora_B["other"].weight.copy_(second.lora_B)
    names = cycle(["other", "default"])

    def switch() -> None:
        layer.unmerge()
        layer.set_adapter(next(names))
        layer.merge()

    return Merger(layer.base_layer.weight, layer.merge, switch, layer.unmerge)


def fastlora(shape: Shape, first: Inputs, second: Inputs) -> Merger:
    """fastlora's layer on the backend that it takes on its own."""
    layer = providers.fastlora_with("auto")(shape, first).module
    factors = cycle([{"lora_A": i.lora_A, "lora_B": i.lora_B} for i in (second, first)])
    return Merger(
        layer.weight,
        layer.merge,
        lambda: layer.switch(next(factors)),
        layer.unmerge,
        lambda: layer.merge_nbytes,
    )


SETUPS: dict[str, Setup] = {PLAIN: plain, "PEFT": peft, "fastlora": fastlora}


@dataclass(frozen=True)
class Result:
    """What merging once and unmerging says of a provider, besides the time.

    Attributes:
        merged_rms: Error of the merged weight against float64, rms.
        kept: Bytes kept to undo the merge.
        peak: Most memory that merging holds at once, with what it keeps.
        changed: Share of the weights that do not come back as they were.
        drift: The largest change of a weight.
    """

    merged_rms: float
    kept: int
    peak: int
    changed: float
    drift: float


def inspect(merger: Merger, shape: Shape, inputs: Inputs) -> Result:
    """Merge and unmerge once."""
    before = merger.weight.clone()
    peak = memory.peak_bytes(merger.merge, before.device)
    truth = before.double().addmm_(
        inputs.lora_B.double(), inputs.lora_A.double(), alpha=LORA_ALPHA / shape.r
    )
    merged_rms = truth.sub_(merger.weight).square_().mean().sqrt().item()
    kept = merger.kept()
    merger.unmerge()
    moved = merger.weight != before
    drift = (merger.weight - before).abs().max().item()
    return Result(merged_rms, kept, peak, moved.double().mean().item(), drift)


def check(results: dict[str, Result]) -> None:
    """No time before fastlora is exact.

    Raises:
        AssertionError: A weight did not come back, or the merged one is worse than by hand.
    """
    mine = results.get("fastlora")
    if mine is None:
        return
    assert mine.changed == 0, f"fastlora: {mine.changed:.2%} of the weights did not come back"
    assert mine.merged_rms <= results[PLAIN].merged_rms, f"fastlora: {results}"


@dataclass(frozen=True)
class Row:
    """One provider, one weight, one operation."""

    provider: str
    shape: Shape
    operation: str
    seconds: Spread
    vs_plain: Spread
    vs_peft: Spread | None
    samples: list[float]

    def as_json(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self) | {"shape": self.shape.as_json()}


@dataclass(frozen=True)
class Group:
    """All that is measured of one weight."""

    shape: Shape
    rows: list[Row]
    results: dict[str, Result]


def measure(shape: Shape, mergers: dict[str, Merger], device: torch.device) -> list[Row]:
    """Time the providers of one shape against each other."""
    cycles = {name: merger.steps() for name, merger in mergers.items()}
    times = harness.time_cycles(cycles, device, budget_s=3.0, min_rounds=7, max_rounds=60)
    rows = []
    for operation, samples in times.items():
        vs_plain = harness.ratios(samples, PLAIN)
        vs_peft = harness.ratios(samples, "PEFT") if "PEFT" in samples else {}
        rows += [
            Row(
                name,
                shape,
                operation,
                Spread.of(samples[name]),
                vs_plain[name],
                vs_peft.get(name),
                [round(value, 7) for value in samples[name]],
            )
            for name in mergers
        ]
    return rows


@torch.no_grad()
def run(
    shapes: list[Shape], device: torch.device, console: Console
) -> tuple[list[Group], dict[str, str]]:
    """Measure all shapes; also returns what was skipped and why."""
    groups: list[Group] = []
    skipped: dict[str, str] = {}
    with console.progress() as progress:
        task = progress.add_task("weights", total=len(shapes))
        for shape in shapes:
            progress.update(task, status=_label(shape))
            first = Inputs.make(shape, device)
            # other factors of the same size
            second = replace(first, lora_A=first.lora_A.flip(0), lora_B=first.lora_B.flip(0))
            mergers = {}
            for name, setup in SETUPS.items():
                try:
                    mergers[name] = setup(shape, first, second)
                except Skipped as reason:
                    skipped[name] = str(reason)
            results = {name: inspect(merger, shape, first) for name, merger in mergers.items()}
            check(results)
            groups.append(Group(shape, measure(shape, mergers, device), results))
            progress.update(task, advance=1)
    return groups, skipped


def _dtype(shape: Shape) -> str:
    return str(shape.dtype).removeprefix("torch.")


def _label(shape: Shape) -> str:
    return f"{shape.N}×{shape.K} {_dtype(shape)}"


def _by_weight(
    groups: list[Group], lines: Callable[[Group], Iterator[list[str]]]
) -> list[list[str]]:
    return [line for group in groups for line in [*lines(group), []]]


def time_table(groups: list[Group]) -> report.Table:
    """Every time."""

    def lines(group: Group) -> Iterator[list[str]]:
        for row in group.rows:
            ms = f"{row.seconds.median * 1e3:.2f}"
            ratios = report.ratio(row.vs_plain), report.ratio(row.vs_peft)
            yield [row.provider, _label(group.shape), row.operation, ms, *ratios]

    header = ("provider", "weight", "operation", "ms", "× plain", "× PEFT")
    return report.Table(f"Time, r = {RANK}", header, _by_weight(groups, lines))


def result_table(groups: list[Group]) -> report.Table:
    """What merging takes besides time, and what comes back."""

    def lines(group: Group) -> Iterator[list[str]]:
        weights = group.shape.K * group.shape.N
        for name, result in group.results.items():
            yield [
                name,
                _label(group.shape),
                f"{result.kept / weights:.2f}" if result.kept else "0",
                report.mib(result.peak),
                f"{result.changed:.1%}" if result.changed else "0",
                f"{result.drift:.1e}" if result.drift else "0",
            ]

    header = ("provider", "weight", "bytes kept a weight", "peak MiB", "changed", "by at most")
    title = "Memory of merging, and weights that unmerging does not give back"
    return report.Table(title, header, _by_weight(groups, lines))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.bench_merge", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without the largest weight")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for the results")
    options = parser.parse_args()
    device = torch.device(options.device)
    console = Console()

    groups, skipped = run(grid(options.quick), device, console)
    tables = [time_table(groups), result_table(groups)]
    for table in tables:
        table.show(console)
    folder = report.folder_for(device, options.out)
    record = report.record_head(device) | {
        "rows": [row.as_json() for group in groups for row in group.rows],
        "results": [
            {"provider": name, "shape": group.shape.as_json()} | asdict(result)
            for group in groups
            for name, result in group.results.items()
        ],
        "skipped": skipped,
    }
    parts = ["# Merging\n", report.environment_markdown(record["environment"])]
    parts += [table.markdown() for table in tables] + [report.skipped_markdown(skipped)]
    report.write(folder, "merge", record, "\n".join(part for part in parts if part))
    for name, reason in skipped.items():
        console.print(f"skipped: {name}: {reason}", style="yellow")
    console.print(f"written to {folder}")


if __name__ == "__main__":
    main()
