"""``import fastlora as lora`` for ``import loralib as lora``: same names, numbers and files."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlora

loralib = pytest.importorskip("loralib")

QV = [True, False, True]
CASES = {
    "linear": ("Linear", (12, 20), {"r": 4}),
    "linear-alpha": ("Linear", (12, 20), {"r": 4, "lora_alpha": 32}),
    "linear-fan": ("Linear", (12, 20), {"r": 4, "lora_alpha": 3, "fan_in_fan_out": True}),
    "linear-positional": ("Linear", (12, 20, 4, 16, 0.0, True, False), {}),
    "linear-never-merged": ("Linear", (12, 20), {"r": 4, "merge_weights": False}),
    "linear-no-bias": ("Linear", (12, 20), {"r": 1, "bias": False}),
    "linear-plain": ("Linear", (12, 20), {}),
    "linear-plain-fan": ("Linear", (12, 20), {"fan_in_fan_out": True}),
    "linear-double": ("Linear", (12, 20), {"r": 4, "dtype": torch.double}),
    "merged": ("MergedLinear", (12, 24), {"r": 4, "enable_lora": QV}),
    "merged-all": ("MergedLinear", (12, 24), {"r": 4, "lora_alpha": 8, "enable_lora": [True] * 3}),
    "merged-one": ("MergedLinear", (12, 24), {"r": 4, "enable_lora": [False, True]}),
    "merged-single": ("MergedLinear", (12, 24), {"r": 4, "enable_lora": [True]}),
    "merged-positional": (
        "MergedLinear",
        (12, 24, 2, 6, 0.0, [False, True, True], True, False),
        {},
    ),
    "merged-fan": ("MergedLinear", (12, 24), {"r": 4, "enable_lora": QV, "fan_in_fan_out": True}),
    "merged-no-bias": ("MergedLinear", (12, 24), {"r": 2, "enable_lora": QV, "bias": False}),
    "merged-plain": ("MergedLinear", (12, 24), {"enable_lora": QV}),
    "merged-double": ("MergedLinear", (12, 24), {"r": 2, "enable_lora": QV, "dtype": torch.double}),
    "embedding": ("Embedding", (30, 8), {"r": 4, "lora_alpha": 8}),
    "embedding-positional": ("Embedding", (30, 8, 4, 2, False), {}),
    "embedding-padding": ("Embedding", (30, 8), {"r": 4, "padding_idx": 3}),
    "embedding-frequency": ("Embedding", (30, 8), {"r": 4, "scale_grad_by_freq": True}),
    "embedding-plain": ("Embedding", (30, 8), {}),
    "embedding-double": ("Embedding", (30, 8), {"r": 4, "dtype": torch.double}),
    "conv": ("Conv2d", (4, 6, 3), {"r": 2}),
    "conv-positional": ("Conv2d", (4, 6, 3, 2, 8, 0.0, False), {}),
    "conv-geometry": ("Conv2d", (4, 6, 3), {"r": 2, "stride": 2, "padding": 2, "dilation": 2}),
    "conv-reflect": ("Conv2d", (4, 6, 3), {"r": 2, "padding": 1, "padding_mode": "reflect"}),
    "conv-same": ("Conv2d", (4, 6, 3), {"r": 2, "padding": "same"}),
    "conv-groups": ("Conv2d", (4, 6, 3), {"r": 2, "groups": 2}),
    "conv-pointwise": ("Conv2d", (4, 6, 1), {"r": 2, "bias": False}),
    "conv-plain": ("Conv2d", (4, 6, 3), {}),
    "conv-double": ("Conv2d", (4, 6, 3), {"r": 2, "dtype": torch.double}),
}
each_path = pytest.mark.parametrize("path", ["auto", "triton", "emulated"], indirect=True)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def build(lora, case, seed=0, **more):
    name, sizes, options = CASES[case]
    torch.manual_seed(seed)
    return getattr(lora, name)(*sizes, **options, **more)


def draw_factors(*models):
    for model in models:
        generator = torch.Generator().manual_seed(7)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = torch.randn(p.shape, generator=generator, dtype=torch.double).to(p.dtype)
    return models


def inputs(case, dtype):
    name, sizes, _ = CASES[case]
    torch.manual_seed(1)
    if name == "Embedding":
        return torch.randint(sizes[0], (3, 7))
    shape = (2, sizes[0], 7, 6) if name == "Conv2d" else (3, 5, sizes[0])
    return torch.randn(shape, dtype=torch.double).to(dtype).requires_grad_()


def plain_names(state):
    return {k.replace("conv.", ""): t for k, t in state.items()}


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name, t in expected.items():
        assert got[name].dtype == t.dtype and torch.equal(got[name], t), name


def assert_no_worse(got, plain, exact):
    """At most twice loralib's own error against fp64, and the rounding of the largest value."""
    assert got.dtype == plain.dtype and got.shape == exact.shape
    if got.dtype == torch.double:
        assert (got - exact).abs().max() <= 1e-12 * exact.abs().max()
        return
    error, allowed = ((t.double() - exact).abs().max() for t in (got, plain))
    assert error <= 2 * allowed + torch.finfo(got.dtype).eps * exact.abs().max()


