"""One adapted layer, forward and backward: time, saved activations, peak memory.

Run with ``python -m benchmarks.bench_layer [--quick] [--minutes N] [--out DIR]``.
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

from benchmarks import harness, memory, report, survey
from benchmarks.gate import check_case
from benchmarks.harness import Spread
from benchmarks.providers import BASELINE, Case, Inputs, Setup, Skipped, providers
from benchmarks.shapes import Shape, grid
from benchmarks.survey import Clock, Found
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
    host_bound: bool

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
            name in samples.host_bound,
        )
        for name, case in cases.items()
    ]


def where(shape: Shape) -> str:
    """What a shape is called in the report."""
    return f"{shape.label}, r={shape.r}, p={shape.p:g}"


def run(
    shapes: Sequence[Shape],
    device: torch.device,
    compiled: bool,
    console: Console,
    clock: Clock,
    found: Found,
    save: Callable[[], None],
) -> None:
    """Measure all shapes, as far as the time goes."""
    table = providers(compiled)

    def at(shape: Shape) -> None:
        cases = right_cases(shape, table, device, found)
        if BASELINE in cases:
            found.rows.extend(measure(shape, cases, device))

    named = {where(shape): shape for shape in shapes}
    survey.visit("layers", named, at, save, found, device, clock, console)


def right_cases(
    shape: Shape, table: dict[str, Setup], device: torch.device, found: Found
) -> dict[str, Case]:
    """The providers that run this shape and are right; what is wrong is not timed."""
    inputs = Inputs.make(shape, device)
    cases = {}
    for name, setup in table.items():
        try:
            case = setup(shape, inputs)
            check_case(shape, case)
            # what breaks down after all is left out alone
            case.step()
            harness.synchronize(device)
            cases[name] = case
        except Skipped as reason:
            kind = "MergedLinear" if shape.enable_lora else "Linear"
            found.skipped[f"{name} ({kind})"] = str(reason)
        except Exception as error:
            found.failed[f"{name}, {where(shape)}"] = harness.first_line(error)
            harness.check_device(device)
    return cases


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
                of_frozen = report.starred(report.ratio(frozen), any(r.host_bound for r in own))
                out.append([name, group, f"{p:g}", of_frozen, report.ratio(loralib)])
            out.append([])
    header = ("provider", "layer", "p", "× frozen", "× loralib")
    title = "Forward + backward time, geometric means over the grid"
    return report.Table(title, header, out, report.host_note(rows))


def overview_table(rows: Sequence[Row]) -> report.Table:
    """Time over that of the frozen layer: a line a shape, a column a provider."""
    names = [name for name in dict.fromkeys(row.provider for row in rows) if name != BASELINE]
    out: list[list[str]] = []
    for shape, group in groupby(rows, key=lambda row: row.shape):
        medians = {
            row.provider: report.starred(f"{row.vs_frozen.median:.2f}", row.host_bound)
            for row in group
        }
        cells = [medians.get(name, "–") for name in names]
        out.append([shape.label, str(shape.r), f"{shape.p:g}", *cells])
    header = ("layer M×K→N", "r", "p", *names)
    title = "Forward + backward, × frozen linear"
    return report.Table(title, header, out, report.host_note(rows))


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
                    report.starred(f"{row.seconds.median * 1e3:.2f}", row.host_bound),
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
    title = "Forward + backward of one layer"
    return report.Table(title, header, out, report.host_note(rows))


def tables(rows: Sequence[Row]) -> list[report.Table]:
    """All of the report."""
    return [summary_table(rows), detail_table(rows), overview_table(rows)]


def write(folder: Path, head: dict[str, Any], found: Found, picture: str = "") -> None:
    """``layer.json`` and ``layer.md``, with what was found until now."""
    record = head | {
        "rows": [row.as_json() for row in found.rows],
        "skipped": found.skipped,
        "failed": found.failed,
    }
    parts = ["# Layers\n", report.environment_markdown(head["environment"]), picture]
    parts += [*(table.markdown() for table in tables(found.rows)), found.markdown()]
    report.write(folder, "layer", record, "\n".join(part for part in parts if part))


def picture_of(found: Found, folder: Path) -> str:
    """Draw the figure; its place in the report, or nothing where there is none."""
    figure = folder / "layer.png"
    try:
        from benchmarks.layer_figure import draw

        draw(found.rows, figure)
    except ImportError:
        found.skipped["figure"] = "matplotlib is not installed"
    except Exception as error:
        found.failed["figure"] = harness.first_line(error)
    else:
        return f"![Time and saved activations of one layer]({figure.name})\n"
    return ""


def main() -> int:
    """Command line; 1 where a provider was wrong."""
    parser = argparse.ArgumentParser(prog="benchmarks.bench_layer", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a part of the grid")
    size.add_argument("--full", action="store_true", help="the whole grid (the default)")
    parser.add_argument("--compiled", action="store_true", help="add PEFT under torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    survey.add_minutes(parser)
    parser.add_argument("--out", type=Path, help="folder for the results")
    options = parser.parse_args()
    device = torch.device(options.device)
    console, clock, found = Console(), Clock(options.minutes), Found()
    folder, head = report.folder_for(device, options.out), report.record_head(device)

    shapes = grid(device, options.quick)
    if device.type == "cuda":
        calls = [(shape, options.compiled) for shape in shapes]
        with console.status("compiling"):
            harness.in_processes(run_once, calls, clock.to_compile())

    def save() -> None:
        write(folder, head, found)

    run(shapes, device, options.compiled, console, clock, found, save)
    for table in tables(found.rows):
        table.show(console)
    if found.rows:
        write(folder, head, found, picture_of(found, folder))
    return found.conclude(folder, console)


if __name__ == "__main__":
    sys.exit(main())
