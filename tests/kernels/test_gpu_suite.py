"""The benchmarks of `make gpu` run to their end, on tiny layers in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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
harness.time_rounds = lambda steps, device: harness.Samples({n: [1.0, 2.0] for n in steps})
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


def test_new_memory_is_poisoned_while_something_is_checked(gate):
    from benchmarks import providers
    from benchmarks.shapes import Shape

    class Unwritten(providers.Chain):
        def forward(self, x):
            y = super().forward(x)
            # as a kernel that leaves memory as it finds it, which may hold the right answer
            return torch.where(torch.empty_like(y).isnan(), torch.nan, y)

    settings = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    shape = Shape(*SHAPES["bf16"])
    inputs = providers.Inputs.make(shape, torch.device("cpu"))
    module = Unwritten(shape, inputs)
    with pytest.raises(AssertionError, match="nan"):
        gate.check_case(shape, providers.Case(module, inputs))
    after = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    assert after == before


def test_what_is_compiled_is_checked_as_it_is_timed(gate):
    from benchmarks import providers
    from benchmarks.shapes import Shape

    seen = []

    class Compiled(providers.Chain):
        _orig_mod = None

        def forward(self, x):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return super().forward(x)

    shape = Shape(*SHAPES["bf16"])
    inputs = providers.Inputs.make(shape, torch.device("cpu"))
    gate.check_case(shape, providers.Case(Compiled(shape, inputs), inputs))
    assert seen and not any(seen)


STAGES = """
from benchmarks import bench_stages

small = (32, 64, 48, 16, 0.1)
bench_stages.stage_shapes = lambda quick: [
    Shape(*small, (True, False, True), dtype=bf16),
    Shape(*small, dtype=bf16, factor_dtype=fp32),
]
bench_stages.COPY_BYTES = 2**20
bench_stages.ROUNDS = once
case = sys.argv.pop(1)
from fastlora.kernels import delta
right = delta.delta
if case == "broken":
    delta.delta = lambda *args: right(*args) * 1.1
if case == "unwritten":
    # what kernels leave as they find it
    delta.delta = lambda *args: torch.where(torch.empty(1).isnan(), torch.nan, right(*args))
sys.exit(bench_stages.main())
"""


@pytest.mark.parametrize(("kernels", "status"), [("right", 0), ("broken", 1), ("unwritten", 1)])
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


STAGES_LOST = """
from benchmarks import bench_stages, harness

layers = [Shape(32, 64, 48, r, 0.1, dtype=bf16) for r in (16, 8, 4)]
bench_stages.stage_shapes = lambda quick: layers
bench_stages.ceilings = lambda shapes, device: bench_stages.Ceilings(1e9, 1e9)
bench_stages.right_stages = lambda o, device, found: {}
bench_stages.HOST_ROUNDS, bench_stages.HOST_STEPS = 2, 2
case = sys.argv.pop(1)

def timed(steps, device, **rounds):
    turns.append(steps)
    if len(turns) == 2 and case == "failed":
        raise RuntimeError("too late")
    if len(turns) == 2 and case == "lost":
        harness.synchronize = broken
        raise RuntimeError("illegal access")
    if len(turns) == 2 and case == "killed":
        os.kill(os.getpid(), 9)
    return harness.Samples({name: [1.0, 2.0] for name in steps})

def broken(device):
    raise RuntimeError("illegal access")

