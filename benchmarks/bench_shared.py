"""Layers that share an input (q, k and v; gate and up): in one call, and in a call for each.

Run with ``python -m benchmarks.bench_shared [--quick] [--backend NAME] [--minutes N] [--out DIR]``.
Before a shape is timed, both are compared: outputs and gradients of factors bit for bit, and the
gradient of x, a sum in another order, by the rule of ``fastlora.testing``.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness, memory, report, survey
from benchmarks.gate import poisoned
from benchmarks.harness import Spread
from benchmarks.shapes import DROPOUT
from benchmarks.survey import Clock, Found
from benchmarks.terminal import Console
from fastlora import backends, testing
from fastlora.functional import lora_linear, multi_lora_linear

FROZEN, APART, TOGETHER = "frozen linears", "a call for each", "one call"
TOKENS, QUICK_TOKENS = (32, 512, 2048, 8192), (32, 512)
GPU_TOKENS = (8192,)
# K, and N of each: q, k and v of BERT-base or GPT-2, and of Llama-3-8B; its gate and up
CPU_LAYERS = ((768, (768, 768, 768)), (768, (3072, 3072)))
GPU_LAYERS = ((4096, (4096, 1024, 1024)), (4096, (14336, 14336)))


@dataclass(frozen=True)
class Row:
    """One way to run the layers at one shape."""

    layers: str
    p: float
    way: str
    seconds: Spread
    vs_frozen: Spread
    vs_apart: Spread
    saved: int
    peak: int
    host_bound: bool


class Shared:
    """The operands of layers that share x, and the ways to run them."""

    def __init__(self, M: int, K: int, widths: Sequence[int], p: float, device: torch.device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.inputs = [
            testing.make_inputs(M, K, N, 8, p=p, dtype=dtype, device=device, bias=False, seed=i)
            for i, N in enumerate(widths)
        ]
        self.x = self.inputs[0].x.requires_grad_()
        self.inputs = [replace(i, x=self.x) for i in self.inputs]
        self.factors = [t.requires_grad_() for i in self.inputs for t in (i.lora_A, i.lora_B)]
        self.ways: dict[str, Callable[[], Sequence[Tensor]]] = {
            FROZEN: lambda: [F.linear(self.x, i.weight) for i in self.inputs],
            APART: self._apart,
            TOGETHER: self._together,
        }

    def _apart(self) -> Sequence[Tensor]:
        return [
            lora_linear(self.x, i.weight, i.lora_A, i.lora_B, scaling=i.scaling, p=i.p, seed=i.seed)
            for i in self.inputs
        ]

    def _together(self) -> Sequence[Tensor]:
        of = self.inputs
        return multi_lora_linear(
            self.x,
            [i.weight for i in of],
            [i.lora_A for i in of],
            [i.lora_B for i in of],
            scaling=of[0].scaling,
            p=of[0].p,
            seeds=[i.seed for i in of],
        )

    def step(self, way: str) -> tuple[Tensor, ...]:
        """Outputs and gradients, that of x first."""
        Y = self.ways[way]()
        leaves = [self.x, *([] if way == FROZEN else self.factors)]
        return *torch.autograd.grad(Y, leaves, [i.grad for i in self.inputs]), *Y

    def check(self) -> None:
        """Raises AssertionError where one call gives something else than a call for each."""
        with poisoned():
            (d_x, *rest), (_, *expected) = self.step(TOGETHER), self.step(APART)
        if not all(map(torch.equal, rest, expected)):
            raise AssertionError("not bit for bit what each layer gives alone")
        plain = torch.stack([testing.composition(i)["d_x"] for i in self.inputs]).sum(0)
        exact = torch.stack([testing.truth(i)["d_x"] for i in self.inputs]).sum(0)
        testing.assert_no_worse({"d_x": d_x}, {"d_x": plain}, {"d_x": exact})

    def resident(self) -> list[Tensor]:
        """Tensors that live outside the step."""
        return [self.x, *self.factors, *(t for i in self.inputs for t in (i.weight, i.grad))]


def label(M: int, K: int, widths: Sequence[int]) -> str:
    """What layers are called in the report."""
    return f"{M}×{K}→{'+'.join(map(str, widths))}"


def measure(M: int, K: int, widths: Sequence[int], p: float, device: torch.device) -> list[Row]:
    """Check the two ways against each other, then time them beside the frozen layers."""
    shared = Shared(M, K, widths, p, device)
    shared.check()
    steps = {way: lambda way=way: shared.step(way) for way in shared.ways}
    samples = harness.time_rounds(steps, device)
    frozen, apart = harness.ratios(samples, FROZEN), harness.ratios(samples, APART)
    return [
        Row(
            label(M, K, widths),
            p,
            way,
            Spread.of(samples[way]),
            frozen[way],
            apart[way],
            memory.saved_bytes(shared.ways[way], shared.resident()),
            memory.peak_bytes(steps[way], device),
            way in samples.host_bound,
        )
        for way in shared.ways
    ]


def table(rows: Sequence[Row]) -> report.Table:
    """Every measurement."""
    header = ("way", "layers M×K→N", "p", "ms", "× frozen", "× apart", "saved MiB", "peak MiB")
    cells = [
        [
            row.way,
            row.layers,
            f"{row.p:g}",
            report.starred(f"{row.seconds.median * 1e3:.2f}", row.host_bound),
            report.ratio(row.vs_frozen),
            report.ratio(row.vs_apart),
            report.mib(row.saved),
            report.mib(row.peak),
        ]
        for row in rows
    ]
    title = "Forward + backward of layers that share an input, r = 8"
    return report.Table(title, header, cells, report.host_note(rows))


def write(folder: Path, head: dict[str, Any], found: Found) -> None:
    """``shared.json`` and ``shared.md``, with what was found until now."""
    record = head | {
        "rows": [asdict(row) for row in found.rows],
        "skipped": found.skipped,
        "failed": found.failed,
    }
    parts = ["# Layers that share an input\n", report.environment_markdown(head["environment"])]
    parts += [table(found.rows).markdown(), found.markdown()]
    report.write(folder, "shared", record, "\n".join(part for part in parts if part))


def main() -> int:
    """Command line; 1 where one call was not what a call for each is, or something broke down."""
    parser = argparse.ArgumentParser(prog="benchmarks.bench_shared", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few tokens only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto", choices=("auto", *backends.NAMES))
    survey.add_minutes(parser)
    parser.add_argument("--out", type=Path, help="folder for the results")
    options = parser.parse_args()
    device, console = torch.device(options.device), Console()
    clock, found, folder = Clock(options.minutes), Found(), report.folder_for(device, options.out)
    head = report.record_head(device) | {"backend": options.backend}
    layers = GPU_LAYERS if device.type == "cuda" else CPU_LAYERS
    quick = GPU_TOKENS if device.type == "cuda" else QUICK_TOKENS
    shapes = {
        f"{label(M, K, widths)}, p={p:g}": (M, K, widths, p)
        for K, widths in layers
        for M in (quick if options.quick else TOKENS)
        for p in DROPOUT
    }

    def at(shape: tuple[int, int, Sequence[int], float]) -> None:
        found.rows.extend(measure(*shape, device))

    def save() -> None:
        write(folder, head, found)

    with backends.use_backend(options.backend):
        survey.visit("layers", shapes, at, save, found, device, clock, console)
    table(found.rows).show(console)
    return found.conclude(folder, console)


if __name__ == "__main__":
    sys.exit(main())
