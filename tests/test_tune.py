"""``fastlora tune``: checks before it times, keeps what is wrong out, and stores what it finds."""

import json
import math
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch

import fastlora
from fastlora import backends, dispatch, testing, tune
from fastlora.__main__ import main
from fastlora.backends import native, reference
from fastlora.dispatch import Case

pytestmark = pytest.mark.usefixtures("cache")

F32, BF16 = torch.float32, torch.bfloat16
BACKENDS = [name for name in ("reference", "native") if backends.available("cpu")[name] is None]
TINY = ["tune", "--device", "cpu", "--quick", "--shape", "6x8x12", "--rank", "2"]
CASE = Case(6, 8, 12, 2, F32, F32, False)


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch):
    monkeypatch.setattr(tune, "QUICK", tune.Effort(rounds=3, seconds=0, sample=0))
    monkeypatch.setattr(tune, "NORMAL", tune.QUICK)


def stored():
    return list(dispatch.rows("cpu").values())


def test_rows_of_all_combinations_are_returned_and_stored():
    seen = []
    rows = tune.tune(
        "cpu",
        [(6, 8, 12), (5, 16, 4)],
        [3],
        [(F32, F32), (BF16, F32)],
        [0.0, 0.25],
        each=seen.append,
    )
    assert {row.case for row in rows} == {
        Case(*shape, 3, dtype, F32, dropout)
        for shape in ((6, 8, 12), (5, 16, 4))
        for dtype in (F32, BF16)
        for dropout in (False, True)
    }
    assert len(rows) == 8 and seen == rows
    assert stored() == rows
    for row in rows:
        assert sorted(row.ms) == sorted(BACKENDS) and not row.failed
        assert all(0 < ms < math.inf for ms in row.ms.values())
        assert row.threads == torch.get_num_threads()
        assert "triton" in row.absent


def test_auto_follows_what_was_measured(monkeypatch):
    times = {"reference": 1.0, "native": 2.0}
    monkeypatch.setattr(tune, "time_steps", lambda steps, *_: {name: times[name] for name in steps})
    layer, x = fastlora.Linear(8, 12, r=2), torch.randn(6, 8)
    safe = backends.select().name
    assert f"path: {safe}" in fastlora.explain(layer, x)
    tune.tune("cpu", [(6, 8, 12)], [2], dropout=[0.0])
    assert "path: reference" in fastlora.explain(layer, x)


def test_the_command(capsys):
    assert main(TINY) == 0
    out, err = capsys.readouterr()
    head, *lines = out.splitlines()
    assert head.split()[:6] == ["M", "K", "N", "r", "dtype", "dropout"]
    assert [line.split()[:6] for line in lines] == [
        ["6", "8", "12", "2", "float32", dropout] for dropout in ("no", "yes")
    ]
    assert all(len(line) == len(head) for line in lines)
    assert "1 of 2: (6, 8, 12), r=2, float32, no dropout" in err
    assert "not measured: triton: " in err
    path = dispatch.user_file("cpu")
    assert err.endswith(f"2 rows in {path}\n")
    assert len(json.loads(path.read_text())["rows"]) == 2

    assert main(["tune", "--device", "cpu", "--list"]) == 0
    listed, err = capsys.readouterr()
    assert listed == out and f"{path}: 2 rows, measured on {dispatch.device_name('cpu')}" in err

    assert main(["tune", "--device", "cpu", "--clear"]) == 0
    assert f"removed {path}" in capsys.readouterr().err and not path.exists()
    assert stored() == []
    for word in ("--clear", "--list"):
        assert main(["tune", "--device", "cpu", word]) == 0
        assert "there is no" in capsys.readouterr().err


