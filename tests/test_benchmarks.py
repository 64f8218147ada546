"""The benchmarks run to their end, on small layers; what they say of peak memory holds anywhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastlora.backends import native

ROOT = Path(__file__).parents[1]

SCRIPT = """
import sys

if sys.argv.pop(1) == "plain":
    sys.modules["rich"] = None
from benchmarks import bench_layer, shapes

blocks = (None, (True, False, True))
small = [shapes.Shape(64, 96, 192, 8, p, on) for p in (0.0, 0.1) for on in blocks]
bench_layer.grid = lambda device, quick: small[: 1 + 3 * quick]
bench_layer.main()
"""


@pytest.mark.parametrize(("terminal", "size"), [("plain", "--quick"), ("rich", "--full")])
def test_layer_benchmark(terminal, size, tmp_path):
    command = [sys.executable, "-c", SCRIPT, terminal, size, "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "× loralib" in result.stdout
    record = json.loads((tmp_path / "layer.json").read_text())
    measured = {row["provider"] for row in record["rows"]}
    assert {"frozen linear", "loralib", "PEFT", "fastlora"} <= measured
    assert all(row["seconds"]["median"] > 0 for row in record["rows"])
    assert "| fastlora |" in (tmp_path / "layer.md").read_text()


LATE = """
import os, sys, torch
from benchmarks import bench_layer, harness, providers, shapes

case = sys.argv.pop(1)
layers = [shapes.Shape(64, 96, 192, r, 0.1) for r in (8, 16, 4)]
bench_layer.grid = lambda device, quick: layers
bench_layer.check_case = lambda shape, case: None
bench_layer.memory.saved_bytes = bench_layer.memory.peak_bytes = lambda *args: 1

class Late(providers.Case):
    def step(self):
        raise RuntimeError("right, and then not")

def late(shape, inputs):
    return Late(providers.chain(shape, inputs).module, inputs)

table = {providers.BASELINE: providers.frozen_linear, "PyTorch chain": providers.chain}
if case == "provider":
    table["late"] = late
bench_layer.providers = lambda compiled: table

def fail(*args):
    raise RuntimeError("illegal access")

def at_second(function):
    def counted(*args):
        turns.append(args)
        if len(turns) == 2:
            if case == "killed":
                os.kill(os.getpid(), 9)
            if case == "lost":
                harness.synchronize = fail
            fail()
        return function(*args)
    return counted

turns = []
harness.time_rounds = lambda steps, device: harness.Samples({n: [1.0, 2.0] for n in steps})
if case == "inputs":
    providers.Inputs.make = at_second(providers.Inputs.make)
if case in ("timing", "lost", "killed"):
    harness.time_rounds = at_second(harness.time_rounds)
if case == "figure":
    import benchmarks.layer_figure
    benchmarks.layer_figure.draw = fail
sys.exit(bench_layer.main())
"""


@pytest.mark.parametrize(
    ("case", "ranks", "failed"),
    [
        ("inputs", [8, 4], ["64×96→192, r=16, p=0.1"]),
        ("timing", [8, 4], ["64×96→192, r=16, p=0.1"]),
        ("provider", [8, 16, 4], [f"late, 64×96→192, r={r}, p=0.1" for r in (8, 16, 4)]),
        ("lost", [8], ["64×96→192, r=16, p=0.1", "the run ended early"]),
        ("killed", [8], []),
        ("figure", [8, 16, 4], ["figure"]),
        ("no time", [], []),
    ],
)
def test_no_late_failure_loses_what_was_measured(case, ranks, failed, tmp_path):
    minutes = ["--minutes", "0"] if case == "no time" else []
    command = [
        sys.executable,
        "-c",
        LATE,
        case,
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        *minutes,
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    status = -9 if case == "killed" else bool(failed)
    assert result.returncode == status, result.stderr
    record = json.loads((tmp_path / "layer.json").read_text())
    assert list(dict.fromkeys(row["shape"]["r"] for row in record["rows"])) == ranks
    assert {row["provider"] for row in record["rows"]} <= {"frozen linear", "PyTorch chain"}
    assert list(record["failed"]) == failed
    said = (tmp_path / "layer.md").read_text()
    assert all(f"- {name}: " in said for name in failed)
    if case == "lost":
        assert "failed: the run ended early: at 64×96→192, r=16" in result.stdout
    if case == "no time":
        reasons = set(record["skipped"].values())
        assert len(record["skipped"]) == 3 and reasons == {"its turn had not come after 0 minutes"}


SHARED = """
from benchmarks import bench_shared

