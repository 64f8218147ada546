"""The layers as modules: copies, files, dtypes, devices, options and what a user reads of them."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora import backends, functional
from fastlora.backends import reference

QV = [True, False, True]
OPTIONS = {"r": 2, "lora_alpha": 6}


def merged_linear(**k):
    return fastlora.MergedLinear(6, 12, **{**OPTIONS, "enable_lora": QV, **k})


LAYERS = {
    "linear": lambda **k: fastlora.Linear(6, 10, **{**OPTIONS, **k}),
    "linear-fan": lambda **k: fastlora.Linear(6, 10, fan_in_fan_out=True, **{**OPTIONS, **k}),
    "merged": merged_linear,
    "merged-fan": lambda **k: merged_linear(fan_in_fan_out=True, **k),
    "merged-uneven": lambda **k: merged_linear(out_splits=[6, 2, 4], **k),
    "merged-interleaved": lambda **k: merged_linear(out_splits=[6, 4, 2], interleave=2, **k),
    "embedding": lambda **k: fastlora.Embedding(9, 5, **{**OPTIONS, **k}),
}
for n in (1, 2, 3):
    for f in ("loralib", "locon", "tucker"):
        LAYERS[f"conv{n}d-{f}"] = lambda n=n, f=f, **k: getattr(fastlora, f"Conv{n}d")(
            4, 6, 3, factorization=f, **{**OPTIONS, **k}
        )
BRANCH = [kind for kind in LAYERS if kind != "embedding"]

pytestmark = pytest.mark.usefixtures("path")


def on_each_path(kinds):
    """These layers as they are, and those of the kinds that others have kernels for on these."""
    cases = [pytest.param(kind, "auto", id=kind) for kind in kinds]
    cases += [
        pytest.param(kind, other, id=f"{kind} on {other}")
        for kind in kinds
        if kind.startswith(("linear", "merged"))
        for other in ("triton", "emulated")
    ]
    return pytest.mark.parametrize(("kind", "path"), cases, indirect=["path"])


layers = on_each_path(LAYERS)
each_path = pytest.mark.parametrize("path", ["auto", "triton", "emulated"], indirect=True)


def widest():
    """The dtype whose rounding tells least of what is asked: float64 where it is computed in."""
    dtypes = backends.select().dtypes or {}
    return max(dtypes.get("cpu", [torch.double]), key=lambda dtype: dtype.itemsize)


def assert_close(got, expected):
    """But for a few thousand units in the last place, for sums that may be near zero."""
    tolerance = 4096 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def build(kind, seed=0, **options):
    """A layer whose factors are not zero."""
    torch.manual_seed(seed)
    layer = LAYERS[kind](**options)
    for p in layer.lora_parameters().values():
        nn.init.normal_(p, std=0.3)
    return layer


def input_of(kind, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    if kind == "embedding":
        return torch.randint(9, (2, 3), generator=generator)
    shape = (2, 4, *[5] * int(kind[4])) if kind.startswith("conv") else (2, 3, 6)
    return torch.randn(shape, generator=generator).to(dtype)


def plain(layer, x, weight=None):
    """The layer that has no factors, with this weight."""
    weight = layer.weight if weight is None else weight
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, weight)
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight.T if layer.fan_in_fan_out else weight, layer.bias)
    return layer._conv_forward(x, weight, layer.bias)


def state_of(layer):
    return {k: t.clone() for k, t in layer.state_dict().items()}


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name, t in expected.items():
        assert got[name].dtype == t.dtype and torch.equal(got[name], t), name


# ---- the update


@layers
def test_the_output_is_that_of_the_weight_and_its_delta(kind):
    layer = build(kind, dtype=widest())
    x = input_of(kind, widest())
    expected = plain(layer, x, layer.weight + layer.delta_weight())
    assert not torch.allclose(plain(layer, x), expected)
    assert_close(layer(x), expected)
    assert_close(layer.eval()(x), expected)


@layers
def test_a_new_layer_is_the_plain_one(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind](dtype=widest())
    x = input_of(kind, widest())
    assert not layer.delta_weight().any()
    assert_close(layer(x), plain(layer, x))


# ---- copies and files


@layers
@pytest.mark.parametrize("merged", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(kind, merged, how):
    layer = build(kind)
    before = state_of(layer)
    layer.train(not merged)
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert other.merged is merged
    x = input_of(kind)
    assert torch.equal(other(x), layer(x))
    assert_same_bits(other.state_dict(), before)
    assert not {t.data_ptr() for t in layer.parameters()} & {
        t.data_ptr() for t in other.parameters()
    }
    # each undoes its own merge, whatever becomes of the other
    for p in layer.parameters():
        p.data.add_(1)
    other.train()
    assert torch.equal(other.weight, before["weight"])


@layers
@pytest.mark.parametrize("merged", [False, True], ids=["train", "eval"])
def test_state_dict_through_files(kind, merged, tmp_path):
    layer = build(kind)
    before = state_of(layer)
    layer.train(not merged)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    for state in (
        torch.load(tmp_path / "layer.pt", weights_only=True),
        load_file(tmp_path / "layer.safetensors"),
    ):
        assert_same_bits(state, before)
        for mode in (True, False):
            other = build(kind, seed=1).train(mode)
            other.load_state_dict(state)
            assert other.merged is not mode
            assert_same_bits(other.state_dict(), before)
            torch.testing.assert_close(other(input_of(kind)), layer.train(mode)(input_of(kind)))


def test_adapter_files(tmp_path):
    model = nn.Sequential(build("linear"), build("conv2d-tucker"), build("embedding"))
    fastlora.adapters.save(model.eval(), tmp_path / "a.safetensors")
    other = nn.Sequential(*(build(k, seed=1) for k in ("linear", "conv2d-tucker", "embedding")))
    base = {k: t.clone() for k, t in other.state_dict().items() if "lora_" not in k}
    fastlora.adapters.load(other, tmp_path / "a.safetensors")
    assert_same_bits(dict(other.state_dict()), {**base, **fastlora.lora_state_dict(model)})
    other[0].scaling = 1.5
    with pytest.raises(ValueError, match="scaling"):
        fastlora.adapters.load(other, tmp_path / "a.safetensors")


# ---- devices and dtypes


@layers
def test_meta_device(kind):
    expected = build(kind)
    rng = torch.get_rng_state()
    layer = LAYERS[kind](device="meta")
    assert all(p.is_meta for p in layer.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(expected.state_dict())
    assert_same_bits(layer.state_dict(), state_of(expected))
    assert torch.equal(layer(input_of(kind)), expected(input_of(kind)))


@layers
def test_reset_parameters_after_meta_device(kind):
    layer = LAYERS[kind](device="meta").to_empty(device="cpu")
    for p in layer.parameters():
        nn.init.constant_(p, 7.0)
    torch.manual_seed(3)
    layer.reset_parameters()
    expected = LAYERS[kind]()
    torch.manual_seed(3)
    expected.reset_parameters()
    assert_same_bits(layer.state_dict(), state_of(expected))
    assert not (layer.weight == 7).any() and not layer.delta_weight().any()
    assert layer.weight.is_contiguous()


@layers
@pytest.mark.parametrize("merged", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("to", ["double", "bfloat16", "half"])
def test_change_of_dtype(kind, merged, to):
    if to == "double" and widest() != torch.double:
        pytest.skip("no kernels for float64")
    layer = build(kind)
    dtype = {"double": torch.double, "bfloat16": torch.bfloat16, "half": torch.half}[to]
    expected = {k: t.to(dtype) for k, t in state_of(layer).items()}
    layer.train(not merged)
    converted = layer.half() if to == "half" else layer.to(dtype)
    assert converted is layer and layer.merged is merged
    assert_same_bits(layer.state_dict(), expected)
    assert all(p.dtype == dtype for p in layer.parameters())
    assert layer(input_of(kind, dtype)).dtype == dtype
    layer.train()
    assert torch.equal(layer.weight, expected["weight"])


@layers
def test_change_of_dtype_keeps_parameters_and_requires_grad(kind):
    layer = build(kind)
    flags = {k: p.requires_grad for k, p in layer.named_parameters()}
    layer.eval().bfloat16().train().float()
    assert flags == {k: p.requires_grad for k, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.lora_parameters().values(), lr=1.0)
    layer(input_of(kind)).square().sum().backward()
    before = state_of(layer)
    optimizer.step()
    assert all(
        torch.equal(t, before[k]) is not k.startswith("lora_")
        for k, t in layer.state_dict().items()
    )


@layers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_factors_over_a_narrow_weight(kind, dtype):
    layer = build(kind, dtype=dtype, lora_dtype=torch.float32)
    x = input_of(kind, dtype)
    if x.is_floating_point():
        x.requires_grad_()
    y = layer(x)
    assert y.dtype == layer.weight.dtype == dtype
    y.float().square().sum().backward()
    for name, p in layer.lora_parameters().items():
        assert p.dtype == p.grad.dtype == torch.float32, name
    assert not x.is_floating_point() or x.grad.dtype == dtype
    exact = copy.deepcopy(layer).double()
    with fastlora.use_backend("reference"):
        truth = exact(x if kind == "embedding" else x.detach().double())
    # the base product, the sum and the result are each rounded to 16 bits
    assert (y - truth).abs().max() <= 2 * torch.finfo(dtype).eps * truth.abs().max()
    assert_same_bits(layer.eval().state_dict(), state_of(layer.train()))


# ---- what a user reads


@layers
def test_repr(kind):
    layer = build(kind)
    assert "r=2, lora_alpha=6, scaling=3" in repr(layer)
    assert "merged=True" not in repr(layer)
    assert "merged=True" in repr(layer.eval())
    assert ("enable_lora=[True, False, True]" in repr(layer)) == kind.startswith("merged")
    assert ("fan_in_fan_out=True" in repr(layer)) == kind.endswith("fan")
    assert ("out_splits=[6, 2, 4]" in repr(layer)) == (kind == "merged-uneven")
    assert ("interleave=2" in repr(layer)) == (kind == "merged-interleaved")
    if kind.startswith("conv"):
        assert f"factorization='{kind.partition('-')[2]}'" in repr(layer)
    assert "use_rslora=True" in repr(build(kind, use_rslora=True))
    assert "r=0" in repr(LAYERS[kind](r=0))


def test_explain():
    layer = build("linear", lora_dropout=0.5)
    x = input_of("linear")
    text = fastlora.explain(layer, x)
    assert "r=2" in text and "reference" in text and "p=0.5" in text and "torch.float32" in text
    assert "dropout: inactive" in fastlora.explain(build("linear"), x)
    assert "plain layer (merged" in fastlora.explain(layer.eval(), x)
    assert "no factors" in fastlora.explain(fastlora.Linear(6, 10))
    with torch.autocast("cpu", torch.bfloat16):
        assert "torch.bfloat16" in fastlora.explain(layer.train(), x)
    layer.weight_is_shared = True
    assert "merging: no, its weight is shared" in fastlora.explain(layer)
    with pytest.raises(TypeError, match="Linear"):
        fastlora.explain(nn.Linear(6, 10))


@pytest.mark.parametrize("kind", ["embedding", "conv2d-loralib", "conv2d-locon"])
def test_explain_every_layer(kind):
    assert "path:" in fastlora.explain(build(kind), input_of(kind))


# ---- options


@on_each_path(BRANCH)
def test_lora_bias(kind):
    layer = build(kind, lora_bias=True, dtype=widest())
    x = input_of(kind, widest())
    with_bias = layer(x)
    with torch.no_grad():
        bias = layer.lora_bias.clone()
        layer.lora_bias.zero_()
    added = with_bias - layer(x)
    channels = added.flatten(2).transpose(1, 2) if kind.startswith("conv") else added
    channels = channels.reshape(-1, channels.shape[-1])
    assert_close(channels, channels[:1].expand_as(channels))
    blocks = {"merged": [*range(4), *range(8, 12)], "merged-fan": [*range(4), *range(8, 12)]}
    blocks["merged-uneven"] = [*range(6), *range(8, 12)]
    # two parts of q (3), k (2), v (1)
    blocks["merged-interleaved"] = [0, 1, 2, 6, 7, 8, 5, 11]
    at = blocks.get(kind, list(range(channels.shape[1])))
    expected = torch.zeros(channels.shape[1], dtype=widest())
    expected[at] = 3 * bias
    assert_close(channels[0], expected)

    with torch.no_grad():
        layer.lora_bias.copy_(bias)
    assert_close(layer.eval()(x), with_bias)
    layer.train()(x).sum().backward()
    torch.testing.assert_close(
        layer.lora_bias.grad,
        torch.full_like(bias, 3.0 * added.numel() / channels.shape[1]),
    )
    assert not LAYERS[kind](lora_bias=True).lora_bias.any()


@on_each_path(BRANCH)
def test_lora_bias_without_a_bias(kind):
    layer = build(kind, lora_bias=True, bias=False, dtype=widest())
    x = input_of(kind, widest())
    y = layer(x)
    assert_close(layer.eval()(x), y)


@layers
def test_rslora(kind):
    layer, usual = build(kind, use_rslora=True), build(kind)
    assert layer.scaling == 6 / math.sqrt(2) and usual.scaling == 3
    torch.testing.assert_close(layer.delta_weight(), usual.delta_weight() * math.sqrt(2))


@layers
def test_init_options(kind):
    layer = LAYERS[kind](init_lora_weights="gaussian")
    assert layer.lora_A.any() and not layer.lora_B.any() and not layer.delta_weight().any()
    assert LAYERS[kind](init_lora_weights=False).delta_weight().any()
    for bad in ("normal", None, 2, 0, 1, 1.0):
        with pytest.raises(ValueError, match="init_lora_weights"):
            LAYERS[kind](init_lora_weights=bad)


def test_gaussian_init_leaves_padding_alone():
    layer = fastlora.Embedding(9, 5, r=2, padding_idx=4, init_lora_weights="gaussian")
    assert not layer.lora_A[:, 4].any() and layer.lora_A[:, :4].all()


@layers
def test_requires_grad(kind):
    plain_layer, layer = LAYERS[kind](r=0), LAYERS[kind]()
    assert all(p.requires_grad for p in plain_layer.parameters())
    assert not hasattr(plain_layer, "lora_A")
    assert not layer.weight.requires_grad
    assert all(p.requires_grad for n, p in layer.named_parameters() if n != "weight")
    x = input_of(kind)
    assert torch.equal(plain_layer(x), plain(plain_layer, x))
    plain_layer.eval()
    assert torch.equal(plain_layer(x), plain(plain_layer, x)) and not plain_layer.merged


@layers
@pytest.mark.parametrize(
    "options, error",
    [({"r": -1}, ValueError), ({"r": 2.0}, TypeError), ({"lora_alpha": math.inf}, ValueError)],
)
def test_wrong_options(kind, options, error):
    with pytest.raises(error, match=next(iter(options))):
        LAYERS[kind](**options)


@layers
def test_options_as_numbers_of_numpy(kind):
    branch = {"lora_dropout": np.float32(0.25)} if kind in BRANCH else {}
    layer = LAYERS[kind](r=np.int64(3), lora_alpha=np.float32(6), **branch)
    assert type(layer.r) is int and type(layer.lora_alpha) is type(layer.scaling) is float
    assert layer.r == 3 and layer.scaling == 2.0
    assert getattr(layer.lora_dropout, "p", None) == (0.25 if branch else None)
    fastlora.inject(nn.Sequential(nn.Linear(3, 3)), ["0"], r=np.int32(2), lora_alpha=np.float16(1))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("path", ["reference", "native"], indirect=True)
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0, 3)])
@pytest.mark.parametrize("K, N", [(8, 0), (0, 5), (0, 0)])
def test_no_features(K, N, batch, lora_bias, path):
    """In training, eval mode and as one of several, as nn.Linear takes them."""
    layer = fastlora.Linear(K, N, r=2, lora_dropout=0.5, lora_bias=lora_bias)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(*batch, K, requires_grad=True)
    expected = F.linear(x, layer.weight, layer.bias)
    for mode in (True, False):
        layer.train(mode)
        y = layer(x)
        assert torch.equal(y, expected)
        y.sum().backward()
        assert torch.equal(x.grad, torch.zeros_like(x))
    factors = {"lora_A": [layer.lora_A, None], "lora_B": [layer.lora_B, None]}
    weights = [layer.weight, torch.ones(3, K)]
    first, _ = functional.multi_lora_linear(x, weights, **factors, scaling=1.0, p=0.5)
    assert torch.equal(first, F.linear(x, layer.weight))


@on_each_path(BRANCH)
@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_wrong_dropout(kind, p):
    with pytest.raises(ValueError, match="lora_dropout"):
        LAYERS[kind](lora_dropout=p)
    for bad in (True, np.bool_(True), "0.1"):
        with pytest.raises(TypeError, match=r"lora_dropout: got .*, expected a probability"):
            LAYERS[kind](lora_dropout=bad)


@layers
def test_merge_weights_is_a_bool(kind):
    for bad in ("no", 1, None):
        with pytest.raises(TypeError, match=f"merge_weights: got {bad!r}, expected True or False"):
            LAYERS[kind](merge_weights=bad)


@pytest.mark.parametrize(
    "options",
    [
        {"enable_lora": [True] * 5},
        {"enable_lora": []},
        {"out_splits": [6, 6]},
        {"out_splits": [6, 6, 6]},
        {"out_splits": [12, 0, 0]},
        {"interleave": 3},
        {"interleave": 0},
    ],
)
def test_wrong_blocks(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        merged_linear(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"enable_lora": "TF"},
        {"enable_lora": ["True", "False"]},
        {"enable_lora": [1, 0]},
        {"enable_lora": True},
        {"enable_lora": None},
        {"out_splits": [4.0, 4, 4]},
        {"out_splits": "444"},
        {"out_splits": 12},
        {"interleave": 2.0},
        {"interleave": True},
    ],
)
def test_blocks_of_a_wrong_type(options):
    name = next(iter(options))
    with pytest.raises(TypeError, match=rf"^{name}(\[0\])?: got"):
        merged_linear(**options)
    if name == "enable_lora" and options[name] is not None:
        model = nn.Sequential(nn.Linear(6, 12))
        with pytest.raises(TypeError, match=r"^enable_lora(\[0\])?: got"):
            fastlora.inject(model, ["0"], **options)


def test_blocks_as_numbers_of_numpy():
    layer = merged_linear(enable_lora=np.array([True, False]), out_splits=np.array([8, 4]))
    assert layer.enable_lora == [True, False] and layer.blocks.splits == (8, 4)


# ---- edits in place


@layers
def test_edits_take_effect_at_once(kind):
    layer = build(kind, dtype=widest())
    x = input_of(kind, widest())
    base = plain(layer, x)
    delta = layer(x) - base
    layer.scaling *= 2
    assert_close(layer(x), base + 2 * delta)
    layer.lora_A.data.mul_(3)
    assert_close(layer(x), base + 6 * delta)
    layer.lora_B.data = layer.lora_B.data * 0.5
    assert_close(layer(x), base + 3 * delta)
    layer.eval()
    assert_close(layer(x), base + 3 * delta)


@pytest.mark.parametrize("edit", ["optimizer", "data", "new data", "scaling"])
@pytest.mark.parametrize("copied", [False, True])
@on_each_path(["linear", "merged-interleaved", "embedding", "conv2d-tucker"])
def test_merge_takes_up_edits_of_a_merged_layer(kind, copied, edit):
    layer = build(kind, dtype=widest())
    x = input_of(kind, widest())
    base, pristine = plain(layer, x), layer.weight.detach().clone()
    delta = layer(x) - base
    layer.eval()
    if copied:
        layer = copy.deepcopy(layer)
    if edit == "optimizer":
        with torch.no_grad():
            layer.lora_B.mul_(2)
    elif edit == "data":
        layer.lora_B.data.mul_(2)
    elif edit == "new data":
        layer.lora_B.data = layer.lora_B.data * 2
    else:
        layer.scaling *= 2
    layer.merge()
    assert_close(layer(x), base + 2 * delta)
    layer.train()
    assert torch.equal(layer.weight, pristine)


# ---- built from a module


CONVERTIBLE = ["linear", "linear-no-bias", "linear-fan", "merged", "merged-fan", "embedding"]
CONVERTIBLE += ["conv1d", "conv2d", "conv3d"]


def original(kind):
    if kind.endswith("fan"):
        hf = pytest.importorskip("transformers.pytorch_utils")
        return hf.Conv1D(10 if kind == "linear-fan" else 12, 6)
    return {
        "linear": nn.Linear(6, 10),
        "linear-no-bias": nn.Linear(6, 10, bias=False),
        "merged": nn.Linear(6, 12),
        "embedding": nn.Embedding(9, 5, padding_idx=3),
        "conv1d": nn.Conv1d(4, 6, 3, stride=2, bias=False),
        "conv2d": nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2, groups=2),
        "conv3d": nn.Conv3d(4, 6, 3, padding=1, padding_mode="circular"),
    }[kind]


def convert(kind, module, **options):
    if kind.startswith("linear"):
        return fastlora.Linear.from_linear(module, r=2, **options)
    if kind.startswith("merged"):
        return fastlora.MergedLinear.from_linear(module, 2, QV, **options)
    if kind == "embedding":
        return fastlora.Embedding.from_embedding(module, r=2, **options)
    return getattr(fastlora, kind.capitalize()).from_conv(module, r=2, **options)


@on_each_path(CONVERTIBLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_from_module(kind, dtype, training):
    module = original(kind).to(dtype).train(training)
    before = state_of(module)
    x = input_of(kind, dtype)
    layer = convert(kind, module, lora_alpha=6)
    assert layer.weight is module.weight
    assert getattr(layer, "bias", None) is getattr(module, "bias", None)
    assert layer.training is training and layer.scaling == 3
    assert layer.lora_A.dtype == dtype and layer.lora_A.requires_grad
    assert not layer.weight.requires_grad
    assert_same_bits(state_of(module), before)
    # transformers adds the bias to the product with addmm, in another order
    torch.testing.assert_close(layer(x), module(x))
    assert [k for k in layer.state_dict() if "lora_" not in k] == list(before)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    assert not torch.allclose(layer(x), module(x))
    torch.testing.assert_close(layer.train().eval()(x), module(x))
    layer.train()
    assert_same_bits(state_of(module), before)


def test_from_module_options():
    layer = convert("conv2d", original("conv2d"), factorization="locon", lora_dropout=0.5)
    assert layer.lora_A.shape == (4, 2, 3, 2) and layer.lora_dropout.p == 0.5
    wide = convert("linear", nn.Linear(6, 10).bfloat16(), lora_dtype=torch.float32)
    assert wide.lora_A.dtype == torch.float32
    uneven = convert("merged", nn.Linear(6, 12), out_splits=[6, 2, 4])
    assert uneven.lora_B.shape == (10, 2)


@pytest.mark.parametrize("kind", ["linear", "merged", "embedding", "conv2d"])
def test_from_module_takes_no_option_of_the_module(kind):
    for name in ("device", "dtype", *(("bias",) if kind != "embedding" else ("padding_idx",))):
        with pytest.raises(TypeError, match=f"{name}: got a value, expected none"):
            convert(kind, original(kind), **{name: None})


def test_from_module_of_another_kind():
    class Mine(nn.Linear):
        pass

    for call in (
        lambda: fastlora.Linear.from_linear(Mine(2, 2), r=2),
        lambda: fastlora.Linear.from_linear(nn.Embedding(2, 2), r=2),
        lambda: fastlora.Embedding.from_embedding(nn.Linear(2, 2), r=2),
        lambda: fastlora.Conv2d.from_conv(nn.Conv1d(2, 2, 1), r=2),
        lambda: fastlora.Conv2d.from_conv(fastlora.Conv2d(2, 2, 1), r=2),
    ):
        with pytest.raises(TypeError, match="module"):
            call()


# ---- dropout


@on_each_path(BRANCH)
def test_dropout(kind):
    layer = build(kind, lora_dropout=0.5, merge_weights=False)
    x = input_of(kind)

    def run(seed):
        torch.manual_seed(seed)
        return layer(x)

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    state = torch.get_rng_state()
    expected = plain(layer, x, layer.weight + layer.delta_weight())
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(torch.get_rng_state(), state)
    # the base is never dropped: the output is the plain one where the branch is
    layer.train().lora_dropout.p = 1.0
    torch.testing.assert_close(layer(x), plain(layer, x))
    layer.lora_dropout.p = 0.0
    torch.testing.assert_close(layer(x), expected)


@on_each_path(["linear", "merged", "conv2d-loralib", "conv2d-locon"])
def test_dropout_keeps_the_expectation(kind):
    layer = build(kind, lora_dropout=0.25, dtype=widest())
    x = input_of(kind, widest())
    torch.manual_seed(0)
    draws = layer(torch.cat([x] * 600)).unflatten(0, (600, -1))
    expected = layer.eval()(x)
    # six standard errors of the mean
    error = (draws.mean(0) - expected).abs()
    assert (error <= 6 * draws.std(0) / 600**0.5 + 64 * torch.finfo(x.dtype).eps).all()


@on_each_path(BRANCH)
def test_another_dropout_module_is_refused(kind):
    layer = build(kind)
    layer.lora_dropout = nn.AlphaDropout(0.5)
    with pytest.raises(TypeError, match="lora_dropout: got AlphaDropout"):
        layer(input_of(kind))


# ---- backends


@layers
def test_use_backend(kind):
    layer, x = build(kind), input_of(kind)
    with fastlora.use_backend("reference"):
        first = layer(x)
        assert torch.equal(first, layer(x))
    torch.testing.assert_close(layer(x), first)


def test_use_backend_reaches_the_layers(monkeypatch):
    calls = []
    shrink = reference.shrink
    monkeypatch.setattr(reference, "shrink", lambda *a: calls.append(1) or shrink(*a))
    layer, x = build("linear"), input_of("linear")
    with fastlora.use_backend("reference"):
        layer(x)
    assert calls
    fixed = build("linear", backend="reference")
    fixed(x)
    assert len(calls) >= 2
    for bad in ("torch", ""):
        with pytest.raises(ValueError, match="backend"), fastlora.use_backend(bad):
            pass
        with pytest.raises(ValueError, match="backend"):
            build("linear", backend=bad)(x)


# ---- blocks


@each_path
@pytest.mark.parametrize("fan", [False, True])
@pytest.mark.parametrize("splits, enabled, heads", [
    ([4, 4, 4], [True, False, True], 2),
    ([4, 4, 4], [True, True, True], 4),
    ([8, 4, 4], [False, True, True], 4),
    ([6, 3, 3], [True, False, True], 3),
])  # fmt: skip
def test_interleaved_blocks_are_contiguous_ones_in_another_order(splits, enabled, heads, fan):
    n = sum(splits)
    options = {"r": 2, "enable_lora": enabled, "out_splits": splits, "fan_in_fan_out": fan}
    torch.manual_seed(0)
    by_head = fastlora.MergedLinear(6, n, interleave=heads, dtype=widest(), **options)
    nn.init.normal_(by_head.lora_B)
    # of each block in turn, its features in the output that is laid out by head
    columns = torch.arange(n).view(heads, -1).split([s // heads for s in splits], dim=1)
    order = torch.cat([c.flatten() for c in columns])
    contiguous = fastlora.MergedLinear(6, n, dtype=widest(), **options)
    state = state_of(by_head)
    state["weight"] = state["weight"][:, order] if fan else state["weight"][order]
    state["bias"] = state["bias"][order]
    contiguous.load_state_dict(state)
    x = torch.randn(3, 6, dtype=widest())
    for mode in (True, False):
        expected = contiguous.train(mode)(x)
        assert_close(by_head.train(mode)(x)[:, order], expected)
    delta = contiguous.delta_weight()
    by_head_delta = by_head.delta_weight()
    got = by_head_delta[:, order] if fan else by_head_delta[order]
    assert_close(got, delta)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind, adapted", [
    ("merged", [*range(4), *range(8, 12)]),
    ("merged-fan", [*range(4), *range(8, 12)]),
    ("merged-uneven", [*range(6), *range(8, 12)]),
    ("merged-interleaved", [0, 1, 2, 6, 7, 8, 5, 11]),
])  # fmt: skip
def test_blocks_that_are_not_adapted_are_untouched(kind, adapted, bias, dtype, mode):
    layer = build(kind, dtype=dtype, bias=bias, lora_dropout=0.5).train(mode)
    x = input_of(kind, dtype)
    rest = [i for i in range(12) if i not in adapted]
    before = layer.state_dict()["weight"]
    expected = F.linear(x, before.T if "fan" in kind else before, layer.bias)
    y = layer(x)
    assert torch.equal(y[..., rest], expected[..., rest])
    assert (y[..., adapted] != expected[..., adapted]).any(dim=(0, 1)).all()


# ---- modes of torch


@layers
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_an_evaluation_inside_inference_mode(kind, mode):
    layer = build(kind)
    before, x = state_of(layer), input_of(kind)
    expected = layer(x)
    with mode():
        layer.eval()
        torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x), expected)
    assert_same_bits(layer.state_dict(), before)
    layer.train()
    assert_same_bits(layer.state_dict(), before)
    layer(x).sum().backward()
    with mode():
        layer.eval().train()
    assert torch.equal(layer(x), expected)


@layers
def test_a_merge_inside_autocast(kind):
    layer = build(kind)
    before, delta = layer.weight.detach().clone(), layer.delta_weight()
    expected = layer.eval().weight.detach().clone()
    layer.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.delta_weight(), delta)
        layer.eval()
    assert torch.equal(layer.weight, expected)
    with torch.autocast("cpu", torch.bfloat16):
        layer.train()
    assert torch.equal(layer.weight, before)


@layers
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_autocast(kind, mode):
    layer = build(kind).train(mode)
    exact = build(kind).double()
    x = input_of(kind)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    # as in torch, a lookup is left as it is
    assert y.dtype == (torch.float32 if kind == "embedding" else torch.bfloat16)
    with fastlora.use_backend("reference"):
        truth = exact(x if kind == "embedding" else x.double())
    # a few roundings to 16 bits, of values up to the largest
    assert (y - truth).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * truth.abs().max()
    if mode:
        y.float().square().sum().backward()
        truth.square().sum().backward()
        for name, p in layer.lora_parameters().items():
            expected = getattr(exact, name).grad
            assert p.grad.dtype == torch.float32
            assert (p.grad - expected).norm() <= 0.02 * expected.norm(), name


@layers
def test_a_failed_merge_leaves_the_model_in_training(kind):
    model = nn.Sequential(build(kind), build(kind))
    before = state_of(model)
    model[1].lora_B.data[0] = math.nan
    with pytest.raises(fastlora.MergeError, match="NaN"), fastlora.merged(model):
        pass
    assert not model[0].merged and not model[1].merged
    model[1].lora_B.data.copy_(before["1.lora_B"])
    assert_same_bits(model.state_dict(), before)


@layers
@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_a_checkpoint_of_another_rank_is_refused_by_name(kind, name):
    layer = build(kind)
    before = state_of(layer)
    bad = {k: t + 1 for k, t in before.items()}
    bad[name] = torch.cat([bad[name]] * 2, 1)
    with pytest.raises(RuntimeError, match=rf"\t{name}: got shape .*; nothing of this layer was"):
        layer.load_state_dict(bad)
    assert_same_bits(layer.state_dict(), before)


@layers
def test_loading_with_assign(kind):
    layer = build(kind).eval()
    state = state_of(build(kind, seed=1))
    # the tensors given become the layer's own, and are merged into
    layer.load_state_dict({k: t.clone() for k, t in state.items()}, assign=True)
    assert layer.merged
    assert_same_bits(layer.state_dict(), state)
    assert torch.equal(layer.train().weight, state["weight"])
