"""One adapted layer, forward and backward: time, saved activations, peak memory.

Run with ``python -m benchmarks.bench_layer [--quick] [--out DIR]``.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, memory, report
from benchmarks.gate import check
from benchmarks.harness import Spread
from benchmarks.providers import BASELINE, Case, Inputs, Skipped, providers
from benchmarks.shapes import Shape, grid
from benchmarks.terminal import Console


@dataclass(frozen=True)
class Row:
    """One provider at one shape."""

    shape: Shape
    provider: str
    seconds: Spread
    vs_frozen: Spread
    vs_loralib: Spread | None
    saved: int
    peak: int
    samples: list[float]

    def as_json(self) -> dict[str, Any]:
        """Plain values only."""
        values = asdict(self)
        values["shape"]["dtype"] = str(self.shape.dtype).removeprefix("torch.")
        return values


def measure(shape: Shape, cases: dict[str, Case], device: torch.device) -> list[Row]:
    """Time all providers of one shape against each other, then take their memory."""
    samples = harness.time_rounds({name: case.step for name, case in cases.items()}, device)
    vs_frozen = harness.ratios(samples, BASELINE)
    vs_loralib = harness.ratios(samples, "loralib") if "loralib" in samples else {}
    return [
        Row(
            shape,
            name,
            Spread.of(samples[name]),
            vs_frozen[name],
            vs_loralib.get(name),
            memory.saved_bytes(case.forward, case.resident()),
            memory.peak_bytes(case.step, device),
            [round(value, 7) for value in samples[name]],
        )
        for name, case in cases.items()
    ]


def run(
    shapes: Sequence[Shape], device: torch.device, compiled: bool, console: Console
) -> tuple[list[Row], dict[str, str]]:
    """Measure all shapes; also returns what was skipped and why."""
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    table = providers(compiled)
    with console.progress() as progress:
        task = progress.add_task("layers", total=len(shapes))
        for shape in shapes:
            progress.update(task, status=f"{shape.label} r={shape.r} p={shape.p}")
            inputs = Inputs.make(shape, device)
            cases = {}
            for name, setup in table.items():
                try:
                    cases[name] = setup(shape, inputs)
                except Skipped as reason:
                    kind = "MergedLinear" if shape.enable_lora else "Linear"
                    skipped[f"{name} ({kind})"] = str(reason)
            check(shape, device)
            rows += measure(shape, cases, device)
            progress.update(task, advance=1)
    return rows, skipped


# a few tokens are ruled by the host, many by arithmetic: a mean over both would say nothing
FEW_TOKENS = 64
GROUPS: dict[str, Callable[[Shape], bool]] = {
    "Linear, few tokens": lambda s: s.enable_lora is None and s.M <= FEW_TOKENS,
    "Linear": lambda s: s.enable_lora is None and s.M > FEW_TOKENS,
    "MergedLinear, few tokens": lambda s: s.enable_lora is not None and s.M <= FEW_TOKENS,
    "MergedLinear": lambda s: s.enable_lora is not None and s.M > FEW_TOKENS,
}


def _geomean(ratios: Sequence[Spread]) -> Spread | None:
    """Geometric means of medians and of quartiles."""
    if not ratios:
        return None
    mean = statistics.geometric_mean
    return Spread(*(mean([getattr(r, end) for r in ratios]) for end in ("median", "low", "high")))


def summary_table(rows: Sequence[Row]) -> report.Table:
    """Geometric means over the grid, by kind of layer, number of tokens and dropout."""
    out: list[list[str]] = []
    for group, belongs in GROUPS.items():
        for p in sorted({row.shape.p for row in rows}):
            mine = [row for row in rows if belongs(row.shape) and row.shape.p == p]
            for name in dict.fromkeys(row.provider for row in mine):
                own = [row for row in mine if row.provider == name]
                frozen = _geomean([row.vs_frozen for row in own])
                loralib = _geomean([row.vs_loralib for row in own if row.vs_loralib])
                out.append([name, group, f"{p:g}", report.ratio(frozen), report.ratio(loralib)])
            out.append([])
    header = ("provider", "layer", "p", "× frozen", "× loralib")
    return report.Table("Forward + backward time, geometric means over the grid", header, out)


def detail_table(rows: Sequence[Row]) -> report.Table:
    """Every measurement."""
    out: list[list[str]] = []
    for shape, group in groupby(rows, key=lambda row: row.shape):
        for row in group:
            out.append(
                [
                    row.provider,
                    shape.label,
                    str(shape.r),
                    f"{shape.p:g}",
                    f"{row.seconds.median * 1e3:.2f}",
                    report.ratio(row.vs_frozen),
                    report.ratio(row.vs_loralib),
                    report.mib(row.saved),
                    report.mib(row.peak),
                ]
            )
        out.append([])
    header = (
        "provider",
        "layer M×K→N",
        "r",
        "p",
        "ms",
        "× frozen",
        "× loralib",
        "saved MiB",
        "peak MiB",
    )
    return report.Table("Forward + backward of one layer", header, out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.bench_layer", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a part of the grid")
    size.add_argument("--full", action="store_true", help="the whole grid (the default)")
    parser.add_argument("--compiled", action="store_true", help="add PEFT under torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for the results")
    options = parser.parse_args()
    device = torch.device(options.device)
    console = Console()

    rows, skipped = run(grid(device, options.quick), device, options.compiled, console)
    tables = [summary_table(rows), detail_table(rows)]
    for table in tables:
        table.show(console)
    folder = report.folder_for(device, options.out)
    figure = folder / "layer.png"
    try:
        from benchmarks.layer_figure import draw

        draw(rows, figure)
        picture = f"![Time and saved activations of one layer]({figure.name})\n"
    except ImportError:
        skipped["figure"] = "matplotlib is not installed"
        picture = ""
    record = report.record_head(device) | {
        "rows": [row.as_json() for row in rows],
        "skipped": skipped,
    }
    parts = ["# Layers\n", report.environment_markdown(record["environment"]), picture]
    parts += [table.markdown() for table in tables] + [report.skipped_markdown(skipped)]
    report.write(folder, "layer", record, "\n".join(part for part in parts if part))
    for name, reason in skipped.items():
        console.print(f"skipped: {name}: {reason}", style="yellow")
    console.print(f"written to {folder}")


if __name__ == "__main__":
    main()