bench_shared.QUICK_TOKENS, bench_shared.CPU_LAYERS = (64,), ((96, (96, 32, 32)),)
bench_shared.main()
"""


def test_shared_benchmark(tmp_path):
    command = [sys.executable, "-c", SHARED, "--quick", "--device", "cpu", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "× apart" in result.stdout
    rows = json.loads((tmp_path / "shared.json").read_text())["rows"]
    assert {row["way"] for row in rows} == {"frozen linears", "a call for each", "one call"}
    for p in (0.0, 0.1):
        peak = {row["way"]: row["peak"] for row in rows if row["p"] == p}
        assert 0 < peak["one call"] <= peak["a call for each"]
    assert "| one call |" in (tmp_path / "shared.md").read_text()


SHARED_WRONG = """
import sys
from benchmarks import bench_shared

bench_shared.QUICK_TOKENS, bench_shared.CPU_LAYERS = (64,), ((96, (96, 32, 32)),)
together = bench_shared.Shared._together

def wrong(self):
    first, *others = together(self)
    return [first * 1.1 if self.inputs[0].p else first, *others]

bench_shared.Shared._together = wrong
sys.exit(bench_shared.main())
"""


def test_layers_that_are_wrong_together_are_not_timed(tmp_path):
    command = [sys.executable, "-c", SHARED_WRONG, "--quick", "--device", "cpu"]
    command += ["--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    record = json.loads((tmp_path / "shared.json").read_text())
    assert {row["p"] for row in record["rows"]} == {0.0}
    assert list(record["failed"]) == ["64×96→96+32+32, p=0.1"]


MERGE = """
from benchmarks import bench_merge

bench_merge.LAYERS = ((96, 64), (64, 96), (1, 1))
bench_merge.main()
"""


def test_merge_benchmark(tmp_path):
    command = [sys.executable, "-c", MERGE, "--quick", "--device", "cpu", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "× PEFT" in result.stdout
    record = json.loads((tmp_path / "merge.json").read_text())
    measured = {(row["provider"], row["operation"]) for row in record["rows"]}
    providers, operations = {"plain PyTorch", "PEFT", "fastlora"}, {"merge", "switch", "unmerge"}
    assert measured >= {(p, o) for p in providers for o in operations}
    assert all(row["seconds"]["median"] > 0 for row in record["rows"])
    assert {r["changed"] for r in record["results"] if r["provider"] == "fastlora"} == {0}
    assert "| fastlora |" in (tmp_path / "merge.md").read_text()


# few tokens and many threads: whatever a thread keeps for itself counts most there
PEAKS = """
import torch
from benchmarks import memory, providers, shapes

cpu = torch.device("cpu")
for threads in (1, 2, 16):
    torch.set_num_threads(threads)
    for shape in shapes.cpu_shapes(quick=False):
        if shape.M != min(shapes.CPU_TOKENS):
            continue
        inputs = providers.Inputs.make(shape, cpu)
        peak = {}
        for name in ("loralib", "fastlora"):
            case = providers.providers()[name](shape, inputs)
            case.step()
            peak[name] = memory.peak_bytes(case.step, cpu)
        assert peak["fastlora"] < peak["loralib"], (threads, shape, peak)
"""


def test_peak_memory_is_below_loralibs():
    pytest.importorskip("loralib")
    if native.why_not():
        pytest.skip(f"native: {native.why_not()}")
    command = [sys.executable, "-c", PEAKS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
