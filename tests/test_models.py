import os

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

import fastlora


def model():
    return nn.ModuleDict(
        {
            "base": nn.Linear(4, 4),
            "adapted": fastlora.Linear(4, 4, r=2, lora_bias=True),
            "plain": fastlora.Linear(4, 4, r=0),
            "conv": fastlora.Conv2d(2, 2, 3, r=1, factorization="tucker"),
            "norm": nn.LayerNorm(4),
            "attention": nn.MultiheadAttention(4, 2),
            "relative_attention_bias": nn.Embedding(3, 2),
        }
    )


FACTORS = {
    "adapted.lora_A",
    "adapted.lora_B",
    "adapted.lora_bias",
    "conv.lora_A",
    "conv.lora_mid",
    "conv.lora_B",
}
BIASES = {
    "none": set(),
    "lora_only": {"adapted.bias", "conv.bias"},
    "all": {
        "base.bias",
        "adapted.bias",
        "plain.bias",
        "conv.bias",
        "norm.bias",
        "attention.in_proj_bias",
        "attention.out_proj.bias",
    },
}


@pytest.mark.parametrize("bias", BIASES)
def test_what_trains_and_what_is_saved(bias):
    net = model()
    for parameter in net.parameters():
        parameter.requires_grad = False
    fastlora.mark_only_lora_as_trainable(net, bias)
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trainable == FACTORS | BIASES[bias]
    saved = fastlora.lora_state_dict(net, bias)
    assert set(saved) == trainable
    assert all(not t.requires_grad for t in saved.values())
    assert saved["adapted.lora_A"].data_ptr() == net["adapted"].lora_A.data_ptr()


def test_an_unknown_bias_changes_nothing():
    net = model()
    before = {name: p.requires_grad for name, p in net.named_parameters()}
    for function in (fastlora.mark_only_lora_as_trainable, fastlora.lora_state_dict):
        with pytest.raises(ValueError, match="bias: got 'some', expected one of 'none'"):
            function(net, "some")
    assert before == {name: p.requires_grad for name, p in net.named_parameters()}


def test_a_layer_may_be_the_whole_model():
    layer = fastlora.Linear(4, 4, r=2)
    fastlora.mark_only_lora_as_trainable(layer)
    assert set(fastlora.lora_state_dict(layer)) == {"lora_A", "lora_B"}
    fastlora.switch(layer, {name: t + 1 for name, t in fastlora.lora_state_dict(layer).items()})
    assert (layer.lora_B == 1).all()


def test_explain_says_which_path_and_why():
    layer = fastlora.Linear(4, 4, r=2, lora_dropout=0.5, backend="reference")
    text = fastlora.explain(layer, torch.zeros(1, 4))
    assert "path: reference (plain PyTorch)" in text
    assert "dropout: p=0.5" in text and "torch.float32" in text
    with torch.autocast("cpu", torch.bfloat16):
        assert "torch.bfloat16 input and weight (autocast)" in fastlora.explain(
            layer, torch.zeros(1, 4)
        )
    layer.eval()
    assert "merged" in fastlora.explain(layer) and "bytes a weight" in fastlora.explain(layer)
    assert "no factors" in fastlora.explain(fastlora.Linear(4, 4))
    with pytest.raises(TypeError, match="layer: got Linear, expected a fastlora layer"):
        fastlora.explain(nn.Linear(4, 4))


def test_a_demanded_extension_is_what_runs():
    """Where FASTLORA_BUILD=1 asked for it, as in CI, nothing falls back to the reference."""
    reason = fastlora.backends.available()["native"]
    if reason and os.environ.get("FASTLORA_BUILD") != "1":
        pytest.skip(f"native: {reason}")
    assert reason is None
    build = fastlora.backends.native._C.build_info()
    path = f"path: native ({build['instruction_set']}, {build['vector_bits']}-bit vectors"
    layer = fastlora.Linear(4, 4, r=2)
    assert path in fastlora.explain(layer)
    assert path in fastlora.explain(layer, torch.zeros(1, 4))
    with fastlora.use_backend("reference"):
        assert "path: reference" in fastlora.explain(layer)


def test_the_reference_runs_where_nothing_else_does(monkeypatch):
    monkeypatch.setattr(fastlora.backends.native, "_obstacle", "not today")
    layer = fastlora.Linear(4, 4, r=2)
    text = fastlora.explain(layer)
    assert "path: reference" in text and "native: not today" in text
    layer(torch.zeros(1, 4))


def test_backends():
    found = fastlora.backends.available()
    assert found["reference"] is None
    layer, x = fastlora.Linear(4, 4, r=2, init_lora_weights=False), torch.randn(3, 4)
    with fastlora.use_backend("reference"):
        assert fastlora.backends.select().name == "reference"
        layer(x)
    with pytest.raises(ValueError, match="backend: got 'cuda', expected 'auto' or one of"):
        layer.backend = "cuda"
        layer(x)
    for name, reason in found.items():
        if reason is not None:
            with (
                pytest.raises(ValueError, match=f"{name!r} is not usable here"),
                fastlora.use_backend(name),
            ):
                pass


# ---- what counts as a factor, and how it is called


