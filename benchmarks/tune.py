"""Measures tile sizes on this GPU and writes them to ``kernels/tables/<architecture>.json``.

Run with ``python -m benchmarks.tune [--stage NAME] [--minutes 5] [--out FILE]``. Candidates for
each row of the present table are compiled in several processes, the commonest operands first. What
does not fit the device, or gives another result than the present config, is left out. The rest is
timed on one layer, and the best few on all. A row stays as it is where nothing is faster by a
hundredth, or where the time is up before its turn. The file is written after each row.

The table counts as measured, whereupon ``auto`` takes Triton, once all rows for 16-bit operands
were, and whole layers with them are nowhere slower than the composition that adds in place.

Which backend a layer takes is another thing, and another table: ``fastlora tune``.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import harness, report
from benchmarks.bench_stages import AGAINST, Operands, close, in_place, kernels, needs_gpu
from benchmarks.environment import environment
from benchmarks.gate import check_case, poisoned
from benchmarks.providers import Inputs, addmm_order, fastlora_with
from benchmarks.shapes import GPU_LAYERS, GPU_RANKS, Shape, gpu_shapes
from benchmarks.terminal import Console
from fastlora.kernels import configs
from fastlora.kernels.configs import Config, Table
from fastlora.kernels.launch import architecture

# in the order of what their users lose without it
KINDS = {
    "16": (torch.bfloat16, None),
    "mixed": (torch.bfloat16, torch.float32),
    "32": (torch.float32, None),
}
# what is timed for a stage of the table, by its names in ``bench_stages``
STEPS = {
    "shrink": ("shrink, p=0", "shrink"),
    "expand": ("expand_start",),
    "grad_expand": ("grad_expand",),
    "grad_shrink": ("grad_shrink",),
    "grad_input": ("grad_input_start",),
    "delta": ("delta",),
    "expand_fused": ("expand_fused",),
    "grad_input_fused": ("grad_input_fused",),
}
FUSED = ("expand_fused", "grad_input_fused")
LAYERS = GPU_LAYERS
RANKS = GPU_RANKS
FINALISTS = 4
# as much faster as it has to be: a table does not change for noise
GAIN = 0.99
ROUNDS = {"budget_s": 0.5, "min_rounds": 5, "max_rounds": 30}
# what tiles may have of the time, and with them fused products; whole layers have the rest
TILES_SHARE, FUSED_SHARE = 0.6, 0.8
COMPOSITION = "addmm order"
# what a program can have of a big GPU: a candidate above it is not even compiled
SHARED_BYTES = 227 * 1024

# BLOCK_M, BLOCK_N, BLOCK_K: zero where a stage has no such block
Tile = tuple[int, int, int]
# stage, kind and largest rank
Row = tuple[str, str, int | None]


def tiles(stage: str, kind: str) -> Iterator[Tile]:
    """Sizes of the tiles that are worth a trial."""
    small, wide = (32, 64, 128), (64, 128, 256)
    if stage == "grad_expand":
        yield from ((m, n, 0) for m, n in product(small, wide[:2]))
    elif stage == "grad_shrink":
        yield from ((m, 0, k) for m, k in product(small, wide[:2]))
    elif stage in FUSED:
        sides = ((64, 64), (128, 64), (128, 128)) if kind == "32" else ((128, 128), (128, 256))
        for (m, side), inner in product(sides, (32,) if kind == "32" else (64, 128)):
            yield (m, side, inner) if stage == "expand_fused" else (m, inner, side)
    else:
        for first, second in product(small, wide):
            if first * second <= 1 << 14:
                yield {
                    "expand": (first, second, 0),
                    "delta": (0, first, second),
                }.get(stage, (first, 0, second))


def candidates(stage: str, kind: str, present: Config) -> list[Config]:
    """Configs to try instead of the present one."""
    programs = present.programs
    depths: tuple[int, ...] = (1,)
    if stage in ("shrink", *FUSED):
        depths = (2, 3, 4)
    elif stage in ("grad_expand", "grad_shrink"):
        depths = (2, 3)
    if stage in FUSED:
        orders = [(programs, False), (programs, True), (max(1, programs // 2), True)]
    elif stage in ("grad_expand", "grad_shrink"):
        orders = [(programs, False), (2 * programs, False)]
    else:
        orders = [(programs, False)]
    trials = [
        replace(
            present,
            BLOCK_M=m,
            BLOCK_N=n,
            BLOCK_K=k,
            num_warps=warps,
            num_stages=depth,
            programs=count,
            persistent=goes_on,
        )
        for (m, n, k), warps, depth, (count, goes_on) in product(
            tiles(stage, kind), (4, 8), depths, orders
        )
    ]
    return [t for t in trials if t != present and _shared(stage, kind, t) <= SHARED_BYTES]


def _shared(stage: str, kind: str, trial: Config) -> int:
    """About the shared memory of the big operands' tiles; 0 where they are not kept there."""
    if trial.num_stages == 1:
        return 0
    m, n, k = trial.BLOCK_M, trial.BLOCK_N, trial.BLOCK_K
    elements = m * max(n, k)
    if stage == "expand_fused":
        elements = (m + n) * k
    elif stage == "grad_input_fused":
        elements = (m + k) * n
    return trial.num_stages * elements * KINDS[kind][0].itemsize


