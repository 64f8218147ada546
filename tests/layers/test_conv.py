"""Convolutions with a low-rank update: for every geometry the convolution by ``W + ΔW``."""

from itertools import product

import pytest
import torch
from torch import nn

import fastlora
from fastlora import dropout, functional

FACTORIZATIONS = ["loralib", "locon", "tucker"]
factorizations = pytest.mark.parametrize("factorization", FACTORIZATIONS)

# of each number of dimensions: kernels, strides, paddings, dilations
GEOMETRIES = {
    1: ([1, 2, 3], [1, 2], [0, 1, 2, "same", "valid"], [1, 2]),
    2: ([1, 3, (3, 2)], [1, (2, 1)], [0, 1, (1, 2), "same", "valid"], [1, (1, 2)]),
    3: ([2, (3, 1, 2)], [1, (1, 2, 1)], [0, (0, 1, 1), "same"], [1, (2, 1, 1)]),
}
SIZES = {1: (7,), 2: (6, 7), 3: (5, 4, 6)}


def build(dims, kernel, factorization, dtype=torch.double, **options):
    cls = getattr(fastlora, f"Conv{dims}d")
    options = {"r": 2, "lora_alpha": 3, **options}
    layer = cls(4, 6, kernel, factorization=factorization, dtype=dtype, **options)
    for p in layer.lora_parameters().values():
        nn.init.normal_(p, std=0.3)
    return layer


def plain_like(layer, weight, bias):
    """``torch.nn``'s own layer of the same geometry."""
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    options = {name: getattr(layer, name) for name in names}
    cls = getattr(nn, type(layer).__name__)
    plain = cls(
        layer.in_channels, layer.out_channels, layer.kernel_size, **options, dtype=weight.dtype
    )
    plain.weight.data.copy_(weight)
    plain.bias.data.copy_(bias if bias is not None else torch.zeros(layer.out_channels))
    return plain


def assert_close(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-12 * (1 + expected.abs().max())


def draw_mask(x, seed, p):
    """The dropout mask of ``x``, a row a sample."""
    n = x[0].numel()
    mask = dropout.draw_mask(seed, len(x), n, dropout.threshold(p))
    return dropout.unpack_mask(mask, n).view(x.shape)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@factorizations
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_geometry(dims, groups, mode, factorization):
    torch.manual_seed(0)
    x = torch.randn(2, 4, *SIZES[dims], dtype=torch.double)
    tried = 0
    for kernel, stride, padding, dilation in product(*GEOMETRIES[dims]):
        if padding == "same" and stride != 1:
            continue
        geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        layer = build(
            dims,
            kernel,
            factorization,
            **geometry,
            groups=groups,
            padding_mode=mode,
            bias=tried % 2 == 0,
        )
        plain = plain_like(layer, layer.weight + layer.delta_weight(), layer.bias)
        expected = plain(x)
        assert_close(layer(x), expected)
        assert_close(layer(x[0]), plain(x[0]))
        if tried % 3 == 0:
            before = layer.weight.detach().clone()
            assert_close(layer.eval()(x), expected)
            assert layer.merged and torch.equal(layer.train().weight, before)
        tried += 1
    assert tried >= 12


@factorizations
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims, kernel", [(1, 3), (2, (3, 2)), (2, 1), (3, (2, 3, 1))])
def test_delta_weight_is_the_formula(dims, kernel, groups, factorization):
    layer = build(dims, kernel, factorization, groups=groups)
    A, B = layer.lora_A, layer.lora_B
    if factorization == "loralib":
        expected = (B @ A).view(layer.weight.shape)
    else:
        parts = []
        for g in range(groups):
            up, down = B.flatten(1)[g * 3 : (g + 1) * 3] if groups == 2 else B.flatten(1), A
            down = down[2 * g : 2 * g + 2].flatten(2)
            if factorization == "tucker":
                mid = layer.lora_mid[2 * g : 2 * g + 2].flatten(2)
                down = torch.einsum("smk,mc->sck", mid, down.squeeze(2))
            parts.append(torch.einsum("os,sck->ock", up, down))
        expected = torch.cat(parts).view(layer.weight.shape)
    assert_close(layer.delta_weight(), 1.5 * expected)


def test_shapes_of_the_factors():
    def shapes(factorization, groups):
        layer = build(2, (3, 5), factorization, groups=groups)
        return {name: tuple(p.shape) for name, p in layer.lora_parameters().items()}

    assert shapes("loralib", 1) == {"lora_A": (6, 20), "lora_B": (18, 6)}
    assert shapes("loralib", 2) == {"lora_A": (6, 20), "lora_B": (9, 6)}
    assert shapes("locon", 1) == {"lora_A": (2, 4, 3, 5), "lora_B": (6, 2, 1, 1)}
    assert shapes("locon", 2) == {"lora_A": (4, 2, 3, 5), "lora_B": (6, 2, 1, 1)}
    one = {"lora_mid": (2, 2, 3, 5), "lora_A": (2, 4, 1, 1), "lora_B": (6, 2, 1, 1)}
    two = {"lora_mid": (4, 2, 3, 5), "lora_A": (4, 2, 1, 1), "lora_B": (6, 2, 1, 1)}
    assert shapes("tucker", 1) == one and shapes("tucker", 2) == two
    with pytest.raises(ValueError, match="factorization: got 'lora'"):
        build(2, 3, "lora")


@factorizations
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_those_of_the_dense_weight(groups, factorization):
    torch.manual_seed(0)
    layer = build(2, 3, factorization, groups=groups, stride=2, padding=1)
    layer.weight.requires_grad_()
    x = torch.randn(2, 4, 6, 7, dtype=torch.double, requires_grad=True)
    leaves = {"x": x, **dict(layer.named_parameters())}
    factors = layer.lora_parameters()
    if factorization == "loralib":
        delta = (factors["lora_B"] @ factors["lora_A"]).view(layer.weight.shape)
    else:
        down = factors["lora_A"]
        if factorization == "tucker":
            mid = factors["lora_mid"].unflatten(0, (groups, 2))
            down = torch.einsum("gsmhw,gmc->gschw", mid, down.view(groups, 2, -1)).flatten(0, 1)
        up = factors["lora_B"].view(groups, -1, 2)
        delta = torch.einsum("gos,gschw->gochw", up, down.unflatten(0, (groups, 2))).flatten(0, 1)
    expected_y = layer._conv_forward(x, layer.weight + 1.5 * delta, layer.bias)
    g = torch.randn_like(expected_y)
    expected = torch.autograd.grad(expected_y, leaves.values(), g)
    got = torch.autograd.grad(layer(x), leaves.values(), g)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)


