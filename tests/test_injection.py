import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fastlora


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.out(torch.relu(self.q_proj(x)) * self.k_proj(x))


class Net(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self):
        return self.head

    def forward(self, index):
        x = self.embed(index)
        for layer in self.layers:
            x = x + layer(x)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(x))


INDEX = torch.arange(12).view(2, 6)


def state(model):
    return {name: p.clone() for name, p in model.named_parameters()}


def test_layers_are_replaced_in_place_and_share_the_base():
    model = Net()
    base = model.layers[0].q_proj.weight
    expected = model(INDEX)
    report = fastlora.inject(model, ["q_proj", "out", "embed", "conv"], r=4, lora_dropout=0.1)
    layer = model.layers[0].q_proj
    assert isinstance(layer, fastlora.Linear) and layer.weight is base
    assert layer.r == 4 and layer.lora_alpha == 4 and layer.lora_dropout.p == 0.1
    assert isinstance(model.embed, fastlora.Embedding)
    assert isinstance(model.conv, fastlora.Conv1d) and model.conv.factorization == "locon"
    assert type(model.layers[0].k_proj) is nn.Linear
    assert sorted(report.replaced) == [
        "conv",
        "embed",
        "layers.0.out",
        "layers.0.q_proj",
        "layers.1.out",
        "layers.1.q_proj",
    ]
    assert not report.skipped and not report.shared
    factors = fastlora.lora_state_dict(model)
    assert report.trainable == sum(t.numel() for t in factors.values())
    assert report.total == sum(p.numel() for p in model.parameters())
    assert "layers.0.q_proj: Linear 8x8, r=4, scaling=1" in str(report)
    assert torch.equal(model(INDEX), expected)


def test_an_injected_model_trains_only_its_factors():
    torch.manual_seed(0)
    model = Net()
    fastlora.inject(model, "all-linear", r=2, lora_alpha=16)
    fastlora.mark_only_lora_as_trainable(model)
    before = state(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(INDEX).square().mean().backward()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(fastlora.lora_state_dict(model))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], {"layers.0.q_proj", "layers.1.q_proj"}),
        (["layers.0.q_proj"], {"layers.0.q_proj"}),
        (["0.q_proj", "head"], {"layers.0.q_proj", "head"}),
        (r"layers\.1\.(q|k)_proj", {"layers.1.q_proj", "layers.1.k_proj"}),
        ("all-linear", {f"layers.{i}.{n}" for i in (0, 1) for n in ("q_proj", "k_proj", "out")}),
    ],
)
def test_targets(targets, expected):
    assert set(fastlora.inject(Net(), targets, r=1).replaced) == expected


def test_exclusion_and_patterns():
    model = Net()
    report = fastlora.inject(
        model,
        ["q_proj", "k_proj"],
        r=4,
        lora_alpha=8,
        exclude_modules=["1.k_proj"],
        rank_pattern={"k_proj": 2, r"layers\.1\.q_proj": 1},
        alpha_pattern={"0.q_proj": 4},
    )
    assert "layers.1.k_proj" not in report.replaced
    found = {
        name: (layer.r, layer.scaling)
        for name, layer in model.named_modules()
        if name in report.replaced
    }
    assert found == {
        "layers.0.q_proj": (4, 1.0),
        "layers.0.k_proj": (2, 4.0),
        "layers.1.q_proj": (1, 8.0),
    }


def test_fused_projections():
    model = nn.ModuleDict({"qkv": nn.Linear(8, 16)})
    options = {"enable_lora": [True, False, True], "out_splits": [8, 4, 4], "interleave": 2}
    fastlora.inject(model, ["qkv"], r=2, **options)
    assert isinstance(model["qkv"], fastlora.MergedLinear)
    assert model["qkv"].lora_A.shape == (4, 8) and model["qkv"].lora_B.shape == (12, 2)


def test_conv1d_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=8, vocab_size=30)
    model = transformers.GPT2LMHeadModel(config).eval()
    index = torch.arange(8)[None]
    expected = model(index).logits
    report = fastlora.inject(model, ["c_attn"], r=2, enable_lora=[True, False, True])
    layer = model.transformer.h[0].attn.c_attn
    assert list(report.replaced) == ["transformer.h.0.attn.c_attn"]
    assert layer.fan_in_fan_out and layer.weight.shape == (16, 48)
    assert torch.equal(model(index).logits, expected)


def test_a_module_used_twice_is_replaced_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})
    report = fastlora.inject(model, ["a", "b"], r=2)
    assert model["a"] is model["b"]
    assert set(report.replaced) == {"a", "b"} and report.trainable == 16


