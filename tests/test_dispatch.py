"""The choice of a backend by tables of measured times, and the files that hold them."""

import json
import multiprocessing
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._dynamo.testing import CompileCounterWithBackend

import fastlora
from fastlora import backends, dispatch
from fastlora.backends import native, triton
from fastlora.backends.operators import FLOATS
from fastlora.dispatch import Case, Row
from fastlora.functional import lora_linear

pytestmark = pytest.mark.usefixtures("cache")

F32, BF16 = torch.float32, torch.bfloat16
SHAPE = Case(512, 64, 96, 8, F32, F32, False)
OF_THE_PACKAGE = sorted(dispatch.SHIPPED.glob("*"))
TIMES = {"native": 2.0, "reference": 1.0}


@pytest.fixture(autouse=True)
def built(monkeypatch):
    """The usual choice is the same where the extension is not built; here nothing runs on it."""
    monkeypatch.setattr(native, "_obstacle", None)
    monkeypatch.setattr(native, "description", lambda: "C++")


def measured(times=TIMES, case=SHAPE, device="cpu", **changed):
    """Stores a row, as the user's."""
    row = Row(case._replace(**changed), times)
    dispatch.store(dispatch.user_file(device), device, [row])
    return row


def chosen(case=SHAPE, name="auto", device="cpu", **changed):
    case = case._replace(**changed)
    return backends.select(name, device, case.dtype, case).name


def ship(*rows):
    path = dispatch.SHIPPED / dispatch.user_file("cpu").name
    dispatch.store(path, "cpu", rows)
    return path


# ---- which row


def test_unmeasured_is_the_safe_choice():
    assert chosen() == "native"
    assert backends.select("auto", "cpu", F32).name == "native"
    assert dispatch.nearest("cpu", SHAPE) is None


def test_a_measured_shape_takes_the_fastest():
    measured()
    assert chosen() == "reference"
    # without a shape there is nothing to look up
    assert backends.select("auto", "cpu", F32).name == "native"


@pytest.mark.parametrize(
    ("changed", "near"),
    [
        ({"K": 32}, True),
        ({"K": 128, "N": 48, "r": 16}, True),
        ({"K": 31}, False),
        ({"N": 193}, False),
        ({"r": 17}, False),
        ({"r": 3}, False),
        ({"M": 128}, True),
        ({"M": 2048}, True),
        ({"M": 127}, False),
        ({"M": 2049}, False),
        ({"M": 0}, False),
        ({"M": None}, True),
        ({"M": None, "K": 31}, False),
        ({"dropout": True}, False),
        ({"dtype": BF16}, False),
        ({"dtype": BF16, "factors": BF16}, False),
    ],
    ids=str,
)
def test_how_far_a_row_reaches(changed, near):
    measured()
    assert chosen(**changed) == ("reference" if near else "native")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {}),
        ({"M": 700}, {}),
        ({"M": 1200}, {"M": 2048}),
        ({"M": 1024}, {"M": 2048}),
        ({"K": 80}, {}),
        ({"K": 100}, {"K": 128}),
        ({"M": 1024, "K": 128}, {"K": 128}),
        ({"M": None}, {"M": 2048}),
        ({"M": None, "K": 128}, {"K": 128}),
    ],
    ids=str,
)
def test_the_nearest_row(asked, expected):
    for changed in ({}, {"M": 2048}, {"K": 128}, {"M": 128}, {"dropout": True}):
        measured(**changed)
    found = dispatch.nearest("cpu", SHAPE._replace(**asked))
    assert found.case == SHAPE._replace(**expected)


@pytest.mark.parametrize(("reference", "expected"), [(0.969, "reference"), (0.971, "native")])
def test_less_than_the_margin_is_noise(reference, expected):
    measured({"native": 1.0, "reference": reference})
    assert chosen() == expected


def test_the_next_fastest_where_the_fastest_is_not_usable(monkeypatch):
    measured({"triton": 0.1, "some other": 0.2, "reference": 0.5, "native": 1.0})
    monkeypatch.setattr(triton, "dtypes", {"cuda": FLOATS})
    assert chosen() == "reference"
    measured({"triton": 0.1, "native": 1.0, "reference": 2.0})
    assert chosen() == "native"
    measured({"native": 0.1, "reference": 2.0})
    monkeypatch.setattr(native, "_obstacle", "not today")
    assert chosen() == "reference"


def test_the_safe_choice_where_it_was_not_measured():
    """As where the extension was built only later."""
    measured({"reference": 1.0})
    assert chosen() == "native"