turns = []
harness.time_rounds = timed
out = bench_stages.Path(sys.argv[1])
options = torch.device("cpu"), False, out, bench_stages.Console(), bench_stages.Clock()
sys.exit(bench_stages.run_stages(*options, host=True))
"""


@pytest.mark.parametrize(("case", "ranks"), [("failed", {16, 4}), ("lost", {16}), ("killed", {16})])
def test_what_stages_have_shown_is_written_at_once(case, ranks, tmp_path):
    result = python(STAGES_LOST, case, tmp_path)
    assert result.returncode == (-9 if case == "killed" else 1), result.stderr
    record = json.loads((tmp_path / "stages.json").read_text())
    assert {row["shape"]["r"] for row in record["rows"]} == ranks
    said = (tmp_path / "stages.md").read_text()
    # the host's part stands in the same two files, after the usual rank
    assert "| fastlora |" in said and "| X Wᵀ |" in said
    assert "frozen linear" in {row["provider"] for row in record["host"]["rows"]}
    assert {path.name for path in tmp_path.iterdir()} == {"stages.json", "stages.md"}
    if case == "failed":
        assert record["failed"] == {"32×64→48, r=8": "RuntimeError: too late"}
    if case == "lost":
        assert "at 32×64→48, r=8: the device is lost" in record["failed"]["the run ended early"]


def test_the_copy_is_of_random_bytes(monkeypatch):
    from benchmarks import bench_stages, harness

    class Seen(Exception):
        pass

    def timed(steps, device, **rounds):
        assert len(steps["copy"]().unique()) > 100
        raise Seen

    monkeypatch.setattr(bench_stages, "COPY_BYTES", 4096)
    monkeypatch.setattr(harness, "time_rounds", timed)
    with pytest.raises(Seen):
        bench_stages.ceilings([], torch.device("cpu"))


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
    # one stage of eight
    assert not new.measured
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


WHOLE = """
from benchmarks import gate, harness, tune

case = sys.argv.pop(1)
gate.ELEMENTS = 1
layers = [Shape(64, 64, 96, 16, p, dtype=bf16) for p in (0.0, 0.1)]
tune.layers_to_hold = lambda: layers

def tuned(present, rows, end, console, save):
    best = {row: tune.config_of(present, row) for row in rows}
    if case == "a row":
        del best["shrink", "16", None]
    return {row: config for row, config in best.items() if row[1] == "16"}

def timed(steps, device, **rounds):
    slow = case == "slower" and len(turns) == 1
    turns.append(1)
    return harness.Samples({name: [1.0 + slow * (name == "triton")] for name in steps})

turns = []
tune.tune, tune.tune_fused, harness.time_rounds = tuned, lambda *args: set(), timed
if case == "wrong":
    from fastlora.kernels import delta, shrink
    right = shrink.shrink
    shrink.shrink = lambda *args: tuple(1.1 * t if t is not None and t.is_floating_point() else t
                                        for t in right(*args))
minutes = "0" if case == "late" else "5"
sys.argv += ["--minutes", minutes]
tune.main()
"""


@pytest.mark.parametrize(
    ("case", "objection"),
    [
        ("right", None),
        ("a row", ""),
        ("slower", "64×64→96, r=16, p=0.1: 2.000 × addmm order"),
        ("wrong", "64×64→96, r=16, p=0: AssertionError"),
        ("late", "64×64→96, r=16, p=0: the time was up"),
    ],
)
def test_auto_takes_triton_once_whole_layers_were_measured(case, objection, tmp_path):
    from fastlora.kernels import configs

    path = tmp_path / "table.json"
    result = python(WHOLE, case, "--out", path)
    assert result.returncode == 0, result.stderr
    assert configs.Table.parse(path.read_text()).measured == (objection is None)
    assert (objection or "") in result.stdout
    assert ("auto does not take Triton" in result.stdout) == bool(objection)


def test_whole_layers_are_those_of_the_grid():
    from benchmarks import tune
    from benchmarks.shapes import GPU_LAYERS, GPU_QKV

    held = {(s.M, s.K, s.N, s.p) for s in tune.layers_to_hold()}
    assert held == {(*layer, p) for layer in (*GPU_LAYERS, *GPU_QKV) for p in (0.0, 0.1)}
    assert all(s.r == 16 and s.dtype == BF16 for s in tune.layers_to_hold())


ROW_BY_ROW = """
from benchmarks import harness, report, tune

tune.LAYERS, tune.RANKS, tune.FINALISTS, tune.ROUNDS = ((32, 64, 96),), (16,), 1, once
listed = tune.candidates
tune.candidates = lambda *row: listed(*row)[:1]
harness.time_rounds = lambda steps, device, **rounds: harness.Samples(
    {step: [2.0**place] for place, step in enumerate(steps)}
)
write = report.write_whole

def killed(path, text):
    write(path, text)
    os.kill(os.getpid(), 9)