def ranks_of(table: Table, row: Row) -> list[int]:
    """The ranks to measure for a row: those of ``RANKS`` that come to it, 8 only if alone."""
    stage, kind, _ = row
    known = [most for of, most, _ in table.rows[stage] if of == kind]

    def chosen(r: int) -> int | None:
        return next((most for most in known if most is None or r <= most), -1)

    found = [r for r in RANKS if chosen(r) == row[2]]
    return [r for r in found if r >= 16] or found


def with_row(table: Table, row: Row, config: Config) -> Table:
    """The table with another config in one row."""
    stage, kind, most = row
    rows = tuple((k, m, config if (k, m) == (kind, most) else c) for k, m, c in table.rows[stage])
    return replace(table, rows={**table.rows, stage: rows})


def config_of(table: Table, row: Row) -> Config:
    """The config in one row."""
    return next(c for k, m, c in table.rows[row[0]] if (k, m) == row[1:])


@lru_cache(maxsize=1)
def operands(shape: Shape) -> Operands:
    """The tensors of one shape; those of one at a time are kept."""
    return Operands(shape, needs_gpu())


def shape_of(layer: tuple[int, int, int], r: int, kind: str) -> Shape:
    """A layer of the grid, with dropout."""
    dtype, factor_dtype = KINDS[kind]
    return Shape(*layer, r, 0.1, dtype=dtype, factor_dtype=factor_dtype)


def step_of(names: Sequence[str], shape: Shape, table: Table) -> Callable[[], tuple[Any, ...]]:
    """Runs stages of ``bench_stages`` with the configs of ``table``."""
    o = operands(shape)
    stages = in_place(o) | kernels(o)
    steps = [stages[name].step for name in names]

    def step() -> tuple[Any, ...]:
        with mock.patch.object(configs, "table", lambda architecture: table):
            return tuple(step() for step in steps)

    return step


def attempt(names: Sequence[str], shape: Shape, table: Table) -> str | None:
    """Compile and run once, in a process of its own: None, or why that did not work."""
    try:
        step_of(names, shape, table)()
        harness.synchronize(needs_gpu())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


Trial = tuple[Sequence[str], Shape, Table]


def viable(trials: Sequence[Trial], end: float) -> list[bool]:
    """Which of these compile and run, found in several processes; on a CPU all are let through."""
    if needs_gpu().type == "cpu":
        return [True] * len(trials)
    results = harness.in_processes(attempt, trials, max(1.0, end - time.perf_counter()))
    return [result is None for result in results]


def right(names: Sequence[str], shape: Shape, table: Table, present: Table) -> bool:
    """Whether ``table`` works at this shape and gives the result of the present one."""
    try:
        with poisoned():
            got = step_of(names, shape, table)()
        harness.synchronize(needs_gpu())
    except Exception:
        harness.check_device(needs_gpu())
        return False
    return close(got, step_of(names, shape, present)(), operands(shape).X)


def compare(
    names: Sequence[str], shape: Shape, trials: Sequence[Config], row: Row, present: Table
) -> dict[Config, float]:
    """Time over that of the present config, for each trial that is right."""
    tables = {trial: with_row(present, row, trial) for trial in trials}
    steps: dict[Any, harness.Step] = {
        trial: step_of(names, shape, table)
        for trial, table in tables.items()
        if right(names, shape, table, present)
    }
    if not steps:
        return {}
    steps[None] = step_of(names, shape, present)
    samples = harness.time_rounds(steps, needs_gpu(), **ROUNDS)
    ratios = harness.ratios(samples, None)
    return {trial: ratios[trial].median for trial in steps if trial is not None}