# ---- (a) construction


@pytest.mark.parametrize("case", CASES)
def test_same_seed_gives_the_same_parameters(case):
    old, before = build(loralib, case), torch.get_rng_state()
    new, after = build(fastlora, case), torch.get_rng_state()
    assert torch.equal(before, after)
    assert_same_bits(new.state_dict(), plain_names(old.state_dict()))
    if CASES[case][0] != "Conv2d":
        assert list(new.state_dict()) == list(old.state_dict())
    grads = [{k: p.requires_grad for k, p in m.named_parameters()} for m in (old, new)]
    assert grads[1] == plain_names(grads[0])
    names = ["r", "lora_alpha", "merge_weights", "merged", "scaling", "enable_lora"]
    for name in (*names, "fan_in_fan_out", "in_features", "out_features", "num_embeddings"):
        assert getattr(new, name, None) == getattr(old, name, None), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["linear-fan", "merged", "embedding", "conv"])
def test_same_seed_gives_the_same_16_bit_parameters(case, dtype):
    old, new = (build(lora, case, dtype=DTYPES[dtype]) for lora in (loralib, fastlora))
    assert_same_bits(new.state_dict(), plain_names(old.state_dict()))


def test_reset_parameters_draws_as_loralib_does():
    for case in ("linear", "merged", "embedding", "conv"):
        old, new = build(loralib, case), build(fastlora, case)
        for layer in (old, new):
            torch.manual_seed(3)
            layer.reset_parameters()
        assert_same_bits(new.state_dict(), plain_names(old.state_dict()))


def test_dropout_is_taken_by_name_and_place():
    for new in (fastlora.Linear(4, 6, 2, 1, 0.25), fastlora.Conv2d(4, 6, 3, 2, 1, 0.25)):
        assert isinstance(new.lora_dropout, nn.Dropout) and new.lora_dropout.p == 0.25
    assert fastlora.MergedLinear(4, 6, r=2, lora_dropout=0.25, enable_lora=[True]).lora_dropout.p


def test_utils():
    for name in ("mark_only_lora_as_trainable", "lora_state_dict"):
        assert getattr(fastlora.utils, name) is getattr(fastlora, name)
        assert callable(getattr(loralib.utils, name))


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("merged")])
def test_merge_AB(case):
    """The delta by itself, with gradients, in the place of the weight."""
    old, new = draw_factors(*(build(lora, case) for lora in (loralib, fastlora)))
    if not hasattr(old, "lora_A"):
        pytest.skip("has no factors")
    old, new = old.double(), new.double()
    got, expected = new.merge_AB(), old.merge_AB()
    assert_no_worse(got, expected, expected)
    assert got.shape == new.weight.shape
    for delta in (got, expected):
        delta.square().sum().backward()
    assert_no_worse(new.lora_A.grad, old.lora_A.grad, old.lora_A.grad)
    assert_no_worse(new.lora_B.grad, old.lora_B.grad, old.lora_B.grad)


# ---- (b) forward, gradients, modes


def run(layer, case, dtype):
    x = inputs(case, dtype)
    y = layer(x)
    torch.manual_seed(2)
    if y.requires_grad:
        y.backward(torch.randn(y.shape, dtype=torch.double).to(y.dtype))
    results = {"y": y.detach(), "x": x.grad if x.is_floating_point() else None}
    return {**results, **plain_names({k: p.grad for k, p in layer.named_parameters()})}