report.write_whole = killed
tune.main()
"""


def test_tuning_writes_each_row_at_once(tmp_path):
    from fastlora.kernels import configs

    path = tmp_path / "table.json"
    result = python(ROW_BY_ROW, "--stage", "grad_expand", "--out", path)
    assert result.returncode == -9, result.stderr
    old, new = configs.table("interpreter"), configs.Table.parse(path.read_text())
    assert new.origin.startswith(f"1 of {sum(map(len, old.rows.values()))} rows measured")
    changed = set(new.rows["grad_expand"]) - set(old.rows["grad_expand"])
    assert [kind for kind, *_ in changed] == ["16"]


def test_tuning_of_fused_products_ends_in_time(monkeypatch):
    import time
    from dataclasses import replace

    from benchmarks import tune
    from fastlora.kernels import configs

    here = ("expand_fused", "16", *(8192, 4096, 4096), 16)
    others = ("grad_input_fused", "16", *(8192, 4096, 4096), 16)
    table = replace(configs.table("sm_90"), fused=frozenset({here, others}))
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(tune, "viable", lambda trials, end: [True] * len(trials))
    turns = []
    monkeypatch.setattr(tune, "fused_is_faster", lambda *args: bool(turns.append(args[1])))
    # what had no turn stays, what is not faster goes
    monkeypatch.setattr(tune, "LAYERS", ((64, 64, 64), (8192, 4096, 4096)))
    assert tune.tune_fused(table, ["expand_fused"], 3) == {here}
    assert len(turns) == 3
    assert tune.tune_fused(table, ["expand_fused"], 90) == set()


JOBS = """
import os
import time

import torch


class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(one)


def broken(device):
    raise RuntimeError("illegal access")


def job(what):
    if what == "abort":
        os.abort()
    if what == "hang":
        time.sleep(600)
    if what == "raise":
        raise ValueError("no")
    if what == "odd":
        raise Odd(1, 2)
    if what == "lost":
        torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, broken
    return os.getpid()
"""

IN_PROCESSES = """
import json, time

sys.path.insert(0, sys.argv[1])
import jobs
from benchmarks import harness