def test_the_command_with_all_options(tmp_path):
    file = tmp_path / "deep" / "table.json"
    options = ["--dtype", "float32", "bfloat16/float32", "--dropout", "0.5", "--output", str(file)]
    assert main([*TINY, *options]) == 0
    table = dispatch.Table.parse(file.read_text())
    assert list(table.rows) == [CASE._replace(dtype=dtype, dropout=True) for dtype in (F32, BF16)]
    assert not stored(), "the cache has none of them"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "6x8"], "argument --shape: got '6x8', expected MxKxN"),
        (["--dtype", "float8"], "argument --dtype: got 'float8', expected float32, bfloat16"),
        (["--shape", "0x8x8"], r"shapes: got \(0, 8, 8\), expected positive"),
        (["--rank", "0"], "ranks: got 0, expected positive"),
        (["--dtype", "float64"], "dtypes: got torch.float64 with factors"),
        (["--dtype", "float32/bfloat16"], "dtypes: got torch.float32 with factors"),
        (["--dropout", "1.5"], "dropout"),
        pytest.param(
            ["--device", "cuda"],
            "device: got 'cuda', expected cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_options_that_do_not_fit(options, message, capsys):
    try:
        status = main([*TINY, *options])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_file_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([*TINY, "--output", str(tmp_path / "file" / "table.json")]) == 1
    err = capsys.readouterr().err
    assert "error: " in err and str(tmp_path / "file") in err
    assert "1 of" not in err, "found before anything was measured"


@pytest.mark.parametrize("defect", ["grad_shrink", "forward", "raises"])
def test_a_wrong_backend_is_kept_out(defect, monkeypatch, capsys):
    """By an error of 1 % in one gradient or in the output, or by raising."""
    right = getattr(reference, "forward" if defect == "raises" else defect)

    def wrong(*args):
        if defect == "raises":
            raise RuntimeError("no such luck\nand more")
        result = right(*args)
        first, *rest = result if isinstance(result, tuple) else (result,)
        return (1.01 * first, *rest) if isinstance(result, tuple) else 1.01 * first

    monkeypatch.setattr(reference, right.__name__, wrong)
    assert main([*TINY, "--dropout", "0"]) == 1
    out, err = capsys.readouterr()
    (row,) = stored()
    assert "reference" not in row.ms and list(row.failed) == ["reference"]
    assert "wrong" in out.splitlines()[1].split()
    expected = {
        "grad_shrink": "AssertionError: d_lora_A: ",
        "forward": "AssertionError: y: ",
        "raises": "RuntimeError: no such luck",
    }[defect]
    assert row.failed["reference"].startswith(expected)
    assert "and more" not in row.failed["reference"]
    assert f"wrong, and kept out: reference at {row.case}: {expected}" in err


def test_a_wrong_safe_choice_is_not_taken_after_that(monkeypatch):
    if "native" not in BACKENDS:
        pytest.skip("native is not usable here")
    right = native.forward
    monkeypatch.setattr(
        native, "forward", lambda *args: (right(*args)[0] * 1.01, *right(*args)[1:])
    )
    assert main([*TINY, "--dropout", "0"]) == 1
    assert backends.select("auto", "cpu", F32, CASE).name == "reference"
    assert "native failed" in backends.why("auto", "cpu", F32, CASE)


def test_nothing_is_timed_before_all_are_checked(monkeypatch):
    order = []
    check, clock = testing.assert_no_worse, tune.time_steps
    monkeypatch.setattr(
        testing, "assert_no_worse", lambda *args: (order.append("check"), check(*args))
    )
    monkeypatch.setattr(tune, "time_steps", lambda *args: (order.append("time"), clock(*args))[1])
    tune.measure(CASE, "cpu", 0.0)
    assert order == ["check"] * len(BACKENDS) + ["time"]


def test_backends_take_turns():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    times = tune.time_steps(steps, "cpu", tune.Effort(rounds=4, seconds=0, sample=0))
    assert set(times) == {"a", "b"}
    assert "".join(order[-8:]) == "baabbaab"[:8]
    assert Counter(order) == {"a": 7, "b": 7}, "three to warm up"


def test_rounds_go_on_for_the_time_they_have(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(tune.time, "perf_counter", lambda: next(now))
    runs = []
    # a sample takes one of these seconds, and each round looks at the clock once more
    tune.time_steps({"a": lambda: runs.append(1)}, "cpu", tune.Effort(2, 30, sample=0))
    assert 2 < len(runs) - 3 <= 15
    runs.clear()
    tune.time_steps({"a": lambda: runs.append(1)}, "cpu", tune.Effort(2, 30, most=4, sample=0))
    assert len(runs) - 3 == 4


def test_short_steps_are_repeated_for_a_sample(monkeypatch):
    runs = []
    found = tune.time_steps({"a": lambda: runs.append(1)}, "cpu", tune.Effort(3, 0, sample=0.001))
    assert len(runs) > 3 + 3 * 10 and found["a"] < 0.1


def test_an_interrupt_keeps_the_rows(monkeypatch, capsys):
    measure = tune.measure

    def interrupted(case, *args):
        if case.dropout:
            raise KeyboardInterrupt
        return measure(case, *args)

    monkeypatch.setattr(tune, "measure", interrupted)
    assert main(TINY) == 130
    assert [row.case for row in stored()] == [CASE]
    assert f"interrupted; what was measured is in {dispatch.user_file('cpu')}" in (
        capsys.readouterr().err
    )
    with pytest.raises(KeyboardInterrupt):
        tune.tune("cpu", [(6, 8, 12)], [2])


def test_what_does_not_fit_the_memory_is_left_out(monkeypatch, capsys):
    right = reference.forward

    def scarce(*args):
        X, t = args[0], args[6]
        if not t and X.dtype == F32:
            raise torch.OutOfMemoryError("no")
        return right(*args)

    monkeypatch.setattr(reference, "forward", scarce)
    assert main(TINY) == 0
    assert [row.case.dropout for row in stored()] == [True]
    assert "left out, as it does not fit the memory: (6, 8, 12)" in capsys.readouterr().err


def test_measuring_draws_no_random_numbers_of_the_users():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    tune.measure(CASE._replace(dropout=True), "cpu", 0.5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("device", tune.DEFAULTS)
def test_the_defaults_can_be_measured(device, monkeypatch):
    monkeypatch.setattr(dispatch, "device_name", lambda device: "Some device")
    plan = tune.make_plan(device)
    assert plan == tune.DEFAULTS[device]
    assert len(plan.shapes) * len(plan.ranks) * len(plan.dtypes) * len(plan.dropout) <= 64


def test_a_case_for_any_number_of_tokens_is_none_to_measure():
    with pytest.raises(ValueError, match=r"case\.M: got None, expected"):
        tune.measure(CASE._replace(M=None), "cpu", 0.0)


def test_runs_as_a_module_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "fastlora", *TINY, "--dropout", "0"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 2
    assert list(dispatch.rows("cpu")) == [CASE]
