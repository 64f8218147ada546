"""The report of ``fastlora doctor``: complete, honest about failures, readable as text and JSON."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fastlora
from fastlora import backends, dispatch, doctor
from fastlora.__main__ import main


def test_json_report_is_complete(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["versions"]["fastlora"] == fastlora.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["backends"] == backends.available()
    assert len(report["cuda"]["devices"]) == torch.cuda.device_count()
    assert report["self_check"]["reference on cpu"] is None
    checked = {name.split(" on ")[0] for name in report["self_check"]}
    assert checked == {name for name, reason in report["backends"].items() if reason is None}


def test_the_tables_in_use_are_named(cache, capsys):
    assert doctor.collect()["tables"]["cpu"] == {}
    assert main(["doctor"]) == 0
    assert "none (`fastlora tune` makes one)" in capsys.readouterr().out
    path = dispatch.user_file("cpu")
    case = dispatch.Case(6, 8, 12, 2, torch.float32, torch.float32, False)
    dispatch.store(path, "cpu", [dispatch.Row(case, {"reference": 1.0}, date="2026-01-31")])
    assert main(["doctor"]) == 0
    said = f"{path}: 1 rows, measured on {dispatch.device_name('cpu')}, 2026-01-31, fastlora "
    assert said in capsys.readouterr().out


def test_text_report_is_aligned(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("  ")]
    width = max(len(name) for name in doctor.collect()["self_check"])
    assert all(row[2 + width : 4 + width] == "  " and row[4 + width] != " " for row in rows)
    assert "  reference on cpu  ok" in text


@pytest.mark.parametrize("index", range(4))
def test_a_wrong_result_is_found(index, monkeypatch, capsys):
    """Breaks the output (0) or the gradient of x, A or B (1 to 3) in its last digit."""
    right = doctor.lora_linear

    def off(tensor, value, gradient):
        """``tensor`` with a relative error of 2⁻²³ in its value or its gradient."""
        error = tensor.detach() if value else tensor - tensor.detach()
        return tensor + 2**-23 * error if value or gradient else tensor

    def wrong(x, W, A, B, **options):
        x, A, B = (off(factor, False, index == i + 1) for i, factor in enumerate((x, A, B)))
        return off(right(x, W, A, B, **options), index == 0, False)

    monkeypatch.setattr(doctor, "lora_linear", wrong)
    assert main(["doctor"]) == 1
    what = ("output", "gradient of x", "gradient of lora_A", "gradient of lora_B")[index]
    assert capsys.readouterr().out.endswith(f"failed: wrong {what}\n")


def test_a_raising_backend_is_reported(monkeypatch, capsys):
    def raising(*args, **options):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(doctor, "lora_linear", raising)
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["self_check"]["reference on cpu"] == "RuntimeError: no such luck"


@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends that there is a GPU")
def test_a_broken_gpu_is_reported(monkeypatch, capsys):
    gpu = SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "Some GPU, sm_90, 80 GiB" in text
    assert "reference on cuda  failed: " in text
    assert "reference on cpu   ok" in text


def test_runs_as_a_module_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "fastlora", "doctor", "--json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["ok"] is True


def test_version_and_missing_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastlora {fastlora.__version__}\n"
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