def test_tied_weights_are_warned_about_and_never_merged():
    torch.manual_seed(0)
    model = Net(tied=True).double()
    with pytest.warns(UserWarning, match=r"embed: its weight is also head\.weight"):
        report = fastlora.inject(model, ["embed", "q_proj"], r=2, init_lora_weights=False)
    assert report.shared == ["embed"]
    before = model.head.weight.clone()
    expected = model(INDEX)
    model.eval()
    assert not model.embed.merged and model.layers[0].q_proj.merged
    assert torch.equal(model.head.weight, before)
    torch.testing.assert_close(model(INDEX), expected)
    with pytest.raises(ValueError, match="shared with another module"):
        model.embed.merge()
    told = pytest.warns(UserWarning, match="embed: is not merged: its weight is shared")
    with told, fastlora.merged(model):
        assert not model.embed.merged
    assert "merging: no, its weight is shared" in fastlora.explain(model.embed)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    fastlora.mark_only_lora_as_trainable(model)
    model.train().eval()
    assert model.embed.merged


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def test_what_cannot_be_replaced_is_reported():
    hooked, patched = nn.Linear(4, 4), nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    patched.forward = lambda x: x
    half_int = nn.Linear(4, 4)
    half_int.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    model = nn.ModuleDict(
        {
            "good": nn.Linear(4, 4),
            "own": OwnForward(4, 4),
            "norm": nn.LayerNorm(4),
            "hooked": hooked,
            "patched": patched,
            "lora": fastlora.Linear(4, 4, r=2),
            "parametrized": parametrizations.weight_norm(nn.Linear(4, 4)),
            "int8": half_int,
            "renorm": nn.Embedding(4, 4, max_norm=1.0),
            "deconv": nn.ConvTranspose1d(4, 4, 3),
        }
    )
    kept = dict(model.items())
    report = fastlora.inject(model, list(model), r=2)
    assert set(report.replaced) == {"good"}
    reasons = {
        "own": "OwnForward is a subclass of Linear",
        "norm": "LayerNorm has no LoRA layer",
        "hooked": "has hooks",
        "patched": "has a forward of its own",
        "lora": "is a LoRA layer already",
        "parametrized": "subclass",
        "int8": "torch.int8",
        "renorm": "max_norm",
        "deconv": "ConvTranspose1d has no LoRA layer",
    }
    assert report.skipped.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in report.skipped[name], (name, report.skipped[name])
        assert model[name] is kept[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_modules": ["q_prj"]}, "'q_prj', which no module of the model matches.*q_proj"),
        ({"target_modules": ["q_proj", "nothing"]}, "'nothing', which no module"),
        ({"target_modules": "layers.*.nothing"}, "which no module"),
        ({"target_modules": "(q_proj"}, "expected a regular expression"),
        ({"target_modules": []}, "empty list"),
        ({"target_modules": ["norm"]}, "nothing that can be replaced.*LayerNorm"),
        ({"exclude_modules": ["k_prj"]}, "exclude_modules: got 'k_prj', which no module.*k_proj"),
        ({"exclude_modules": "k_prj"}, "exclude_modules: got 'k_prj', which no module"),
        ({"rank_pattern": {"q_proj": 2, "k_proj": 4}}, "rank_pattern: got 'k_proj', which matches"),
        ({"alpha_pattern": {"q_prj": 4}}, "alpha_pattern: got 'q_prj', which matches none"),
        ({"r": 0}, "r: got rank 0"),
        ({"r": -1}, "r: got -1"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj: got rank 0"),
        ({"lora_dropout": 1.5}, "lora_dropout: got 1.5"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa'"),
        ({"enable_lora": [True, False, True]}, "enable_lora: got 3 blocks for out_features=8"),
        ({"out_splits": [4, 4]}, "out_splits, interleave"),
        ({"target_modules": ["q_proj", "conv"], "factorization": "cp"}, "factorization: got 'cp'"),
    ],
)
def test_refused_calls_leave_the_model(arguments, message):
    model = Net()
    modules, before = dict(model.named_modules()), state(model)
    with pytest.raises(ValueError, match=message):
        fastlora.inject(model, **{"target_modules": ["q_proj"], "r": 2, **arguments})
    assert all(m is modules[name] for name, m in model.named_modules())
    assert all(p.requires_grad and torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_an_injected_model_can_be_copied_and_takes_the_dtype_of_the_base():
    model = Net().to(torch.bfloat16)
    fastlora.inject(model, ["q_proj"], r=2, lora_dtype=torch.float32)
    layer = copy.deepcopy(model).layers[0].q_proj
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_A.dtype == torch.float32
    assert model(INDEX).dtype == torch.bfloat16


def test_mode_and_device_follow_the_replaced_module():
    model = Net().eval()
    fastlora.inject(model, ["q_proj"], r=2, lora_dropout=0.5)
    layer = model.layers[0].q_proj
    assert not layer.training and not layer.lora_dropout.training
    with torch.device("meta"):
        empty = Net()
    fastlora.inject(empty, ["q_proj"], r=2)
    assert empty.layers[0].q_proj.lora_A.is_meta


def test_a_bare_layer_cannot_be_replaced_in_place():
    for module in (nn.Linear(4, 4), nn.Embedding(4, 4), nn.Conv1d(4, 4, 1)):
        name = type(module).__name__
        with pytest.raises(ValueError, match=f"model: got a {name} itself.*use from_linear"):
            fastlora.inject(module, "all-linear")
