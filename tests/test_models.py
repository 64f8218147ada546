import os

import pytest
import torch
from torch import nn

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
