"""Each Triton and CUDA kernel alone, and the base products, beside the best of the device.

Run with ``python -m benchmarks.bench_stages [--quick] [--host] [--minutes N] [--out DIR]``. It
needs a GPU. Bytes and operations are those of a stage's formula in ``docs/math.md``: partial sums
and what is read twice count for nothing, so a stage at 100 % could not be faster.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import bench_layer, harness, report, survey
from benchmarks.gate import poisoned
from benchmarks.harness import Spread, Step
from benchmarks.providers import BASELINE, Inputs, Skipped, providers
from benchmarks.shapes import DROPOUT, Shape, gpu_shapes
from benchmarks.survey import Clock, Found
from benchmarks.terminal import Console

P = DROPOUT[1]
# for all steps of one shape together
ROUNDS = {"budget_s": 0.6, "min_rounds": 7, "max_rounds": 40}
COPY_BYTES = 2**30
# so small that its time is the host's
TINY = Shape(64, 64, 64, 16, 0.0, dtype=torch.bfloat16)
HOST_ROUNDS, HOST_STEPS = 9, 50

# by provider, seconds of a forward, and of a forward and backward
HostCosts = dict[str, tuple[Spread, Spread]]


@dataclass(frozen=True)
class Stage:
    """One thing to time, and what its formula asks for."""

    step: Step
    bytes: int
    flops: int


@dataclass(frozen=True)
class Ceilings:
    """The best of this device, measured: bytes and operations a second."""

    bandwidth: float
    arithmetic: float

    def share(self, stage: Stage, seconds: float) -> float:
        """The time that ``stage`` has to take, over the time it took."""
        return max(stage.bytes / self.bandwidth, stage.flops / self.arithmetic) / seconds


@dataclass(frozen=True)
class Row:
    """One stage at one shape; ``share`` of the ceiling, ``ratio`` to what it stands against."""

    shape: Shape
    stage: str
    seconds: Spread
    share: float
    against: str | None
    ratio: Spread | None
    host_bound: bool

    def as_json(self) -> dict[str, Any]:
        """Plain values only."""
        spreads = {"seconds": self.seconds, "ratio": self.ratio}
        values: dict[str, Any] = {"shape": self.shape.as_json(), "stage": self.stage}
        values |= {name: s and s.__dict__ for name, s in spreads.items()}
        others = ("share", "against", "host_bound")
        return values | {name: getattr(self, name) for name in others}


class Operands:
    """The tensors of all stages at one shape."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        from fastlora import dropout
        from fastlora.blocks import Blocks
        from fastlora.kernels.layout import Layout

        inputs = Inputs.make(shape, device)
        enabled = shape.enable_lora or (True,)
        self.shape = shape
        self.blocks = Blocks((shape.N // len(enabled),) * len(enabled), enabled)
        self.layout = Layout(*self.blocks.pattern)
        self.X, self.W, self.bias = inputs.x.detach(), inputs.weight, inputs.bias
        self.dY, self.A, self.B = inputs.grad, inputs.lora_A, inputs.lora_B
        self.S = torch.randn(shape.M, len(self.A), device=device)
        self.dS = torch.randn(shape.M, len(self.A), device=device)
        self.t = dropout.threshold(P)
        self.seed = torch.tensor([1], device=device)
        row_bytes = dropout.mask_bytes(shape.K)
        self.mask = torch.randint(256, (shape.M, row_bytes), dtype=torch.uint8, device=device)
        self.Y = self.dY.clone()
        self.dX = self.X.clone()


def kernels(o: Operands) -> dict[str, Stage]:
    """Our kernels in Triton."""
    from fastlora.kernels import delta, expand, grad_expand, grad_input, grad_shrink, shrink

    M, K, N = o.shape.M, o.shape.K, o.shape.N
    (R, _), (n, r) = o.A.shape, o.B.shape
    x, w, y, a, b, s, mask = map(_size, (o.X, o.W, o.dY, o.A, o.B, o.S, o.mask))
    adapted = y * n // N
    thin_K, thin_N, base = 2 * M * K * R, 2 * M * n * r, 2 * M * N * K
    stage = Stage
    return {
        "shrink, p=0": stage(
            lambda: shrink.shrink(o.X, o.A, 1.0, None, 0, None), x + a + s, thin_K
        ),
        "shrink": stage(
            lambda: shrink.shrink(o.X, o.A, 1.0, None, o.t, o.seed), x + a + s + mask, thin_K
        ),
        "expand_start": stage(
            lambda: expand.expand_start(o.X, N, o.bias, o.S, o.B, o.layout), s + b + y, thin_N
        ),
        "grad_expand": stage(
            lambda: grad_expand.grad_expand(o.dY, o.S, o.B, 1.0, None, o.layout, True, True),
            adapted + 2 * s + 2 * b,
            2 * thin_N,
        ),
        "grad_shrink": stage(
            lambda: grad_shrink.grad_shrink(o.dS, o.X, o.mask, o.A), s + x + mask + a, thin_K
        ),
        "grad_input_start": stage(
            lambda: grad_input.grad_input_start(o.dY, o.dS, o.A, o.mask), s + a + mask + x, thin_K
        ),
        "delta": stage(
            lambda: delta.delta(o.A, o.B, 1.0, None, o.layout),
            a + b + N * K * o.B.element_size(),
            2 * n * K * r,
        ),
        "expand_fused": stage(
            lambda: expand.expand_fused(o.X, o.W, o.bias, o.S, o.B, o.layout),
            x + w + s + b + y,
            base + thin_N,
        ),
        "grad_input_fused": stage(
            lambda: grad_input.grad_input_fused(o.dY, o.W, o.dS, o.A, o.mask),
            y + w + s + a + mask + x,
            base + thin_K,
        ),
    }


def in_place(o: Operands) -> dict[str, Stage]:
    """What the fused products stand against: the low-rank term, the base product added to it."""
    from fastlora.kernels import expand, grad_input

    fused = kernels(o)

    def forward() -> Tensor:
        start = expand.expand_start(o.X, o.shape.N, o.bias, o.S, o.B, o.layout)
        return start.addmm_(o.X, o.W.t())

    def backward() -> Tensor:
        return grad_input.grad_input_start(o.dY, o.dS, o.A, o.mask).addmm_(o.dY, o.W)

    return {
        "expand, in place": replace(fused["expand_fused"], step=forward),
        "grad_input, in place": replace(fused["grad_input_fused"], step=backward),
    }


def compiled(o: Operands) -> dict[str, Stage]:
    """The same in CUDA C++, where it is built; the two starts with their base products."""
    from fastlora.backends import native

    if native.why_not() or o.X.dtype not in native.dtypes.get(o.X.device.type, ()):
        return {}
    triton = kernels(o) | in_place(o)
    steps: dict[str, Step] = {
        "shrink, p=0": lambda: native.shrink(o.X, o.A, 1.0, 0, None),
        "shrink": lambda: native.shrink(o.X, o.A, 1.0, o.t, o.seed),
        "expand, in place": lambda: native.expand(o.X, o.W, o.bias, o.S, o.B, o.blocks),
        "grad_expand": lambda: native.grad_expand(o.dY, o.S, o.B, 1.0, o.blocks, True, True),
        "grad_shrink": lambda: native.grad_shrink(o.dS, o.X, o.mask, o.A),
        "grad_input, in place": lambda: native.grad_input(o.dY, o.W, o.dS, o.A, o.mask),
        "delta": lambda: native.delta(o.A, o.B, 1.0, o.blocks),
    }
    return {f"{name}{NATIVE}": replace(triton[name], step=step) for name, step in steps.items()}


def fused(o: Operands) -> dict[str, Stage]:
    """The fused products on CUTLASS, where they are built and take this shape."""
    from fastlora.backends import cutlass

    if cutlass.why_not() or o.X.device.type != "cuda" or o.X.dtype == torch.float32:
        return {}
    triton = kernels(o)
    steps: dict[str, Step] = {
        "grad_input_fused": lambda: cutlass.grad_input(o.dY, o.W, o.dS, o.A, o.mask)
    }
    if o.shape.enable_lora is None:
        steps["expand_fused"] = lambda: cutlass.expand(o.X, o.W, o.bias, o.S, o.B, o.blocks)
    return {f"{name}{CUTLASS}": replace(triton[name], step=step) for name, step in steps.items()}


def products(o: Operands) -> dict[str, Stage]:
    """The base products, and the same added to what is there."""
    x, w, y = map(_size, (o.X, o.W, o.dY))
    flops = 2 * o.shape.M * o.shape.N * o.shape.K
    return {
        "X Wᵀ": Stage(lambda: torch.mm(o.X, o.W.t(), out=o.Y), x + w + y, flops),
        "Y += X Wᵀ": Stage(lambda: o.Y.addmm_(o.X, o.W.t()), x + w + 2 * y, flops),
        "dY W": Stage(lambda: torch.mm(o.dY, o.W, out=o.dX), x + w + y, flops),
        "dX += dY W": Stage(lambda: o.dX.addmm_(o.dY, o.W), 2 * x + w + y, flops),
    }


PLAIN = ("X Wᵀ", "dY W")
# after the name of a stage in CUDA C++, and of one on CUTLASS
NATIVE, CUTLASS = " (native)", " (cutlass)"
# what is compared with what, round by round
AGAINST = {
    "Y += X Wᵀ": "X Wᵀ",
    "dX += dY W": "dY W",
    "expand_fused": "expand, in place",
    "grad_input_fused": "grad_input, in place",
    **{
        f"{name}{NATIVE}": name
        for name in ("shrink, p=0", "shrink", "grad_expand", "grad_shrink", "delta")
    },
    f"expand, in place{NATIVE}": "X Wᵀ",
    f"grad_input, in place{NATIVE}": "dY W",
    f"expand_fused{CUTLASS}": f"expand, in place{NATIVE}",
    f"grad_input_fused{CUTLASS}": f"grad_input, in place{NATIVE}",
}


def _size(t: Tensor) -> int:
    return t.numel() * t.element_size()


def stage_shapes(quick: bool) -> list[Shape]:
    """The shapes of the GPU grid, once each: stages with dropout and without stand side by side."""
    return list(dict.fromkeys(replace(shape, p=P) for shape in gpu_shapes(quick)))


def ceilings(shapes: Sequence[Shape], device: torch.device) -> Ceilings:
    """The bandwidth of a copy, and the best rate of a base product at any of these shapes."""
    # zeros would cost the memory less power
    source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = harness.time_rounds({"copy": lambda: target.copy_(source)}, device, **ROUNDS)
    rates = []
    for M, K, N in dict.fromkeys((s.M, s.K, s.N) for s in shapes):
        shape = next(s for s in shapes if (s.M, s.K, s.N) == (M, K, N))
        all_products = products(Operands(shape, device))
        steps = {name: all_products[name].step for name in PLAIN}
        samples = harness.time_rounds(steps, device, **ROUNDS)
        rates += [all_products[name].flops / Spread.of(samples[name]).median for name in PLAIN]
    return Ceilings(2 * COPY_BYTES / Spread.of(copies["copy"]).median, max(rates))


def reference_of(o: Operands) -> dict[str, Callable[[], Any]]:
    """What stages have to compute, in plain PyTorch; the two starts are checked with their sums."""
    from fastlora.backends import reference

    def forward() -> Tensor:
        return reference.expand(o.X, o.W, o.bias, o.S, o.B, o.blocks)

    def backward() -> Tensor:
        return reference.grad_input(o.dY, o.W, o.dS, o.A, o.mask)

    return {
        "shrink, p=0": lambda: reference.shrink(o.X, o.A, 1.0, 0, None),
        "shrink": lambda: reference.shrink(o.X, o.A, 1.0, o.t, o.seed),
        "expand, in place": forward,
        "expand_fused": forward,
        "grad_expand": lambda: reference.grad_expand(o.dY, o.S, o.B, 1.0, o.blocks, True, True),
        "grad_shrink": lambda: reference.grad_shrink(o.dS, o.X, o.mask, o.A),
        "grad_input, in place": backward,
        "grad_input_fused": backward,
        "delta": lambda: reference.delta(o.A, o.B, 1.0, o.blocks),
    }


# of the largest element: some units in the last place of what is rounded on the way; of float32 so
# few that TF32 is found out
CLOSE = {2: 2**-6, 4: 2**-15}


def close(got: Any, expected: Any, operands: Tensor) -> bool:
    """Whether two results of a stage differ by little, for the dtype of its operands.

    This finds a kernel that is broken, not one that rounds once too often: ``gate`` does.
    """
    if isinstance(expected, tuple):
        return all(close(g, e, operands) for g, e in zip(got, expected, strict=True))
    if expected is None:
        return True
    if not expected.is_floating_point():
        return torch.equal(got, expected)
    if got.shape != expected.shape:
        return False
    got, expected = got.float(), expected.float()
    error, largest = (got - expected).abs().max(), expected.abs().max()
    return bool(error <= CLOSE[operands.element_size()] * largest)


def where(shape: Shape) -> str:
    """What a shape is called in the report."""
    return f"{shape.label}, r={shape.r}"


def measure(shape: Shape, device: torch.device, best: Ceilings, found: Found) -> None:
    """All stages of one shape, in the same rounds; what is wrong is not timed."""
    o = Operands(shape, device)
    stages = products(o) | right_stages(o, device, found)
    steps = {name: stage.step for name, stage in stages.items()}
    samples = harness.time_rounds(steps, device, **ROUNDS)
    for name, stage in stages.items():
        seconds, other = Spread.of(samples[name]), AGAINST.get(name)
        ratio = harness.ratios(samples, other)[name] if other in samples else None
        share, bound = best.share(stage, seconds.median), name in samples.host_bound
        found.rows.append(Row(shape, name, seconds, share, other if ratio else None, ratio, bound))


def right_stages(o: Operands, device: torch.device, found: Found) -> dict[str, Stage]:
    """Our stages at one shape, as far as they run and are right."""
    expected, right = reference_of(o), {}
    for name, stage in (in_place(o) | kernels(o) | compiled(o) | fused(o)).items():
        try:
            with poisoned():
                got = stage.step()
            truth = expected.get(name.removesuffix(NATIVE).removesuffix(CUTLASS))
            if truth and not close(got, truth(), o.X):
                raise AssertionError("differs from the reference")
            harness.synchronize(device)
            right[name] = stage
        except Exception as error:
            found.failed[f"{name}, {where(o.shape)}"] = harness.first_line(error)
            harness.check_device(device)
    return right


def host_cost(device: torch.device) -> tuple[HostCosts, dict[str, str]]:
    """Seconds of the host for a forward, and for a forward and backward, without waiting for it.

    The layer is so small that the device is done with it before the host can launch the next. What
    does not run is left out, and given back with the reason.
    """
    failed: dict[str, str] = {}
    steps: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
    inputs = Inputs.make(TINY, device)
    for name, setup in providers().items():
        try:
            case = setup(TINY, inputs)
            case.step()
        except Skipped:
            continue
        except Exception as error:
            failed[name] = harness.first_line(error)
            continue
        steps[name] = (case.forward, case.step)
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in steps}
    for index in range(HOST_ROUNDS + 1):
        for name in harness.rotated(list(steps), index):
            for step, seconds in zip(steps[name], found[name], strict=True):
                harness.synchronize(device)
                start = time.perf_counter()
                for _ in range(HOST_STEPS):
                    step()
                seconds.append((time.perf_counter() - start) / HOST_STEPS)
    # the first round warms up
    spreads = {
        name: (Spread.of(forward[1:]), Spread.of(both[1:]))
        for name, (forward, both) in found.items()
    }
    return spreads, failed


def run_once(shape: Shape) -> None:
    """Run every kernel, for what its compiler leaves on disk; what goes wrong is said later."""
    if shape == TINY:
        return bench_layer.run_once(shape, compiled=False)
    for stage in kernels(Operands(shape, needs_gpu())).values():
        try:
            stage.step()
        except Exception:
            continue


def stage_table(rows: Sequence[Row]) -> report.Table:
    """Every measurement."""
    out: list[list[str]] = []
    last = None
    for row in rows:
        if last is not None and row.shape != last:
            out.append([])
        last = row.shape
        out.append(
            [
                row.stage,
                row.shape.label,
                str(row.shape.r),
                report.starred(f"{row.seconds.median * 1e6:.1f}", row.host_bound),
                f"{100 * row.share:.0f}",
                f"{report.ratio(row.ratio)} {row.against}" if row.against else "–",
            ]
        )
    header = ("stage", "layer M×K→N", "r", "µs", "% of ceiling", "× what it stands against")
    return report.Table("Stages", header, out, report.host_note(rows))


def host_table(found: HostCosts) -> report.Table:
    """Microseconds of the host."""
    floor = found[BASELINE][1].median if BASELINE in found else None
    out = [
        [
            name,
            f"{forward.median * 1e6:.0f}",
            f"{both.median * 1e6:.0f}",
            f"[{both.low * 1e6:.0f}–{both.high * 1e6:.0f}]",
            "–" if floor is None else f"{(both.median - floor) * 1e6:+.0f}",
        ]
        for name, (forward, both) in found.items()
    ]
    header = ("provider", "forward µs", "forward + backward µs", "quartiles", "over frozen µs")
    return report.Table("The host's time, per call", header, out)


def run_stages(
    device: torch.device, quick: bool, out: Path | None, console: Console, clock: Clock, host: bool
) -> int:
    """Measure all stages and write ``stages.json`` and ``stages.md``; 1 where one was wrong.

    With ``host`` what :func:`run_host` measures is a part of them.
    """
    shapes, found, costs = stage_shapes(quick), Found(), HostCosts()
    folder, head = report.folder_for(device, out), report.record_head(device)
    if device.type == "cuda":
        with console.status("compiling"):
            calls = [(shape,) for shape in ([TINY] if host else []) + shapes]
            harness.in_processes(run_once, calls, clock.to_compile())
    with console.status("ceilings"):
        best = ceilings(shapes, device)
    console.print(
        f"copy {best.bandwidth / 1e12:.2f} TB/s, product {best.arithmetic / 1e12:.0f} TFLOP/s"
    )

    def at(shape: Shape) -> None:
        measure(shape, device, best, found)

    def at_host(shape: Shape) -> None:
        measured, failed = host_cost(device)
        costs.update(measured)
        found.failed.update({f"host, {name}": why for name, why in failed.items()})

    def save() -> None:
        write_stages(folder, head, best, found, costs)

    usual = {where(shape): shape for shape in shapes if shape.r == TINY.r}
    others = {where(shape): shape for shape in shapes if shape.r != TINY.r}
    for title, what, measured in (
        ("stages", usual, at),
        ("host", {"the host's time": TINY} if host else {}, at_host),
        ("stages at other ranks", others, at),
    ):
        if not survey.visit(title, what, measured, save, found, device, clock, console):
            break
    stage_table(found.rows).show(console)
    if costs:
        host_table(costs).show(console)
    return found.conclude(folder, console)


def write_stages(
    folder: Path, head: dict[str, Any], best: Ceilings, found: Found, costs: HostCosts
) -> None:
    """``stages.json`` and ``stages.md``, with what was found until now."""
    record = head | {
        "bandwidth": best.bandwidth,
        "arithmetic": best.arithmetic,
        "rows": [row.as_json() for row in found.rows],
        **({"host": host_record(costs)} if costs else {}),
        "skipped": found.skipped,
        "failed": found.failed,
    }
    said = (
        f"The ceilings, measured in the same run: {best.bandwidth / 1e12:.2f} TB/s (copy of "
        f"{COPY_BYTES / 2**30:g} GiB), {best.arithmetic / 1e12:.0f} TFLOP/s (best base product "
        f"of these shapes). Dropout {P:g} where a stage has it and does not say otherwise.\n"
    )
    parts = ["# Stages\n", report.environment_markdown(head["environment"]), said]
    parts += [stage_table(found.rows).markdown(), host_markdown(costs) if costs else ""]
    parts += [found.markdown()]
    report.write(folder, "stages", record, "\n".join(part for part in parts if part))


def host_record(costs: HostCosts) -> dict[str, Any]:
    """Plain values only."""
    return {
        "sizes": TINY.as_json(),
        "rows": [
            {"provider": name, "forward": forward.__dict__, "both": both.__dict__}
            for name, (forward, both) in costs.items()
        ],
    }


def host_markdown(costs: HostCosts) -> str:
    """The table, and what it is of."""
    said = (
        f"A layer of {TINY.label}, r={TINY.r}, in bfloat16: {HOST_STEPS} calls one after the "
        "other, without waiting for the device.\n"
    )
    return f"{host_table(costs).markdown()}\n{said}"


def run_host(device: torch.device, out: Path | None, console: Console) -> int:
    """Measure the host's time and write ``host.json`` and ``host.md``; 1 where something failed."""
    found = Found()
    costs, failed = host_cost(device)
    found.failed.update(failed)
    host_table(costs).show(console)
    folder, head = report.folder_for(device, out), report.record_head(device)
    parts = ["# Host\n", report.environment_markdown(head["environment"])]
    parts += [host_markdown(costs), found.markdown()]
    record = head | host_record(costs)
    report.write(folder, "host", record, "\n".join(part for part in parts if part))
    return found.conclude(folder, console)


def needs_gpu() -> torch.device:
    """The GPU, or the CPU for Triton's interpreter.

    Raises:
        SystemExit: There is neither.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    raise SystemExit("no CUDA or ROCm device")


def main() -> int:
    """Command line; 1 where a stage was wrong, or a layer did not run."""
    parser = argparse.ArgumentParser(prog="benchmarks.bench_stages", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a part of the grid")
    parser.add_argument("--host", action="store_true", help="only what a call costs the host")
    survey.add_minutes(parser)
    parser.add_argument("--out", type=Path, help="folder for the results")
    options = parser.parse_args()
    device, console = needs_gpu(), Console()
    if options.host and device.type != "cuda":
        raise SystemExit("--host: needs a GPU, whose work the host does not wait for")
    if options.host:
        return run_host(device, options.out, console)
    on_gpu, clock = device.type == "cuda", Clock(options.minutes)
    return run_stages(device, options.quick, options.out, console, clock, host=on_gpu)


if __name__ == "__main__":
    sys.exit(main())