@each_path
@pytest.mark.parametrize("merged", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case, merged, path):
    if path != "auto" and case.endswith("double"):
        pytest.skip("no kernels for float64")
    old, new = draw_factors(build(loralib, case), build(fastlora, case))
    exact = copy.deepcopy(old).double()
    for layer in (old, new, exact):
        layer.train(not merged)
    assert new.merged == (merged and new.merge_weights and new.r > 0)
    dtype = next(new.parameters()).dtype
    expected = run(old, case, dtype)
    got, exact = run(new, case, dtype), run(exact, case, torch.double)
    assert got.keys() == expected.keys()
    for name, t in expected.items():
        assert (got[name] is None) == (t is None), name
        if t is not None:
            assert_no_worse(got[name], t, exact[name])


@pytest.mark.parametrize("case", ["linear-fan", "merged", "embedding", "conv"])
@pytest.mark.parametrize("merge_weights", [True, False])
def test_modes(case, merge_weights):
    name, sizes, options = CASES[case]
    new = getattr(fastlora, name)(*sizes, **options, merge_weights=merge_weights)
    draw_factors(new)
    before = new.weight.detach().clone()
    for _ in range(2):
        assert new.eval() is new and not new.training
        assert new.merged is merge_weights
        assert torch.equal(new.weight, before) is not merge_weights
        assert new.eval().merged is merge_weights
        assert new.train() is new and new.training and not new.merged
        assert torch.equal(new.weight, before)
    assert new.train(False) is new and new.merged is merge_weights
    assert not new.train(True).merged


# ---- (c) which parameters train, and which are saved


class Mixed(nn.Module):
    def __init__(self, lora, conv=False):
        super().__init__()
        self.embed = lora.Embedding(11, 8, r=2)
        self.norm = nn.LayerNorm(8)
        self.attn = nn.ModuleDict({"qkv": lora.MergedLinear(8, 24, r=2, enable_lora=QV)})
        self.out = lora.Linear(8, 8, r=2, bias=False)
        self.fan = lora.Linear(8, 8, r=2, fan_in_fan_out=True)
        self.plain = lora.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        if conv:
            self.conv = lora.Conv2d(1, 4, 3, r=2)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_trainable_and_saved_names(bias):
    models, names, saved = {}, {}, {}
    for lora in (loralib, fastlora):
        torch.manual_seed(0)
        model = models[lora] = Mixed(lora, conv=bias != "lora_only")
        lora.mark_only_lora_as_trainable(model, bias=bias)
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        names[lora] = set(trainable)
        saved[lora] = lora.lora_state_dict(model, bias=bias)
    rename = {"conv.conv.bias": "conv.bias"}
    expected = {rename.get(n, n) for n in names[loralib]}
    expected_saved = {rename.get(n, n): t for n, t in saved[loralib].items()}
    if bias == "lora_only":
        # loralib takes r = 0 for an adapted layer here, but only when it marks, not when it saves
        assert expected ^ expected_saved.keys() == {"plain.bias"}
        expected.discard("plain.bias")
    assert names[fastlora] == expected
    assert_same_bits(saved[fastlora], expected_saved)
    assert bias != "none" or list(saved[fastlora]) == list(expected_saved)
    own = dict(models[fastlora].named_parameters())
    assert all(t.data_ptr() == own[n].data_ptr() for n, t in saved[fastlora].items())


# ---- (d) whole models, trained


class GPT2Block(nn.Module):
    def __init__(self, lora, nx, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(nx), nn.LayerNorm(nx)
        self.c_attn = lora.MergedLinear(
            nx,
            3 * nx,
            r=4,
            lora_alpha=32,
            lora_dropout=0.0,
            enable_lora=[True, False, True],
            fan_in_fan_out=True,
            merge_weights=False,
        )
        self.c_proj = nn.Linear(nx, nx)
        self.mlp = nn.Sequential(nn.Linear(nx, 4 * nx), nn.GELU(), nn.Linear(4 * nx, nx))

    def forward(self, x):
        qkv = self.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(a.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    def __init__(self, lora):
        super().__init__()
        self.wte = nn.Embedding(40, 32)
        self.h = nn.Sequential(*(GPT2Block(lora, 32, 4) for _ in range(2)))
        self.head = nn.Linear(32, 40, bias=False)

    def loss(self, index):
        logits = self.head(self.h(self.wte(index[:, :-1])))
        return F.cross_entropy(logits.flatten(0, 1), index[:, 1:].flatten())


class Roberta(nn.Module):
    def __init__(self, lora):
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.query = lora.Linear(32, 32, r=4, lora_alpha=8)
        self.key = nn.Linear(32, 32)
        self.value = lora.Linear(32, 32, r=4, lora_alpha=8)
        self.norm = nn.LayerNorm(32)
        self.classifier = nn.Linear(32, 3)

    def loss(self, index):
        x = self.embed(index)
        qkv = (layer(x).unflatten(-1, (4, 8)) for layer in (self.query, self.key, self.value))
        a = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in qkv))
        x = self.norm(x + a.transpose(1, 2).flatten(2))
        return F.cross_entropy(self.classifier(x[:, 0]), index.sum(1) % 3)