def tune(
    present: Table,
    rows: Sequence[Row],
    end: float,
    console: Console,
    save: Callable[[dict[Row, Config]], None],
) -> dict[Row, Config]:
    """The best config of each row that was measured on all layers in time; saved row by row."""
    start, first = time.perf_counter(), LAYERS[0]
    rows = [row for row in rows if ranks_of(present, row)]
    trials = {row: candidates(*row[:2], config_of(present, row)) for row in rows}

    def jobs(layers: Sequence[tuple[int, int, int]]) -> list[tuple[Row, Config, Trial]]:
        return [
            (row, t, (STEPS[row[0]], shape_of(layer, r, row[1]), with_row(present, row, t)))
            for row, of_row in trials.items()
            for r in (ranks_of(present, row) if len(layers) > 1 else ranks_of(present, row)[:1])
            for layer in layers
            # last: operands stay as long as the shape does
            for t in (config_of(present, row), *of_row)
        ]

    def sift(layers: Sequence[tuple[int, int, int]], until: float) -> None:
        wanted = jobs(layers)
        with console.status(f"compiling {len(wanted)} candidates"):
            works = viable([trial for *_, trial in wanted], until)
        failed = {(row, t) for (row, t, _), fine in zip(wanted, works, strict=True) if not fine}
        for row in rows:
            trials[row] = [t for t in trials[row] if (row, t) not in failed]

    sift([first], start + 0.4 * (end - start))
    for row in rows:
        late = time.perf_counter() > end
        shape = shape_of(first, ranks_of(present, row)[0], row[1])
        found = {} if late else compare(STEPS[row[0]], shape, trials[row], row, present)
        trials[row] = sorted(found, key=lambda trial: found[trial])[:FINALISTS]
    sift(LAYERS, time.perf_counter() + 0.4 * (end - time.perf_counter()))

    best: dict[Row, Config] = {}
    for row in rows:
        if not trials[row] or time.perf_counter() > end:
            continue
        ratios: dict[Config, list[float]] = {trial: [] for trial in trials[row]}
        shapes = [shape_of(layer, r, row[1]) for layer in LAYERS for r in ranks_of(present, row)]
        for shape in shapes:
            for trial, ratio in compare(STEPS[row[0]], shape, trials[row], row, present).items():
                ratios[trial].append(ratio)
        means = {
            trial: statistics.geometric_mean(values)
            for trial, values in ratios.items()
            if len(values) == len(shapes)
        }
        winner = min(means, key=lambda trial: means[trial], default=None)
        faster = winner is not None and means[winner] < GAIN
        best[row] = winner if faster else config_of(present, row)
        said = f"{means[winner]:.3f} × the time before" if faster else "stays"
        console.print(f"{' '.join(map(str, row))}: {said}")
        save(best)
    return best


def tune_fused(table: Table, stages: Sequence[str], end: float) -> set[tuple[Any, ...]]:
    """Where a fused product, with a mask, beats the product in place: keys as in ``Table``.

    What has no turn in time stays as it is in ``table``.
    """
    found = {key for key in table.fused if key[0] in stages}
    wanted = [
        (stage, kind, shape_of(layer, r, kind))
        for kind, layer, r, stage in product(KINDS, LAYERS, RANKS, stages)
    ]
    trials = [((stage, AGAINST[stage]), shape, table) for stage, _, shape in wanted]
    works = viable(trials, (time.perf_counter() + end) / 2)
    for (stage, kind, shape), fine in zip(wanted, works, strict=True):
        if time.perf_counter() > end:
            break
        key = (stage, kind, shape.M, shape.N, shape.K, shape.r)
        faster = fine and fused_is_faster(stage, shape, table)
        found = found | {key} if faster else found - {key}
    return found


def fused_is_faster(stage: str, shape: Shape, table: Table) -> bool:
    """Whether a fused product is right at this shape, and faster than the product in place."""
    names = {name: step_of([name], shape, table) for name in (stage, AGAINST[stage])}
    with poisoned():
        results = [step() for step in names.values()]
    if not close(*results, operands(shape).X):
        return False
    samples = harness.time_rounds(names, needs_gpu(), **ROUNDS)
    ratio = harness.ratios(samples, AGAINST[stage])[stage]
    return ratio.median < GAIN and ratio.high < 1


def layers_to_hold() -> list[Shape]:
    """The layers of the grid, of one dtype, at which Triton may not be slower."""
    return [s for s in gpu_shapes(quick=False) if s.r == 16 and s.factors == s.dtype]


def objections(table: Table, end: float) -> Iterator[str]:
    """The layers at which Triton's, with this table, was not shown to be right and fast enough."""
    for shape in layers_to_hold():
        where = f"{shape.label}, r={shape.r}, p={shape.p:g}"
        if time.perf_counter() > end:
            yield f"{where}: the time was up before its turn"
            continue
        try:
            ratio = layer_ratio(shape, table)
        except Exception as error:
            yield f"{where}: {harness.first_line(error)}"
            harness.check_device(needs_gpu())
            continue
        if ratio > 1:
            yield f"{where}: {ratio:.3f} × {COMPOSITION}"


