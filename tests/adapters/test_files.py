import math
import os
import threading

import pytest
import torch
from safetensors import safe_open
from torch import nn

import fastlora
from fastlora import adapters


def model(seed=0, alpha=4):
    torch.manual_seed(seed)
    options = {"r": 2, "lora_alpha": alpha, "init_lora_weights": False}
    return nn.Sequential(
        fastlora.Linear(8, 6, **options),
        fastlora.MergedLinear(6, 9, enable_lora=[True, False, True], **options),
        nn.Linear(9, 3),
    )


def state(net):
    return {name: p.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("saved_merged", [False, True])
@pytest.mark.parametrize("loaded_merged", [False, True])
def test_round_trip_in_any_mode(tmp_path, saved_merged, loaded_merged):
    source, target = model(0), model(1)
    source.train(not saved_merged)
    target.train(not loaded_merged)
    adapters.save(source, tmp_path / "a.safetensors")
    adapters.load(target, tmp_path / "a.safetensors")
    assert target[0].merged is loaded_merged
    found = fastlora.lora_state_dict(target)
    expected = fastlora.lora_state_dict(source)
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    target.train()
    original = model(1)
    assert torch.equal(target[0].weight, original[0].weight)


def test_the_file_says_what_it_is(tmp_path):
    adapters.save(model(), tmp_path / "a.safetensors", bias="lora_only")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == {
            f"{i}.{leaf}" for i in (0, 1) for leaf in ("lora_A", "lora_B", "bias")
        }
        assert file.metadata()["scaling"] == '{"0": 2.0, "1": 2.0}'


def test_the_file_has_the_usual_permissions(tmp_path):
    adapters.save(model(), tmp_path / "a.safetensors")
    (tmp_path / "b").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    adapters.save(model(), path)
    before = path.read_bytes()

    def fail(path, target):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        adapters.save(model(1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_shared_layer_is_saved_under_both_names(tmp_path):
    layer = fastlora.Linear(4, 4, r=2)
    adapters.save(nn.ModuleDict({"a": layer, "b": layer}), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == {"a.lora_A", "a.lora_B", "b.lora_A", "b.lora_B"}


def test_refused_saves(tmp_path):
    with pytest.raises(ValueError, match="format: got 'peft2'"):
        adapters.save(model(), tmp_path / "a", format="peft2")
    with pytest.raises(ValueError, match="bias: got 'some'"):
        adapters.save(model(), tmp_path / "a", bias="some")
    with pytest.raises(ValueError, match="no LoRA layer"):
        adapters.save(nn.Linear(2, 2), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def corrupt(content):
    return [content[:20], content[:-7], b"\xff" * 8 + content[8:], b"PK\x03\x04" + content, b""]


@pytest.mark.parametrize("which", range(5))
def test_a_damaged_file_is_refused(tmp_path, which):
    path = tmp_path / "a.safetensors"
    adapters.save(model(), path)
    path.write_bytes(corrupt(path.read_bytes())[which])
    net = model(1)
    before = state(net)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        adapters.load(net, path)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_another_scaling_is_refused(tmp_path):
    adapters.save(model(alpha=4), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"0: the adapter was saved with scaling=2, expected 4"):
        adapters.load(model(alpha=8), tmp_path / "a.safetensors")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        adapters.load(model(), tmp_path / "a.safetensors")


def spoiled(good):
    yield KeyError, "0.lora_B: is missing", {k: t for k, t in good.items() if k != "0.lora_B"}
    yield KeyError, "5.lora_A: the model has no", {**good, "5.lora_A": good["0.lora_A"]}
    yield ValueError, "1.lora_A: got shape", {**good, "1.lora_A": good["0.lora_A"]}
    yield TypeError, "0.lora_A: got list", {**good, "0.lora_A": [1.0]}
    yield fastlora.MergeError, "NaN", {**good, "1.lora_A": good["1.lora_A"] * math.nan}


@pytest.mark.parametrize("which", range(5))
def test_a_bad_checkpoint_leaves_a_merged_model(which):
    net = model().eval()
    before = state(net)
    error, message, bad = list(spoiled(fastlora.lora_state_dict(model(1))))[which]
    with pytest.raises(error, match=message):
        adapters.load(net, bad)
    assert net[0].merged and net[1].merged
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    net.train()
    assert torch.equal(net[0].weight, model()[0].weight)


# ---- where it is written to


def test_threads_save_to_one_file(tmp_path):
    net, path, failed = model(), tmp_path / "a.safetensors", []

    def save_often():
        try:
            for _ in range(20):
                adapters.save(net, path)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=save_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and list(tmp_path.iterdir()) == [path]
    adapters.load(net, path)


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=real: calls.append(n) or f(*a))
    adapters.save(model(), tmp_path / "a.safetensors")
    assert calls == ["fsync", "replace"]


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "files").mkdir()
    link, target = tmp_path / "link", tmp_path / "files" / "a.safetensors"
    link.symlink_to(target)
    for seed in (0, 1):
        adapters.save(model(seed), link)
        assert link.is_symlink() and target.is_file()
        adapters.load(model(), target)


def test_what_is_no_file_is_refused(tmp_path):
    for path, kind in ((tmp_path, "a folder"), (os.devnull, "a device")):
        with pytest.raises(ValueError, match=f"path: got {path}, which is {kind}"):
            adapters.save(model(), path)
        with pytest.raises(FileNotFoundError, match="no such file"):
            adapters.load(model(), path)
    with pytest.raises(FileNotFoundError, match="path: got missing/a, but its folder"):
        adapters.save(model(), "missing/a")
    assert not list(tmp_path.iterdir())