@factorizations
@pytest.mark.parametrize("geometry", [
    {},
    {"stride": 2, "padding": 1},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "circular", "groups": 2},
    {"padding": "same", "padding_mode": "replicate", "dilation": 2},
    {"padding": "same", "dilation": (2, 1), "groups": 2},
])  # fmt: skip
def test_dropout_drops_elements_of_the_input(geometry, factorization):
    torch.manual_seed(0)
    p = 0.375
    layer = build(2, (3, 2), factorization, lora_dropout=p, **geometry)
    x = torch.randn(3, 4, 6, 7, dtype=torch.double)
    torch.manual_seed(5)
    kept = draw_mask(x, dropout.draw_seed(x.device), p)
    assert 0.5 < kept.double().mean() < 0.75
    torch.manual_seed(5)
    got = layer(x)
    base = plain_like(layer, layer.weight, layer.bias)(x)
    # a copy that padding makes of an element goes with it
    delta = plain_like(layer, layer.delta_weight(), None)(x * kept) / (1 - p)
    assert_close(got, base + delta)


@pytest.mark.parametrize("function", [functional.lora_conv, functional.lora_conv_dense])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_dropout_of_a_given_seed(dims, function):
    torch.manual_seed(0)
    factorization = "locon" if function is functional.lora_conv else "loralib"
    layer = build(dims, 2, factorization, padding=1)
    x = torch.randn(2, 4, *SIZES[dims], dtype=torch.double)
    A = layer.lora_A
    B = layer.lora_B.flatten(1)
    seed = torch.tensor([2**62 + 12345])
    names = ("stride", "padding", "dilation", "groups", "padding_mode", "bias")
    options = {name: getattr(layer, name) for name in names}
    for p in (0.25, 0.5):
        state = torch.get_rng_state()
        got = function(x, layer.weight, A, B, scaling=1.5, p=p, seed=seed, **options)
        assert torch.equal(torch.get_rng_state(), state)
        kept = draw_mask(x, seed, p)
        delta = plain_like(layer, layer.delta_weight(), None)(x * kept) / (1 - p)
        assert_close(got, plain_like(layer, layer.weight, layer.bias)(x) + delta)
    inactive = function(x, layer.weight, A, B, scaling=1.5, p=0.5, training=False, **options)
    assert_close(inactive, layer(x))


@factorizations
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("geometry", [
    {"stride": 2, "padding": 1, "groups": 2},
    {"padding": 1, "padding_mode": "reflect"},
])  # fmt: skip
def test_gradcheck(geometry, p, factorization):
    torch.manual_seed(0)
    cls = fastlora.Conv2d
    layer = cls(2, 2, 2, 1, 2, p, factorization=factorization, dtype=torch.double, **geometry)
    names = [name for name, _ in layer.named_parameters()]
    leaves = [torch.randn_like(t).requires_grad_() for t in layer.parameters()]
    x = torch.randn(2, 2, 3, 3, dtype=torch.double, requires_grad=True)

    def function(x, *parameters):
        torch.manual_seed(1)
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(function, (x, *leaves))


