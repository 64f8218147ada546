"""The benchmarks of `make gpu` run to their end, on tiny layers in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlora.backends import native

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
BF16, BLOCKS = torch.bfloat16, (True, False, True)

HEAD = """
import os, sys, torch
from tests.kernels.interpreter import install
install()
from benchmarks.shapes import Shape
once = {"budget_s": 0, "min_rounds": 1, "max_rounds": 1}
bf16, fp32 = torch.bfloat16, torch.float32
"""


def python(script, *args):
    """The script, on tensors of a CPU, with the guard over the interpreter."""
    # the interpreter stands in for a GPU, also where there is one
    here = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", HEAD + script, *map(str, args)],
        cwd=ROOT,
        env=os.environ | here,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def gate(monkeypatch):
    from benchmarks import gate

    # one draw: the interpreter is slow
    monkeypatch.setattr(gate, "ELEMENTS", 1)
    return gate


def case(name, shape, device):
    from benchmarks import providers

    inputs = providers.Inputs.make(shape, torch.device(device))
    try:
        return providers.COMPOSITIONS[name](shape, inputs)
    except providers.Skipped as reason:
        pytest.skip(str(reason))


SHAPES = {
    "bf16": (128, 64, 96, 16, 0.0, None, BF16),
    "dropout": (128, 64, 96, 16, 0.1, None, BF16),
    "rank 8": (128, 64, 96, 8, 0.1, None, BF16),
    "fp32": (128, 64, 96, 16, 0.1, None, torch.float32),
    "fp32 factors": (128, 64, 96, 16, 0.1, None, BF16, torch.float32),
    "merged": (128, 64, 96, 16, 0.1, BLOCKS, BF16),
}
EAGER = ("PyTorch chain", "addmm order", "LoRAFusion's dataflow", "fastlora (fused)")


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=list(SHAPES))
def test_providers_are_right(name, sizes, gate):
    from benchmarks.shapes import Shape

    gate.check_case(Shape(*sizes), case(name, Shape(*sizes), "cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("name", [*EAGER, "PyTorch chain, compiled"])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("on", [None, BLOCKS], ids=["linear", "merged"])
def test_providers_are_right_on_a_gpu(name, p, on):
    from benchmarks import gate
    from benchmarks.shapes import Shape

    shape = Shape(2048, 768, 2304, 16, p, on, BF16)
    gate.check_case(shape, case(name, shape, "cuda"))


@pytest.mark.parametrize("defect", ["scaling", "dropout"])
def test_the_gate_stops_what_is_wrong(defect, gate):
    from benchmarks.shapes import Shape

    shape = Shape(*SHAPES["dropout"])
    wrong = case("PyTorch chain", shape, "cpu")
    if defect == "scaling":
        wrong.module.scaling *= 1.1
    else:
        wrong.module.shape = Shape(*SHAPES["rank 8"][:4], 0.3, dtype=BF16)
    with pytest.raises(AssertionError, match=r"rms|max"):
        gate.check_case(shape, wrong)


def test_the_gate_leaves_a_layer_as_it_was(gate):
    from benchmarks.shapes import Shape

    shape = Shape(*SHAPES["dropout"])
    checked = case("PyTorch chain", shape, "cpu")
    before = {name: p.clone() for name, p in checked.module.state_dict().items()}
    state = torch.get_rng_state()
    gate.check_case(shape, checked)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in checked.module.state_dict().items())


LAYER = """
from benchmarks import bench_layer, harness, providers

def broken(shape, inputs):
    case = providers.chain(shape, inputs)
    case.module.scaling *= 1.1
    return case

eager = {n: s for n, s in providers.COMPOSITIONS.items() if "compiled" not in n}
table = {providers.BASELINE: providers.frozen_linear, **eager, "broken": broken}
if sys.argv.pop(1) == "right":
    del table["broken"]
bench_layer.providers = lambda compiled: table
small = (64, 64, 96, 16, 0.1)
bench_layer.grid = lambda device, quick: [
    Shape(*small, dtype=bf16),
    Shape(*small, (True, False, True), dtype=bf16),
]
harness.time_rounds = lambda steps, device: {name: [1.0, 2.0] for name in steps}
bench_layer.memory.peak_bytes = lambda step, device: 1
bench_layer.memory.saved_bytes = lambda forward, exclude: 1
import benchmarks.gate
benchmarks.gate.ELEMENTS = 1
sys.exit(bench_layer.main())
"""


@pytest.mark.parametrize(("table", "status"), [("right", 0), ("broken", 1)])
def test_layers(table, status, tmp_path):
    result = python(LAYER, table, "--device", "cpu", "--out", tmp_path)
    assert result.returncode == status, result.stderr
    assert "× frozen linear" in result.stdout
    record = json.loads((tmp_path / "layer.json").read_text())
    assert {row["provider"] for row in record["rows"]} == {"frozen linear", *EAGER}
    assert len(record["failed"]) == 2 * status
    assert (tmp_path / "layer.md").read_text().count("## Failed") == status


STAGES = """
from benchmarks import bench_stages

small = (32, 64, 48, 16, 0.1)
bench_stages.stage_shapes = lambda quick: [
    Shape(*small, (True, False, True), dtype=bf16),
    Shape(*small, dtype=bf16, factor_dtype=fp32),
]
bench_stages.COPY_BYTES = 2**20
bench_stages.ROUNDS = once
if sys.argv.pop(1) == "broken":
    from fastlora.kernels import delta
    right = delta.delta
    delta.delta = lambda *args: right(*args) * 1.1
