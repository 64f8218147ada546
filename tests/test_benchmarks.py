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