def layer_ratio(shape: Shape, table: Table) -> float:
    """The time of Triton's layer, forward and backward, over that of the composition."""
    inputs = Inputs.make(shape, needs_gpu())
    cases = {
        "triton": fastlora_with("triton")(shape, inputs),
        COMPOSITION: addmm_order(shape, inputs),
    }
    with mock.patch.object(configs, "table", lambda architecture: table):
        for case in cases.values():
            check_case(shape, case)
        steps = {name: case.step for name, case in cases.items()}
        samples = harness.time_rounds(steps, needs_gpu(), **ROUNDS)
    return harness.ratios(samples, COMPOSITION)["triton"].median


def as_text(table: Table, programs: int) -> str:
    """The table's file: a row a line."""
    rows = []
    for stage, of_stage in table.rows.items():
        for kind, most, config in of_stage:
            defaults = {"programs": programs, "persistent": False, "most_ranks": 64}
            sizes = {
                name: value
                for name, value in asdict(config).items()
                if name not in defaults or value != defaults[name]
            }
            rows.append(json.dumps([stage, kind, most, sizes]))
    shapes = [json.dumps(shape) for shape in sorted(table.fused)]
    return (
        "{\n"
        f' "origin": {json.dumps(table.origin, ensure_ascii=False)},\n'
        f' "measured": {json.dumps(table.measured)},\n'
        f' "programs": {programs},\n'
        ' "rows": [\n  ' + ",\n  ".join(rows) + "\n ],\n"
        ' "fused": [' + ("\n  " + ",\n  ".join(shapes) + "\n " if shapes else "") + "]\n}\n"
    )


def origin(device: torch.device) -> str:
    """Where rows measured here come from."""
    env: dict[str, Any] = environment(device)
    versions = ", ".join(f"{name} {env['packages'][name]}" for name in ("torch", "triton"))
    return f"measured on {env['device']}, {env['date'][:10]}, {versions}, commit {env['commit']}"


def origin_of(here: str, measured: int, total: int, before: str) -> str:
    """Where the rows of a table come from, of which some were measured here."""
    if measured == total:
        return here
    return f"{measured} of {total} rows {here}; the others: {before}"


def write(path: Path, table: Table) -> None:
    """The table's file, whole or as it was."""
    # as many as most rows have, so that few rows say it
    counts = [c.programs for of_stage in table.rows.values() for *_, c in of_stage]
    text = as_text(table, statistics.mode(counts))
    assert Table.parse(text).rows == table.rows
    report.write_whole(path, text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.tune", description=__doc__)
    parser.add_argument("--stage", choices=STEPS, help="this stage only")
    parser.add_argument("--minutes", type=float, default=5, help="about how long it may take")
    parser.add_argument("--out", type=Path, help="file to write instead of the package's")
    options = parser.parse_args()
    begin = time.perf_counter()
    device, console = needs_gpu(), Console()
    name = architecture(device)
    path = options.out or configs.FOLDER / f"{name}.json"
    present = configs.table(name)
    order = list(KINDS)
    rows = sorted(
        ((s, k, m) for s in present.rows for k, m, _ in present.rows[s] if s in STEPS),
        key=lambda row: order.index(row[1]),
    )
    chosen = [row for row in rows if options.stage in (None, row[0])]
    stages = [stage for stage in FUSED if options.stage in (None, stage)]
    here = origin(device)

    def until(share: float) -> float:
        return begin + share * 60 * options.minutes

    def with_rows(best: dict[Row, Config]) -> Table:
        table = replace(present, origin=origin_of(here, len(best), len(rows), present.origin))
        for row, config in best.items():
            table = with_row(table, row, config)
        return table

    def save(best: dict[Row, Config]) -> None:
        write(path, with_rows(best))

    best = tune(present, chosen, until(TILES_SHARE if stages else FUSED_SHARE), console, save)
    table = with_rows(best)
    if stages:
        with console.status("fused products"):
            kept = {shape for shape in present.fused if shape[0] not in stages}
            kept |= tune_fused(table, stages, until(FUSED_SHARE))
        table = replace(table, fused=frozenset(kept))
        write(path, table)
    if all(row in best for row in rows if row[1] == "16"):
        against = []
        for objection in objections(table, until(1)):
            console.print(f"auto does not take Triton: {objection}", style="yellow")
            against.append(objection)
        table = replace(table, measured=not against)
    write(path, table)
    console.print(
        f"{len(best)} of {len(chosen)} rows measured, {len(table.fused)} shapes fused: {path}"
    )


if __name__ == "__main__":
    main()