sys.exit(bench_stages.main())
"""


@pytest.mark.parametrize(("kernels", "status"), [("right", 0), ("broken", 1)])
def test_stages(kernels, status, tmp_path):
    result = python(STAGES, kernels, "--out", tmp_path)
    assert result.returncode == status, result.stderr
    record = json.loads((tmp_path / "stages.json").read_text())
    stages = [row["stage"] for row in record["rows"]]
    assert stages.count("expand_fused") == 2
    assert stages.count("delta") == 2 * (1 - status)
    assert all(row["share"] > 0 and row["seconds"]["median"] > 0 for row in record["rows"])
    built = not native.why_not()
    ratios = {row["stage"] for row in record["rows"] if row["ratio"]}
    assert {name for name in ratios if not name.endswith(("(native)", "(cutlass)"))} == {
        *("Y += X Wᵀ", "dX += dY W", "expand_fused", "grad_input_fused")
    }
    for stage in ("shrink (native)", "grad_shrink (native)", "grad_input, in place (native)"):
        assert stages.count(stage) == 2 * built
        assert (stage in ratios) == built
    assert "| expand_fused |" in (tmp_path / "stages.md").read_text()


def test_the_hosts_time_needs_a_gpu():
    result = python("from benchmarks import bench_stages; bench_stages.main()", "--host")
    assert result.returncode == 1
    assert "needs a GPU" in result.stderr


HOST = """
from benchmarks import bench_stages

bench_stages.HOST_ROUNDS, bench_stages.HOST_STEPS = 2, 2
console = bench_stages.Console()
sys.exit(bench_stages.run_host(torch.device("cpu"), bench_stages.Path(sys.argv[1]), console))
"""

# a layer that cannot be made here
BROKEN = """
from benchmarks import bench_stages

def broken(shape, inputs):
    raise RuntimeError("no such compiler")

made = bench_stages.providers
bench_stages.providers = lambda: {**made(), "broken": broken}
"""


def test_the_hosts_time(tmp_path):
    result = python(HOST, tmp_path)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "host.json").read_text())["rows"]
    assert {"frozen linear", "fastlora"} <= {row["provider"] for row in rows}
    assert all(row["both"]["median"] > 0 < row["forward"]["median"] for row in rows)


def test_the_hosts_time_without_what_does_not_run(tmp_path):
    result = python(BROKEN + HOST, tmp_path)
    assert result.returncode == 1
    assert "failed: broken: RuntimeError: no such compiler" in result.stdout
    said = (tmp_path / "host.md").read_text()
    assert "| frozen linear |" in said and "- broken: RuntimeError" in said


TUNE = """
from fastlora.kernels import configs, grad_expand
from benchmarks import harness, tune

tune.LAYERS, tune.RANKS, tune.FINALISTS, tune.ROUNDS = ((32, 64, 96), (16, 64, 32)), (16,), 2, once
listed = tune.candidates
tune.candidates = lambda *row: listed(*row)[:2]
timed = harness.time_rounds

def faked(steps, device, **rounds):
    # each takes half the time of the one after it; the present config comes last
    timed(steps, device, **rounds)
    return {step: [2.0**place] for place, step in enumerate(steps)}

harness.time_rounds = faked
case = sys.argv.pop(1)
if case == "wrong":
    right = grad_expand.grad_expand
    def wrong(*args):
        dS, dB = right(*args)
        present = configs.config("grad_expand", args[0], args[2]).BLOCK_M == 16
        return dS, dB if present else dB * 1.1
    grad_expand.grad_expand = wrong
if case == "fused":
    tune.candidates = lambda *row: []
tune.main()
"""


@pytest.mark.parametrize(("stage", "case"), [("grad_expand", "right"), ("grad_expand", "wrong")])
def test_tuning(stage, case, tmp_path):
    from fastlora.kernels import configs

    path = tmp_path / "table.json"
    result = python(TUNE, case, "--stage", stage, "--out", path)
    assert result.returncode == 0, result.stderr
    old = configs.table("interpreter")
    new = configs.Table.parse(path.read_text())
    changed = {name for name, rows in new.rows.items() if rows != old.rows[name]}
    assert changed == ({stage} if case == "right" else set())
    measured = "3 of 3" if case == "right" else "0 of 3"
    assert f"{measured} rows measured" in result.stdout
    assert new.origin.endswith(old.origin)
    assert new.measured == (case == "right")
    if case == "right":
        assert "grad_expand 16 None: 0.250 × the time before" in result.stdout


def test_tuning_finds_where_a_fused_product_is_faster(tmp_path):
    from fastlora.kernels import configs

    path = tmp_path / "table.json"
    result = python(TUNE, "fused", "--stage", "grad_input_fused", "--out", path)
    assert result.returncode == 0, result.stderr
    new = configs.Table.parse(path.read_text())
    # M, N, K and r
    sizes = ((32, 96, 64, 16), (16, 32, 64, 16))
    assert new.fused == {
        ("grad_input_fused", kind, *shape) for kind in ("16", "mixed", "32") for shape in sizes
    }


def test_every_row_has_candidates():
    from benchmarks import tune
    from fastlora.kernels import configs

    for name in configs.architectures():
        table = configs.table(name)
        for stage in tune.STEPS:
            for kind, most, present in table.rows[stage]:
                found = tune.candidates(stage, kind, present)
                assert 5 < len(found) == len(set(found)), (name, stage, kind, most)
                assert present not in found
                assert tune.ranks_of(table, (stage, kind, most))


def test_calls_in_processes():
    from benchmarks.harness import in_processes

    results = in_processes(divmod, [(7, 2), (1, 0), (9, 4)])
    assert results[::2] == [(3, 1), (2, 1)]
    assert isinstance(results[1], ZeroDivisionError)
