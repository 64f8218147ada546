"""Instructions of one adapted layer, forward and backward, counted by Valgrind: free of noise.

Run with ``python -m benchmarks.bench_instructions [--out DIR]``. One thread; Valgrind knows no
AVX-512, so every library takes its AVX2 path. A few minutes a provider.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from benchmarks import report
from benchmarks.gate import check
from benchmarks.providers import BASELINE
from benchmarks.shapes import DROPOUT, Shape
from benchmarks.terminal import Console

PROVIDERS = (BASELINE, "loralib", "PEFT", "fastlora")
SIZES = (512, 768, 768, 8)
SETUP = """
import sys
sys.path.insert(0, {root!r})
import torch
from benchmarks.providers import Inputs, providers
from benchmarks.shapes import Shape
shape = Shape({sizes}, p={p})
case = providers()[{provider!r}](shape, Inputs.make(shape, torch.device("cpu")))
case.step()
case.step()
"""


def count(provider: str, p: float) -> int:
    """Instructions of one step, all of the process: Python, dispatch, kernels."""
    sizes = ", ".join(map(str, SIZES))
    root = str(Path(__file__).parents[1])
    setup = SETUP.format(root=root, sizes=sizes, p=p, provider=provider)
    stats = Timer("case.step()", setup).collect_callgrind(number=1, collect_baseline=False)
    return stats.counts()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.bench_instructions", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the results")
    options = parser.parse_args()
    if not shutil.which("valgrind"):
        raise SystemExit("valgrind: not found, expected it on PATH")
    # the timer starts whatever is called python there
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    console, rows = Console(), []
    shape = Shape(*SIZES, p=0.0)
    with console.progress() as progress:
        task = progress.add_task("instructions", total=len(DROPOUT) * len(PROVIDERS))
        for p in DROPOUT:
            check(Shape(*SIZES, p=p), torch.device("cpu"))
            for provider in PROVIDERS:
                progress.update(task, status=f"{provider} p={p:g}")
                rows.append({"provider": provider, "p": p, "instructions": count(provider, p)})
                progress.update(task, advance=1)

    frozen = {row["p"]: row["instructions"] for row in rows if row["provider"] == BASELINE}
    cells = [
        [
            row["provider"],
            f"{row['p']:g}",
            f"{row['instructions'] / 1e6:.1f}",
            f"{row['instructions'] / frozen[row['p']]:.3f}",
        ]
        for row in rows
    ]
    title = f"Instructions of forward + backward, {shape.label}, r={shape.r}, AVX2, one thread"
    table = report.Table(title, ("provider", "p", "millions", "× frozen"), cells)
    table.show(console)
    folder = report.folder_for(torch.device("cpu"), options.out)
    record = report.record_head(torch.device("cpu")) | {"sizes": SIZES, "rows": rows}
    head = f"# Instructions\n\n{report.environment_markdown(record['environment'])}\n"
    report.write(folder, "instructions", record, head + table.markdown())
    console.print(f"written to {folder}")


if __name__ == "__main__":
    main()
