"""Every usable backend against fp64, by the rule of ``fastlora.testing``; and the rule itself."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from fastlora import backends, dropout, functional, testing
from fastlora.blocks import Blocks

USABLE = [name for name, reason in backends.available().items() if reason is None]
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
MODULES = {name: importlib.import_module(f"fastlora.backends.{name}") for name in USABLE}
PATHS = [
    pytest.param((b, d), id=f"{b} on {d}", marks=[pytest.mark.gpu] * (d != "cpu"))
    for b, module in MODULES.items()
    for d in module.dtypes or DEVICES
    # the interpreter would take an hour; test_triton.py has what it can do
    if d in DEVICES and (b, d) != ("triton", "cpu")
]

# of x and weight, of the factors
DTYPES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "bf16 under fp32": (torch.bfloat16, torch.float32),
    "fp16 under fp32": (torch.float16, torch.float32),
}
THIRDS = Blocks((84, 84, 84), (True, False, True))
UNEVEN = Blocks((126, 63, 63), (True, True, True))
BY_HEAD = Blocks((96, 48, 48), (True, False, True), 3)

# M, K, N, r, p, bias, blocks
CASES = [
    (0, 16, 24, 4, 0.1, True, None),
    (1, 252, 507, 8, 0.1, True, None),
    (1, 507, 252, 1, 0.0, False, UNEVEN),
    (63, 252, 252, 3, 0.5, True, THIRDS),
    (63, 507, 252, 16, 0.1, False, UNEVEN),
    (63, 252, 507, 64, 0.0, True, None),
    (63, 507, 507, 1, 0.5, False, None),
    (64, 252, 192, 8, 0.1, True, BY_HEAD),
    (100, 252, 192, 16, 1.0, True, None),
    (64, 3, 64, 1, 0.1, False, None),
]


@pytest.fixture(params=PATHS)
def path(request):
    backend, device = request.param
    return {"backend": backend, "device": device}


@pytest.fixture(params=DTYPES)
def dtypes(request):
    dtype, factor_dtype = DTYPES[request.param]
    return {"dtype": dtype, "factor_dtype": factor_dtype}


def results(sizes, backend, device, **options):
    inputs = testing.make_inputs(*sizes, device=device, **options)
    return inputs, testing.fused(inputs, backend)


def plain_product(inputs):
    """``x Wᵀ + bias``, added in place on a GPU: for ``F.linear`` BLAS may choose another kernel."""
    x, weight, bias = inputs.x, inputs.weight, inputs.bias
    if x.device.type == "cpu":
        return F.linear(x, weight, bias)
    y = x.new_zeros(len(x), len(weight))
    return (y if bias is None else y.copy_(bias.expand_as(y))).addmm_(x, weight.t())


def equal_bits(one, other):
    def bits(t):
        return t.contiguous().view(torch.uint8)

    return all(torch.equal(bits(one[name]), bits(other[name])) for name in one)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[:5])))
def test_no_less_accurate_than_the_composition(case, path, dtypes):
    M, K, N, r, p, bias, blocks = case
    testing.check_linear(M, K, N, r, p=p, bias=bias, blocks=blocks, **path, **dtypes)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_more_accurate_than_the_composition_in_16_bits(dtype, p, path, record_property):
    backend, device = path.values()
    inputs = testing.make_inputs(256, 256, 256, 16, p=p, dtype=dtype, device=device)
    exact = testing.truth(inputs)
    ours, theirs = (
        {name: (got[name].double() - t).square().mean().sqrt().item() for name, t in exact.items()}
        for got in (testing.fused(inputs, backend), testing.composition(inputs))
    )
    for name in ("y", "d_x", "d_lora_A", "d_lora_B"):
        ratio = ours[name] / theirs[name]
        record_property(f"rms error of {name} / composition's", ratio)
        assert ratio < 0.9, name


@pytest.mark.parametrize("sizes", [(1, 252, 252, 8), (63, 507, 252, 3)])
def test_repeats_bit_for_bit(sizes, path, dtypes):
    _, first = results(sizes, **path, **dtypes, p=0.1, blocks=THIRDS)
    for _ in range(2):
        assert equal_bits(results(sizes, **path, **dtypes, p=0.1, blocks=THIRDS)[1], first)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("blocks", [THIRDS, BY_HEAD], ids=["thirds", "by head"])
@pytest.mark.parametrize("M", [1, 5, 63, 257])
def test_other_blocks_are_the_plain_product(M, blocks, bias, path, dtypes):
    N, H = blocks.out_features, blocks.interleave
    inputs, got = results((M, 252, N, 8), **path, **dtypes, p=0.1, blocks=blocks, bias=bias)
    plain = plain_product(inputs)
    owner = [i for _ in range(H) for i, n in enumerate(blocks.splits) for _ in range(n // H)]
    other = [j for j, i in enumerate(owner) if not blocks.enabled[i]]
    assert len(other) == blocks.splits[1]
    assert torch.equal(got["y"][:, other], plain[:, other])
    assert not torch.equal(got["y"], plain)


def formula(inputs):
    """The stages one after the other: a dropped element takes no part, be it NaN or Inf."""
    i, t = inputs, dropout.threshold(inputs.p)
    keep = dropout.unpack_mask(dropout.draw_mask(i.seed, *i.x.shape, t), i.x.shape[1])
    c, kept = i.scaling * dropout.inverse_keep(t), i.x.where(keep, 0)
    S, dS = c * kept @ i.lora_A.t(), c * i.grad @ i.lora_B
    return {
        "y": i.x @ i.weight.t() + i.bias + S @ i.lora_B.t(),
        "d_x": i.grad @ i.weight + (dS @ i.lora_A).where(keep, 0),
        "d_lora_A": dS.t() @ kept,
        "d_lora_B": i.grad.t() @ S,
        "d_bias": i.grad.sum(0),
    }


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "weight", "lora_A", "lora_B", "bias", "grad"])
def test_nan_and_inf_go_where_pytorch_puts_them(where, value, p, path):
    """Where nothing is dropped, NaN and either Inf are where the composition has them.

    A dropped element takes no part in the LoRA branch, while PyTorch's dropout multiplies it by
    zero; so there it is the formula's, and the output is finite where the composition's is.
    """
    backend, device = path.values()
    inputs = testing.make_inputs(9, 12, 15, 4, p=p, device=device)
    planted = getattr(inputs, where)
    for index in ((3, 0), (3, 1), (0, 3), (1, 3)):
        planted[index[: planted.dim()]] = value
    got, plain = testing.fused(inputs, backend), testing.composition(inputs)
    for name, t in (plain if p == 0 else formula(inputs)).items():
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(got[name]), kind(t)), (name, kind.__name__)
    assert torch.equal(got["y"].isfinite(), plain["y"].isfinite())
    assert not all(t.isfinite().all() for t in got.values())


@pytest.mark.parametrize("blocks", [None, THIRDS], ids=["single", "thirds"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_element_is_written(blocks, bias, path, dtypes, monkeypatch):
    """With new memory filled with NaN, the same bits come out."""
    sizes, options = (63, 33, 252, 3), {"p": 0.1, "blocks": blocks, "bias": bias}
    _, expected = results(sizes, **path, **dtypes, **options)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        _, got = results(sizes, **path, **dtypes, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert equal_bits(got, expected)


# ---- the rule itself


@pytest.fixture
def judged(dtypes):
    inputs = testing.make_inputs(64, 252, 192, 8, p=0.1, **dtypes)
    return inputs, testing.fused(inputs), testing.composition(inputs), testing.truth(inputs)


@pytest.mark.parametrize("name", ["y", "d_x", "d_lora_A", "d_lora_B", "d_bias"])
def test_rule_finds_an_error_of_one_percent(judged, name):
    _, got, plain, exact = judged
    testing.assert_no_worse(got, plain, exact)
    with pytest.raises(AssertionError, match=name):
        testing.assert_no_worse({**got, name: got[name] * 1.01}, plain, exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("name", ["y", "d_x", "d_lora_A", "d_lora_B", "d_bias"])
def test_rule_finds_one_wrong_element(judged, name, value):
    _, got, plain, exact = judged
    wrong = got[name].clone()
    wrong.view(-1)[exact[name].abs().argmax()] = value
    with pytest.raises(AssertionError, match=f"{name}: max error"):
        testing.assert_no_worse({**got, name: wrong}, plain, exact)


def test_rule_finds_another_mask(judged):
    inputs, _, plain, exact = judged
    inputs.seed.add_(1)
    with pytest.raises(AssertionError):
        testing.assert_no_worse(testing.fused(inputs), plain, exact)


def test_rule_finds_a_missing_rescale(judged, monkeypatch):
    _, _, plain, exact = judged
    monkeypatch.setattr(functional.dropout, "inverse_keep", lambda t: 1.0)
    got = testing.fused(judged[0])
    with pytest.raises(AssertionError):
        testing.assert_no_worse(got, plain, exact)


def test_rule_finds_a_wrong_dtype_or_shape(judged):
    _, got, plain, exact = judged
    for wrong in (got["y"].double(), got["y"][:1]):
        with pytest.raises(AssertionError, match="y: "):
            testing.assert_no_worse({**got, "y": wrong}, plain, exact)


def test_truth_is_pytorchs_own_dropout_layer():
    """The yardstick against ``nn`` modules: no line of the library in it but the mask."""
    inputs = testing.make_inputs(7, 33, 12, 4, p=0.5).to(torch.float64)
    keep = dropout.unpack_mask(dropout.draw_mask(inputs.seed, 7, 33, 32768), 33)
    x, A, B = (t.clone().requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B))
    delta = F.linear(F.linear(x.where(keep, 0) / 0.5, A), B) * inputs.scaling
    y = F.linear(x, inputs.weight, inputs.bias) + delta
    y.backward(inputs.grad)
    expected = {"y": y, "d_x": x.grad, "d_lora_A": A.grad, "d_lora_B": B.grad}
    got = testing.truth(inputs)
    for name, t in expected.items():
        torch.testing.assert_close(got[name], t)