harness.os.cpu_count = lambda: 3
start = time.perf_counter()
calls, seconds = json.loads(sys.argv[2])
results = harness.in_processes(jobs.job, [(call,) for call in calls], seconds)
print(json.dumps([r if isinstance(r, int) else repr(r) for r in results]))
print(time.perf_counter() - start)
"""


def in_processes(tmp_path, calls, seconds=None):
    (tmp_path / "jobs.py").write_text(JOBS)
    result = python(IN_PROCESSES, tmp_path, json.dumps([calls, seconds]))
    assert result.returncode == 0, result.stderr
    *_, results, took = result.stdout.splitlines()
    return json.loads(results), float(took)


def test_calls_in_processes(tmp_path):
    calls = ["", "raise", "odd", "", "abort", "", "lost", "lost", "", ""]
    results, _ = in_processes(tmp_path, calls)
    assert results[1] == "ValueError('no')"
    # an exception that cannot be made anew
    assert "TypeError" in results[2]
    # what ends its process costs no other call
    assert results[4] == "RuntimeError('its process ended with exit code -6')"
    # and where a device was lost nothing more is run
    assert all("DeviceLost" in result for result in results[6:8])
    assert all(isinstance(results[i], int) for i in (0, 3, 5, 8, 9))


def test_what_is_not_done_in_time_is_ended(tmp_path):
    results, took = in_processes(tmp_path, ["hang", "hang", ""], 5)
    assert all("TimeoutError" in result for result in results)
    assert took < 30


class Event:
    """An event that the device has always reached already."""

    def __init__(self, enable_timing):
        pass

    def record(self):
        pass

    def query(self):
        return True

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1.0


@pytest.mark.parametrize("late", [True, False])
def test_times_that_include_the_hosts_are_marked(late, monkeypatch):
    from benchmarks import harness, report

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "query", lambda self: late and now[0] == "slow")
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: slept.append(cycles))
    timer = harness._cuda_timer
    monkeypatch.setattr(harness, "L2_FLUSH_BYTES", 1)
    monkeypatch.setattr(harness, "_cuda_timer", lambda device: timer(torch.device("cpu")))
    monkeypatch.setattr(harness, "synchronize", lambda device: None)
    now, slept = [""], []
    steps = {name: lambda name=name: now.__setitem__(0, name) for name in ("slow", "fast")}
    samples = harness.time_rounds(steps, torch.device("cuda"), budget_s=0, min_rounds=2)
    assert samples.host_bound == ({"slow"} if late else set())
    assert max(slept) == (harness.MOST_BACKLOG_CYCLES if late else harness.BACKLOG_CYCLES)

    rows = [SimpleNamespace(host_bound=name in samples.host_bound) for name in steps]
    table = report.Table("times", ["ms"], [["1"]], report.host_note(rows))
    assert ("include" in table.markdown()) == late
    assert [report.starred("1", row.host_bound) for row in rows] == ["1*" if late else "1", "1"]


def test_what_matters_most_is_measured_first():
    from benchmarks.shapes import GPU_LAYERS, GPU_QKV, GPU_RANKS, gpu_shapes

    shapes = list(gpu_shapes(quick=False))
    assert len(set(shapes)) == len(shapes) == 2 * len(GPU_LAYERS) * len(GPU_RANKS) + 5
    first = [(s.M, s.K, s.N, s.p) for s in shapes[:2]]
    assert first == [(*GPU_LAYERS[0], 0.1), (*GPU_LAYERS[0], 0.0)]
    assert all(s.enable_lora for s in shapes[2 : 2 + 2 * len(GPU_QKV)])
    ranks = [s.r for s in shapes]
    assert ranks == sorted(ranks, key=lambda r: (r != 16, r))
    quick = list(gpu_shapes(quick=True))
    assert quick[0] == shapes[0] and len(quick) == 4
    assert all(s.r == 16 and s.p == 0.1 for s in quick)


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    from benchmarks import report

    report.write(tmp_path, "some", {"rows": [1]}, "one\n")

    def full(path, text, **options):
        path.write_bytes(text.encode()[:3])
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="no space"):
            report.write(tmp_path, "some", {"rows": [2]}, "two\n")
    assert json.loads((tmp_path / "some.json").read_text()) == {"rows": [1]}
    assert (tmp_path / "some.md").read_text() == "one\n"


def test_what_has_no_turn_in_time_is_said(monkeypatch):
    from benchmarks import survey
    from benchmarks.terminal import Console

    now, turns, saved = [0.0], [], []
    monkeypatch.setattr(survey.time, "perf_counter", lambda: now[0])
    clock, found = survey.Clock(2, now[0]), survey.Found()
    assert clock.to_compile() == survey.COMPILE_SHARE * 120
    assert survey.Clock().to_compile() == survey.COMPILE_SECONDS

    def measure(shape):
        turns.append(shape)
        now[0] += 70

    def save():
        saved.append((len(turns), len(found.skipped)))

    shapes = {name: name for name in "abcd"}
    cpu = torch.device("cpu")
    assert survey.visit("some", shapes, measure, save, found, cpu, clock, Console())
    assert turns == ["a", "b"] and saved == [(1, 0), (2, 0), (2, 2)]
    assert found.skipped == dict.fromkeys("cd", "its turn had not come after 2 minutes")
    assert clock.to_compile() == 0


def test_the_figure_shows_every_provider(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from benchmarks import layer_figure, report
    from benchmarks.bench_layer import Row
    from benchmarks.harness import Spread
    from benchmarks.providers import BASELINE, COMPOSITIONS, providers
    from benchmarks.shapes import Shape
    from fastlora import backends

    known = {*providers(True), *COMPOSITIONS, *(f"fastlora ({name})" for name in backends.NAMES)}
    assert known - {BASELINE} <= report.MARKERS.keys() <= report.COLOURS.keys()
    assert len(set(report.MARKERS.values())) == len(report.MARKERS)
    assert len({report.COLOURS[name] for name in report.MARKERS}) == len(report.MARKERS)

    pyplot, shown = report.paper_style(), []
    monkeypatch.setattr(report, "paper_style", lambda: pyplot)
    close = pyplot.close

    def closed(figure):
        shown.extend(text.get_text() for text in figure.legends[0].get_texts())
        close(figure)

    monkeypatch.setattr(pyplot, "close", closed)
    one = Spread(1.0, 1.0, 1.0)
    names = ["new", *known]
    rows = [
        Row(Shape(1, 2, 3, 4, p), name, one, one, None, 1, 1, [1.0], False)
        for p in (0.0, 0.1)
        for name in names
    ]
    layer_figure.draw(rows, tmp_path / "layer.png")
    assert sorted(shown) == sorted({*names} - {BASELINE})