@pytest.mark.parametrize("whole", [False, True])
def test_checkpointed_modules_are_named_as_in_state_dict(tmp_path, whole):
    net = model()
    wrapped = model()
    if whole:
        wrapped = checkpoint_wrapper(wrapped)
    else:
        wrapped["adapted"] = checkpoint_wrapper(wrapped["adapted"])
        wrapped["conv"] = checkpoint_wrapper(wrapped["conv"])
    for p in fastlora.lora_state_dict(wrapped).values():
        nn.init.normal_(p)
    fastlora.mark_only_lora_as_trainable(wrapped, "lora_only")
    assert sum(p.requires_grad for p in wrapped.parameters()) == len(FACTORS) + 2
    saved = {key: t.clone() for key, t in fastlora.lora_state_dict(wrapped).items()}
    assert set(saved) == FACTORS == {key for key in wrapped.state_dict() if "lora_" in key}
    assert not wrapped.load_state_dict(saved, strict=False).unexpected_keys
    for source, target in ((wrapped, net), (net, wrapped), (wrapped, wrapped)):
        fastlora.adapters.save(source, tmp_path / "a.safetensors")
        fastlora.adapters.load(target, tmp_path / "a.safetensors")
    assert all(torch.equal(t, saved[key]) for key, t in fastlora.lora_state_dict(net).items())
    other = {key: t + 1 for key, t in saved.items()}
    wrapped.eval()
    fastlora.switch(wrapped, other)
    assert all(torch.equal(t, other[key]) for key, t in fastlora.lora_state_dict(wrapped).items())
    assert set(fastlora.merged_state_dict(wrapped)) == set(net.state_dict()) - FACTORS
    exported = fastlora.adapters.export_state_dict(wrapped)
    assert "conv.conv.weight" in exported and "conv.weight" not in exported


class OwnFactors(nn.Linear):
    """A hand-written layer, as of other libraries."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.lora_A = nn.Parameter(torch.ones(1))
        self.lora_scales = nn.Parameter(torch.ones(2))


def test_factors_of_other_layers_are_factors():
    net = nn.Sequential(fastlora.Linear(4, 4, r=2), OwnFactors(4, 4))
    fastlora.mark_only_lora_as_trainable(net)
    own = {"0.lora_A", "0.lora_B"}
    expected = {*own, "1.lora_A", "1.lora_scales"}
    assert {name for name, p in net.named_parameters() if p.requires_grad} == expected
    saved = fastlora.lora_state_dict(net)
    assert set(saved) == expected
    assert set(fastlora.adapters.export_state_dict(net, adapter_only=True)) == expected
    biases = {"0.bias", "1.bias"}
    assert set(fastlora.lora_state_dict(net, "lora_only")) == expected | biases
    fastlora.adapters.load(net, {key: t + 1 for key, t in saved.items()})
    assert net[1].lora_A == 2
    with pytest.raises(KeyError, match=r"1\.lora_A: is missing"):
        fastlora.adapters.load(net, {key: saved[key] for key in own})
    with pytest.raises(KeyError, match=r"'1', which is no fastlora layer"):
        fastlora.switch(net, saved)


def test_an_embedding_of_loralib_beside_own_layers():
    loralib = pytest.importorskip("loralib")
    net = nn.ModuleDict({"table": loralib.Embedding(5, 4, r=2), "own": fastlora.Linear(4, 4, r=2)})
    fastlora.mark_only_lora_as_trainable(net)
    found = {name for name, p in net.named_parameters() if p.requires_grad}
    assert found == set(fastlora.lora_state_dict(net)) == set(loralib.lora_state_dict(net))


def test_parametrized_factors_are_factors():
    net = nn.Sequential(fastlora.Linear(4, 4, r=2, init_lora_weights=False))
    parametrizations.weight_norm(net[0], "lora_A")
    fastlora.mark_only_lora_as_trainable(net)
    saved = {key: t.clone() for key, t in fastlora.lora_state_dict(net).items()}
    assert set(saved) == {name for name, p in net.named_parameters() if p.requires_grad}
    assert set(saved) == {
        "0.lora_B",
        "0.parametrizations.lora_A.original0",
        "0.parametrizations.lora_A.original1",
    }
    whole = {key: t + 1 for key, t in net.state_dict().items()}
    fastlora.adapters.load(net, whole)
    assert torch.equal(net[0].lora_B, whole["0.lora_B"])


def test_a_model_without_factors_is_warned_about():
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="got a model without factors"):
        fastlora.mark_only_lora_as_trainable(net, "all")
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["0.bias"]


# ---- weights that are shared


@pytest.mark.parametrize(
    "tie",
    [
        lambda weight: weight,
        lambda weight: nn.Parameter(weight.data),
        lambda weight: nn.Parameter(weight.data[2:]),
        lambda weight: nn.Parameter(weight.data.view(5, 16)[:, 3:]),
    ],
)
def test_weights_that_share_memory_are_never_merged(tie):
    net = nn.ModuleDict({"emb": nn.Embedding(10, 8), "head": nn.Linear(8, 10, bias=False)})
    net["head"].weight = tie(net["emb"].weight)
    before = net["head"].weight.clone()
    with pytest.warns(UserWarning, match=r"emb: its weight is also head\.weight"):
        report = fastlora.inject(net, ["emb"], r=2, init_lora_weights=False)
    assert report.shared == ["emb"]
    net.eval()
    assert not net["emb"].merged and torch.equal(net["head"].weight, before)


def test_tied_weights_from_a_checkpoint_that_was_assigned():
    with torch.device("meta"):
        net = nn.ModuleDict({"emb": nn.Embedding(10, 8), "head": nn.Linear(8, 10, bias=False)})
        net["head"].weight = net["emb"].weight
    table = torch.randn(10, 8)
    net.load_state_dict({"emb.weight": table, "head.weight": table}, assign=True)
    assert net["head"].weight is not net["emb"].weight
    with pytest.warns(UserWarning, match="its weight is also"):
        assert fastlora.inject(net, ["emb"], r=2).shared == ["emb"]


def test_parts_of_one_buffer_are_not_shared():
    buffer = torch.randn(2, 8, 8)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer, part in zip(net, buffer, strict=True):
        layer.weight = nn.Parameter(part)
    assert not fastlora.inject(net, ["0", "1"], r=2).shared
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert not fastlora.inject(net, ["0", "1"], r=2).shared