class Pixels(nn.Module):
    def __init__(self, lora):
        super().__init__()
        self.embed = lora.Embedding(40, 4, r=2, lora_alpha=4)
        self.conv = lora.Conv2d(4, 8, 3, r=2, lora_alpha=4, padding=1)
        self.classifier = nn.Linear(8, 3)

    def loss(self, index):
        x = self.embed(index).transpose(1, 2).unflatten(2, (4, 4))
        return F.cross_entropy(self.classifier(self.conv(x).tanh().mean((2, 3))), index.sum(1) % 3)


def train(lora, model_class, steps=20):
    torch.manual_seed(0)
    model = model_class(lora)
    lora.mark_only_lora_as_trainable(model)
    if hasattr(model, "classifier"):
        model.classifier.requires_grad_(True)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for step in range(steps):
        # as in practice: an evaluation between two steps
        if step % 5 == 4:
            model.eval()
            with torch.no_grad():
                losses.append(model.loss(torch.randint(40, (8, 16))).item())
            model.train()
        loss = model.loss(torch.randint(40, (8, 16)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, lora.lora_state_dict(model), model


@each_path
@pytest.mark.parametrize("model", [GPT2, Roberta, Pixels])
def test_training_takes_the_same_course(model, path, request):
    if (model, path) == (GPT2, "triton") and not request.config.getoption("full", False):
        pytest.skip("half a minute in the interpreter: --full")
    (old, old_factors, _), (new, new_factors, trained) = (
        train(lora, model) for lora in (loralib, fastlora)
    )
    assert old[0] == pytest.approx(new[0], abs=1e-6)
    assert new == pytest.approx(old, abs=1e-5)
    assert old_factors.keys() == new_factors.keys()
    start = {k: t.clone() for k, t in fastlora.lora_state_dict(initial(model)).items()}
    for name, factor in old_factors.items():
        torch.testing.assert_close(new_factors[name], factor, rtol=0, atol=1e-5)
        assert (factor - start[name]).abs().max() > 1e-2
    untouched = initial(model).state_dict()
    for name, t in trained.state_dict().items():
        if "lora_" not in name and "classifier" not in name:
            assert torch.equal(t, untouched[name]), name


def initial(model):
    torch.manual_seed(0)
    return model(fastlora)


# ---- (e) checkpoints


class Net(nn.Module):
    def __init__(self, lora, conv=None):
        super().__init__()
        self.embed = lora.Embedding(11, 8, r=2)
        self.block = nn.ModuleDict({"conv": (conv or lora.Conv2d)(4, 6, 3, r=2)})
        self.qkv = lora.MergedLinear(8, 24, r=2, enable_lora=QV, fan_in_fan_out=True)
        self.head = lora.Linear(8, 3, r=2)
        self.norm = nn.BatchNorm1d(8)


class PlainNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3)})
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)
        # stored as (in, out), as in GPT-2
        self.qkv.weight = nn.Parameter(self.qkv.weight.data.T.contiguous())