def test_a_safe_choice_that_was_wrong_is_not_taken():
    row = Row(SHAPE, {"reference": 9.0}, failed={"native": "d_x: max error 1, allowed 0.1"})
    dispatch.store(dispatch.user_file("cpu"), "cpu", [row])
    assert chosen() == "reference"


def test_a_name_wins():
    measured()
    assert chosen(name="native") == "native"
    with fastlora.use_backend("native"):
        assert chosen() == "native"
    assert chosen() == "reference"


def test_no_device_no_table():
    assert dispatch.tables("meta") == {}
    assert chosen(device="meta") == "reference"


@pytest.mark.filterwarnings("ignore:fastlora runs in plain PyTorch")
def test_a_gpu_takes_what_was_measured_on_it_and_nothing_else(monkeypatch):
    """Also Triton where its tiles were not measured, but the whole layer was."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(triton, "why_not", lambda: None)
    monkeypatch.setattr(triton, "why_not_alone", lambda: "not measured")
    assert chosen(device="cuda") == "reference"
    measured({"triton": 1.0, "reference": 2.0}, device="cuda")
    assert chosen(device="cuda") == "triton"
    assert chosen(device="cuda", dropout=True) == "reference"
    assert chosen() == "native", "what is the case on another device"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Another GPU")
    dispatch.forget()
    assert chosen(device="cuda") == "reference"


@pytest.mark.parametrize("grouped", [False, True])
def test_layers_are_looked_up_by_their_sizes(grouped, monkeypatch):
    asked = []
    monkeypatch.setattr(dispatch, "nearest", lambda device, case: asked.append(case))
    blocks = {"enable_lora": [True, False, True], "lora_dropout": 0.5, "lora_dtype": F32}
    make = fastlora.MergedLinear if grouped else fastlora.Linear
    layer = make(16, 24, r=2, dtype=BF16, **(blocks if grouped else {}))
    monkeypatch.setattr(backends, "_best", lambda device, dtype: "reference")
    layer(torch.randn(3, 5, 16, dtype=BF16))
    layer(torch.randn(16, dtype=BF16))
    layer.lora_dropout.eval()
    layer(torch.randn(16, dtype=BF16))
    factors = F32 if grouped else BF16
    assert asked == [
        Case(M, 16, 24, 2, BF16, factors, dropout)
        for M, dropout in dict.fromkeys([(15, grouped), (1, grouped), (1, False)])
    ]


# ---- under torch.compile


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_for_any_number_of_tokens(dynamic):
    """One graph for all M, though rows differ by M: that of the most tokens counts."""
    few, many = {"native": 1.0, "reference": 2.0}, {"native": 2.0, "reference": 1.0}
    for M in (8, 32, 128):
        measured(many if M == 128 else few, M=M)
    assert chosen(M=8) == "native"
    layer = fastlora.Linear(64, 96, r=8)
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return boxed_nop(graph, inputs)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=boxed_nop)
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=dynamic)
    for M in (7, 30, 33, 130):
        compiled(torch.randn(M, 64)).sum().backward()
    assert len(graphs) == (1 if dynamic else 2), "as many as without tables"
    operators = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert not any("fastlora" in name for name in operators), "the reference has no operators"


def test_compiled_for_any_sizes(monkeypatch):
    """Nothing is compiled anew for another K or r, where these are symbols too."""
    monkeypatch.setattr(backends, "_best", lambda device, dtype: "reference")
    torch._dynamo.reset()
    counter, counts = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(lora_linear, backend=counter, fullgraph=True, dynamic=True)
    for M, K, r in ((5, 8, 2), (6, 9, 3), (7, 100, 40)):
        x, W, A, B = (torch.randn(shape) for shape in ((M, K), (12, K), (r, K), (12, r)))
        got = compiled(x, W, A, B, scaling=1.0)
        torch.testing.assert_close(got, x @ W.t() + x @ A.t() @ B.t())
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


def test_exported_for_any_batch():
    measured(M=128)
    layer = fastlora.Linear(64, 96, r=8).requires_grad_(False)
    batch = ({0: torch.export.Dim("batch", min=2, max=640)},)
    program = torch.export.export(layer, (torch.randn(5, 64),), dynamic_shapes=batch)
    assert program.module()(torch.randn(600, 64)).shape == (600, 96)
    assert "fastlora" not in str(program.graph), "the reference has no operators"


# ---- files


def test_the_user_goes_before_the_package():
    ship(Row(SHAPE, TIMES), Row(SHAPE._replace(K=128), TIMES))
    assert chosen() == "reference"
    measured({"native": 1.0, "reference": 2.0})
    assert chosen() == "native"
    assert chosen(K=128) == "reference"


def test_rows_are_added_and_replaced():
    first = measured()
    second = measured(r=16)
    assert list(dispatch.rows("cpu").values()) == [first, second]
    again = measured({"native": 1.0})
    (table,) = dispatch.tables("cpu").values()
    assert table.rows == {first.case: again, second.case: second}
    assert table.device == dispatch.device_name("cpu")
    assert table.versions["torch"] == torch.__version__


def test_a_row_survives_the_file():
    row = Row(
        SHAPE._replace(dtype=BF16, dropout=True),
        {"native": 0.1235, "reference": 1e-3},
        failed={"triton": 'RuntimeError: "no"'},
        absent={"other": "not built"},
        threads=2,
        date="2026-01-31",
    )
    dispatch.store(dispatch.user_file("cpu"), "cpu", [row])
    assert list(dispatch.rows("cpu").values()) == [row]


CORRUPT = {
    "empty": "",
    "cut off": '{"format": 1, "rows": [',
    "not an object": "[1, 2]",
    "null": "null",
    "binary": b"\x80\xff\x00",
    "deep": "[" * 100_000,
    "another format": {"format": 2},
    "no rows": {"rows": None},
    "a row that is none": {"rows": [3]},
    "a size": {"rows": [{"M": "512"}]},
    "a negative size": {"rows": [{"M": -1}]},
    "a time": {"rows": [{"ms": {"native": "fast"}}]},
    "a time that is none": {"rows": [{"ms": {"native": float("nan")}}]},
    "no time at all": {"rows": [{"ms": {"native": 0}}]},
    "a dtype": {"rows": [{"dtype": "float8"}]},
    "another torch": {"versions": {"torch": "1.0"}},
}


@pytest.mark.parametrize("defect", CORRUPT)
def test_a_file_that_cannot_be_used_is_named_once(defect):
    measured()
    path, content = dispatch.user_file("cpu"), CORRUPT[defect]
    if isinstance(content, dict):
        found = json.loads(path.read_text())
        changed = content.get("rows")
        if changed and isinstance(changed[0], dict):
            content = {"rows": [found["rows"][0] | changed[0]]}
        content = json.dumps(found | content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    dispatch.forget()
    with pytest.warns(UserWarning, match="does not use the table") as caught:
        assert chosen() == "native"
        assert chosen(M=600) == "native"
    assert len(caught) == 1 and str(path) in str(caught[0].message)
    # the next measurement replaces it
    with pytest.warns(UserWarning, match="does not use the table"):
        measured()
    assert chosen() == "reference"


def test_what_is_no_file_is_named_too(monkeypatch, cache):
    cache.mkdir()
    dispatch.user_file("cpu").mkdir()
    with pytest.warns(UserWarning, match="does not use the table .*IsADirectoryError"):
        assert chosen() == "native"


def test_no_folder_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == "native"


def test_a_corrupt_table_of_the_package_leaves_the_users():
    ship().write_text("{")
    with pytest.warns(UserWarning, match="does not use the table .*shipped"):
        measured()
        assert chosen() == "reference"


def test_a_reader_never_sees_half_a_file():
    measured()
    with dispatch.user_file("cpu").open() as file:
        measured(r=16)
        table = dispatch.Table.parse(file.read())
    assert len(table.rows) == 1 and len(dispatch.rows("cpu")) == 2


def test_a_write_that_fails_leaves_the_file_as_it_was(monkeypatch, cache):
    measured()
    before = dispatch.user_file("cpu").read_bytes()

    def full(self, text, encoding):
        with self.open("w") as file:
            file.write(text[:20])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        measured(r=16)
    assert dispatch.user_file("cpu").read_bytes() == before
    assert {path.name for path in cache.iterdir()} == {dispatch.user_file("cpu").name, ".lock"}


def write_rows(first):
    for r in range(first, first + 10):
        measured(r=r)


@pytest.mark.skipif(sys.platform == "win32", reason="there the last writer wins")
def test_processes_that_write_at_once_lose_nothing():
    # fork: imported once, and to the fixtures' folder
    processes = [
        multiprocessing.get_context("fork").Process(target=write_rows, args=(first,))
        for first in (1, 11, 21)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    dispatch.forget()
    assert sorted(case.r for case in dispatch.rows("cpu")) == list(range(1, 31))


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"FASTLORA_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ("linux", {"FASTLORA_CACHE": "~/own"}, "/home/me/own"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/fastlora"),
        ("linux", {"XDG_CACHE_HOME": ""}, "/home/me/.cache/fastlora"),
        ("darwin", {"XDG_CACHE_HOME": "/xdg"}, "/home/me/Library/Caches/fastlora"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/fastlora"),
        ("win32", {}, "/home/me/AppData/Local/fastlora"),
    ],
)
def test_where_the_users_tables_are(platform, variables, expected, monkeypatch):
    for name in ("FASTLORA_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert dispatch.cache().as_posix() == expected


def test_a_user_without_a_home(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FASTLORA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(UserWarning, match="without tables of this user") as caught:
        assert chosen() == chosen(M=7) == "native"
    assert len(caught) == 1


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="device: got 'tpu', expected cpu"):
        dispatch.user_file("tpu")


def test_a_file_name_is_a_name():
    name = dispatch.file_name("Intel(R) Xeon(R) @ 2.00GHz / x")
    assert name == "intel-r-xeon-r-2-00ghz-x.json"


def test_the_packages_tables_are_whole():
    for path in OF_THE_PACKAGE:
        table = dispatch.Table.parse(path.read_text())
        assert path.name == dispatch.file_name(table.device)
        assert table.rows and all(row.ms and row.date for row in table.rows.values()), path


LAZY = """
import pathlib, torch
def touched(*args, **options):
    raise AssertionError("read")