@factorizations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_narrow_dtypes(p, dtype, factorization):
    torch.manual_seed(0)
    layer = build(2, 3, factorization, dtype=dtype, lora_dropout=p, padding=1)
    exact = build(2, 3, factorization, lora_dropout=p, padding=1)
    exact.load_state_dict({k: t.double() for k, t in layer.state_dict().items()})
    x = torch.randn(2, 4, 6, 7).to(dtype)
    results = []
    for module, t in ((layer, x.clone()), (exact, x.double())):
        t.requires_grad_()
        torch.manual_seed(1)
        y = module(t)
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype).to(y.dtype))
        results.append({"y": y, "x": t.grad, **{k: p.grad for k, p in module.named_parameters()}})
    got, truth = results
    for name, t in truth.items():
        assert (got[name] is None) == (t is None)
        if t is not None:
            assert got[name].dtype == dtype
            # a few roundings to the dtype, of values up to the largest
            assert (got[name] - t).abs().max() <= 4 * torch.finfo(dtype).eps * t.abs().max(), name


@factorizations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_autocast(dims, mode, dtype, factorization):
    """In the dtypes of the plain layer, in every padding mode."""
    layer = build(dims, 3, factorization, torch.float32, padding=1, padding_mode=mode)
    nn.init.zeros_(layer.lora_B)
    plain = plain_like(layer, layer.weight, layer.bias)
    x = torch.randn(2, 4, *SIZES[dims], requires_grad=True)
    with torch.autocast("cpu", dtype):
        got, expected = layer(x), plain(x)
    assert got.dtype == dtype and torch.equal(got, expected)
    gradients = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in (got, expected)]
    assert gradients[0].dtype == torch.float32 and torch.equal(*gradients)


@factorizations
def test_an_empty_batch(factorization):
    layer = build(2, 3, factorization, padding=1, lora_dropout=0.5)
    x = torch.randn(0, 4, 6, 7, dtype=torch.double, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 6, 6, 7) and x.grad.shape == x.shape
    assert all(not p.grad.any() for p in layer.lora_parameters().values())


@factorizations
def test_wrong_inputs(factorization):
    layer = build(2, 3, factorization)
    for x in (torch.randn(2, 3, 6, 6), torch.randn(4, 6), torch.randn(1, 2, 4, 6, 6)):
        with pytest.raises(ValueError, match="x: got shape"):
            layer(x.double())
    with pytest.raises(TypeError, match="dtype"):
        layer(torch.randn(2, 4, 6, 6))


def test_channels_last():
    torch.manual_seed(0)
    for factorization in FACTORIZATIONS:
        layer = build(2, 3, factorization, lora_dropout=0.5)
        x = torch.randn(2, 4, 6, 7, dtype=torch.double)
        torch.manual_seed(1)
        expected = layer(x)
        torch.manual_seed(1)
        assert_close(layer(x.to(memory_format=torch.channels_last)), expected)


def test_every_rank_and_a_rank_larger_than_the_channels():
    x = torch.randn(2, 4, 6, 7, dtype=torch.double)
    for factorization, r in product(FACTORIZATIONS, (1, 3, 9)):
        layer = build(2, 3, factorization, r=r)
        expected = plain_like(layer, layer.weight + layer.delta_weight(), layer.bias)(x)
        assert_close(layer(x), expected)
        assert_close(layer.eval()(x), expected)
        if factorization != "loralib":
            rank = torch.linalg.matrix_rank(layer.train().delta_weight().flatten(1))
            assert rank == min(r, 6)


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("geometry", [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
])  # fmt: skip
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_equals_lycoris(dims, geometry, tucker):
    locon = pytest.importorskip("lycoris.modules.locon")
    torch.manual_seed(0)
    layer = build(dims, 3, "tucker" if tucker else "locon", lora_alpha=5, **geometry)
    plain = plain_like(layer, layer.weight, layer.bias)
    other = locon.LoConModule("layer", plain, lora_dim=2, alpha=5, use_tucker=tucker).double()
    other.lora_down.weight.data.copy_(layer.lora_A)
    other.lora_up.weight.data.copy_(layer.lora_B)
    if tucker:
        other.lora_mid.weight.data.copy_(layer.lora_mid)
    x = torch.randn(2, 4, *SIZES[dims], dtype=torch.double)
    assert not torch.allclose(layer(x), plain(x))
    assert_close(layer(x), other(x))
    assert_close(layer.delta_weight(), other.get_diff_weight()[0])