class HeadConv2d(loralib.Conv2d):
    """As in loralib's later sources, the kernel has a second name."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight, self.bias = self.conv.weight, self.conv.bias


def make_net(lora, seed, **options):
    torch.manual_seed(seed)
    net = Net(lora, **options)
    for name, p in net.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
    return net


def snapshot(model):
    """Tensors of a model in training mode, under the plain names."""
    return {k.replace("conv.conv.", "conv."): t.clone() for k, t in model.state_dict().items()}


modes = pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])


@modes
@pytest.mark.parametrize("conv", [loralib.Conv2d, HeadConv2d], ids=["0.1.2", "HEAD"])
@pytest.mark.parametrize("how", ["load_state_dict", "adapters.load", "model_state_dict"])
def test_loralib_checkpoint_into_fastlora(how, conv, mode, tmp_path):
    old, new = make_net(loralib, 0, conv=conv), make_net(fastlora, 1).train(mode)
    torch.save(old.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    keys = list(state)
    if how == "load_state_dict":
        new.load_state_dict(state)
    elif how == "adapters.load":
        fastlora.adapters.load(new, state)
    else:
        fastlora.adapters.load(new, {"model_state_dict": state, "step": 3})
    assert list(state) == keys
    assert_same_bits(snapshot(new), snapshot(old))
    assert_same_bits(snapshot(new.train()), snapshot(old))


@modes
@pytest.mark.parametrize("conv_names", ["0.1.2", "HEAD"])
def test_fastlora_checkpoint_into_loralib(conv_names, mode):
    conv = loralib.Conv2d if conv_names == "0.1.2" else HeadConv2d
    new, old = make_net(fastlora, 0), make_net(loralib, 1, conv=conv)
    expected = snapshot(new)
    new.train(mode)
    state = fastlora.adapters.export_state_dict(new, conv_names=conv_names)
    assert state.keys() == old.state_dict().keys()
    old.load_state_dict(state)
    assert_same_bits(snapshot(old), expected)


@modes
def test_the_adapter_alone_both_ways(mode, tmp_path):
    old, new = make_net(loralib, 0), make_net(fastlora, 1).train(mode)
    base = {k: t for k, t in snapshot(new).items() if "lora_" not in k}
    torch.save(loralib.lora_state_dict(old), tmp_path / "lora.pt")
    keys = new.load_state_dict(torch.load(tmp_path / "lora.pt", weights_only=True), strict=False)
    assert not keys.unexpected_keys and not any("lora_" in k for k in keys.missing_keys)
    assert_same_bits(snapshot(new), {**snapshot(new), **loralib.lora_state_dict(old), **base})

    for state in (
        fastlora.lora_state_dict(new),
        fastlora.adapters.export_state_dict(new, adapter_only=True),
    ):
        back = make_net(loralib, 2)
        assert not back.load_state_dict(state, strict=False).unexpected_keys
        assert_same_bits(loralib.lora_state_dict(back), loralib.lora_state_dict(old))


@modes
@pytest.mark.parametrize("source", ["plain", "0.1.2", "HEAD"])
def test_two_steps_pretrained_then_adapter(source, mode):
    torch.manual_seed(5)
    pretrained = PlainNet()
    expected = {k: t.clone() for k, t in pretrained.state_dict().items()}
    state = dict(expected)
    for leaf in ("weight", "bias") if source != "plain" else ():
        state[f"block.conv.conv.{leaf}"] = state[f"block.conv.{leaf}"]
        if source == "0.1.2":
            del state[f"block.conv.{leaf}"]
    adapter = loralib.lora_state_dict(make_net(loralib, 0))
    new = make_net(fastlora, 1).train(mode)
    keys = new.load_state_dict(state, strict=False)
    assert not keys.unexpected_keys and all("lora_" in k for k in keys.missing_keys)
    new.load_state_dict(adapter, strict=False)
    assert_same_bits(snapshot(new), {**snapshot(new), **expected, **adapter})
    assert_same_bits(snapshot(new.train()), {**snapshot(new), **expected, **adapter})


@modes
def test_a_fastlora_checkpoint_loads_into_the_plain_model(mode):
    new, plain = make_net(fastlora, 0), PlainNet()
    expected = {k: t for k, t in snapshot(new).items() if "lora_" not in k}
    keys = plain.load_state_dict(new.train(mode).state_dict(), strict=False)
    assert not keys.missing_keys and all("lora_" in k for k in keys.unexpected_keys)
    assert_same_bits(dict(plain.state_dict()), expected)


def test_wrong_checkpoints_change_nothing():
    new = make_net(fastlora, 1)
    before = snapshot(new)
    good = loralib.lora_state_dict(make_net(loralib, 0))
    short = {k: t for k, t in good.items() if k != "qkv.lora_B"}
    for bad, error in (
        ({**good, "qkv.lora_B": torch.zeros(16, 3)}, ValueError),
        ({**good, "nowhere.lora_A": torch.zeros(2, 2)}, KeyError),
        ({**good, "head.lora_A": [1.0]}, TypeError),
        (short, KeyError),
    ):
        with pytest.raises(error):
            fastlora.adapters.load(new, bad)
        assert_same_bits(snapshot(new), before)
