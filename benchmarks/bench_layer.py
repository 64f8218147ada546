"""One adapted layer, forward and backward: time, saved activations, peak memory.

Run with ``python -m benchmarks.bench_layer [--quick] [--out DIR]``.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, memory, report
from benchmarks.gate import check_case
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
        return asdict(self) | {"shape": self.shape.as_json()}


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


@dataclass(frozen=True)
class Report:
    """All measurements, and what was not measured: by name, with the reason.

    Attributes:
        rows: What was measured.
        skipped: Cannot run here.
        failed: Ran, and was wrong or broke down; never timed.
    """

    rows: list[Row]
    skipped: dict[str, str]
    failed: dict[str, str]


def run(shapes: Sequence[Shape], device: torch.device, compiled: bool, console: Console) -> Report:
    """Measure all shapes."""
    found = Report([], {}, {})
    table = providers(compiled)
    with console.progress() as progress:
        task = progress.add_task("layers", total=len(shapes))
        for shape in shapes:
            progress.update(task, status=f"{shape.label} r={shape.r} p={shape.p}")
            inputs = Inputs.make(shape, device)
            cases = {}
            for name, setup in table.items():
                kind = "MergedLinear" if shape.enable_lora else "Linear"
                try:
                    case = setup(shape, inputs)
                    check_case(shape, case)
                    cases[name] = case
                except Skipped as reason:
                    found.skipped[f"{name} ({kind})"] = str(reason)
                except Exception as error:
                    # what is wrong is not timed; all else still is
                    where = f"{name}, {shape.label}, r={shape.r}, p={shape.p:g}"
                    first = str(error).strip().partition("\n")[0]
                    found.failed[where] = f"{type(error).__name__}: {first}"
            found.rows.extend(measure(shape, cases, device))
            progress.update(task, advance=1)
    return found


def run_once(shape: Shape, compiled: bool) -> None:
    """Run every step, for what its compilers leave on disk; what goes wrong is said later."""
    # there are several of these at once
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = Inputs.make(shape, device)
    for setup in providers(compiled).values():
        try:
            setup(shape, inputs).step()
        except Exception:
            continue


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


def overview_table(rows: Sequence[Row]) -> report.Table:
    """Time over that of the frozen layer: a line a shape, a column a provider."""
    names = [name for name in dict.fromkeys(row.provider for row in rows) if name != BASELINE]
    out: list[list[str]] = []
    for shape, group in groupby(rows, key=lambda row: row.shape):
        medians = {row.provider: f"{row.vs_frozen.median:.2f}" for row in group}
        cells = [medians.get(name, "–") for name in names]
        out.append([shape.label, str(shape.r), f"{shape.p:g}", *cells])
    header = ("layer M×K→N", "r", "p", *names)
    return report.Table("Forward + backward, × frozen linear", header, out)


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


def main() -> int:
    """Command line; 1 where a provider was wrong."""
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

    shapes = grid(device, options.quick)
    if device.type == "cuda":
        with console.status("compiling"):
            harness.in_processes(run_once, [(shape, options.compiled) for shape in shapes])
    found = run(shapes, device, options.compiled, console)
    rows, skipped = found.rows, found.skipped
    tables = [summary_table(rows), detail_table(rows), overview_table(rows)]
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
        "failed": found.failed,
    }
    parts = ["# Layers\n", report.environment_markdown(record["environment"]), picture]
    parts += [table.markdown() for table in tables]
    parts += [report.skipped_markdown(found.failed, "Failed"), report.skipped_markdown(skipped)]
    report.write(folder, "layer", record, "\n".join(part for part in parts if part))
    for name, reason in skipped.items():
        console.print(f"skipped: {name}: {reason}", style="yellow")
    for name, reason in found.failed.items():
        console.print(f"failed: {name}: {reason}", style="red")
    console.print(f"written to {folder}")
    return 1 if found.failed else 0


if __name__ == "__main__":
    sys.exit(main())