read, pathlib.Path.read_text = pathlib.Path.read_text, touched
import fastlora
from fastlora import dispatch
layer = fastlora.Linear(8, 8, r=2)
with fastlora.use_backend("reference"):
    layer(torch.ones(1, 8))
try:
    layer(torch.ones(1, 8))
except AssertionError:
    print("read by the first choice")
pathlib.Path.read_text = read
layer(torch.ones(1, 8))
pathlib.Path.read_text = touched
for M in range(1, 9):
    layer(torch.ones(M, 8))
"""


def test_nothing_is_read_but_by_the_first_choice(tmp_path):
    command = [sys.executable, "-c", LAZY]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "read by the first choice\n"


# ---- in words


def test_explain_says_why():
    layer, x = fastlora.Linear(64, 96, r=8, lora_dropout=0.5).eval(), torch.zeros(4, 128, 64)
    layer.train()
    layer.lora_dropout.eval()
    assert (
        "chosen: not measured: no row of this device is near (512, 64, 96), r=8, float32, "
        "no dropout; `fastlora tune` adds rows" in fastlora.explain(layer, x)
    )
    measured({"reference": 0.61, "native": 0.94})
    text = fastlora.explain(layer, x)
    assert "path: reference" in text
    assert "chosen: measured: reference 0.61 ms, native 0.94 ms at (512, 64, 96), r=8\n" in text
    assert "at (512, 64, 96), r=8" in fastlora.explain(layer)
    layer.lora_dropout.train()
    assert "chosen: not measured" in fastlora.explain(layer, x)


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        ({"native": 1.0, "reference": 0.99}, "reference is not faster than native by 3%"),
        ({"triton": 0.1, "native": 1.0, "reference": 2.0}, "triton is not usable now"),
        ({"reference": 1.0}, "native, the usual choice, was not"),
        ({"native": 1.0, "reference": 2.0}, ""),
    ],
)
def test_why_the_fastest_is_not_taken(times, reason, monkeypatch):
    monkeypatch.setattr(triton, "dtypes", {"cuda": FLOATS})
    row = measured(times)
    said = backends.why("auto", "cpu", F32, SHAPE)
    assert said.partition("; ")[::2] == (f"measured: {row} at (512, 64, 96), r=8", reason)


def test_why_by_name():
    measured()
    assert backends.why("reference", "cpu", F32, SHAPE) == "by name"
    with fastlora.use_backend("reference"):
        assert backends.why("auto", "cpu", F32, SHAPE) == "by name"
    assert "no other path" in fastlora.explain(fastlora.Embedding(3, 4, r=2))


# ---- no table of a GPU


def test_the_plain_path_on_a_gpu_is_said_once(monkeypatch):
    monkeypatch.setattr(triton, "why_not", lambda: None)
    monkeypatch.setattr(triton, "why_not_alone", lambda: "its kernels were not measured on it yet")
    backends._warn_of_the_plain_path.cache_clear()
    with pytest.warns(UserWarning, match=r"plain PyTorch .*triton.*`fastlora tune`"):
        assert backends.select("auto", "cuda").name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select("auto", "cuda").name == "reference"
        # by name, where there are no kernels at all, and on a CPU there is nothing to be said
        backends._warn_of_the_plain_path.cache_clear()
        assert backends.select("triton", "cuda").name == "triton"
        assert backends.select("auto", "cuda", torch.float64).name == "reference"
        backends.select("auto", "cpu")
    monkeypatch.setattr(triton, "why_not_alone", lambda: None)
    assert backends.select("auto", "cuda").name == "triton"
