"""The functions: dtypes with and without autocast, shapes, strides, scaling, seeds, no data."""

import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlora import backends, dropout
from fastlora.functional import (
    grouped_lora_linear,
    lora_conv,
    lora_conv_dense,
    lora_embedding,
    lora_linear,
)

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPE_TRIPLES = list(itertools.product((FP32, BF16, FP16), repeat=3))
NAMES = ("x", "weight", "lora_A", "lora_B", "bias")

pytestmark = [
    pytest.mark.parametrize("path", ["auto", "triton", "emulated"], indirect=True),
    pytest.mark.usefixtures("path"),
]


def integers(*shape, dtype=FP32):
    """So small that every sum in this file is exact, and results are compared for equality."""
    return torch.randint(-2, 3, shape).to(dtype)


def operands(*batch, K=6, N=5, r=2, x=FP32, W=FP32, factors=FP32):
    return {
        "x": integers(*batch, K, dtype=x),
        "weight": integers(N, K, dtype=W),
        "lora_A": integers(r, K, dtype=factors),
        "lora_B": integers(N, r, dtype=factors),
        "bias": integers(N, dtype=W),
    }


def formula(x, weight, lora_A, lora_B, bias=None, scaling=1.0, p=0.0, seed=None):
    """The docstring's formula in fp64, with the mask of this seed."""
    x, weight, lora_A, lora_B = (t.double() for t in (x, weight, lora_A, lora_B))
    dropped = x
    if p:
        rows, t = x.reshape(-1, x.shape[-1]), dropout.threshold(p)
        keep = dropout.unpack_mask(dropout.draw_mask(seed, *rows.shape, t), x.shape[-1])
        dropped = x.where(keep.view(x.shape), 0) * dropout.inverse_keep(t)
    y = F.linear(x, weight, bias if bias is None else bias.double())
    return y + scaling * F.linear(F.linear(dropped, lora_A), lora_B)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


# ---- dtypes


@pytest.mark.parametrize("dtypes", DTYPE_TRIPLES, ids=str)
def test_dtypes_without_autocast(dtypes):
    """W is x's; the factors are x's, or fp32 over 16 bits; anything else is a TypeError."""
    x, W, factors = dtypes
    tensors = operands(4, x=x, W=W, factors=factors)
    if x != W:
        wrong, expected = "weight", f"got dtype {W}, expected {x}"
    elif factors not in (x, FP32):
        wrong, expected = "lora_A", f"got dtype {factors}, expected {x}"
    else:
        y = lora_linear(**tensors, scaling=1.0)
        assert y.dtype == x
        assert torch.equal(y, formula(**tensors).to(x))
        return
    with pytest.raises(TypeError, match=f"^{wrong}: {expected}"):
        lora_linear(**tensors, scaling=1.0)


@pytest.mark.parametrize("name", ["lora_B", "bias", "lora_bias"])
def test_mixed_factor_and_bias_dtypes_are_refused(name):
    tensors = {**operands(4, x=BF16, W=BF16, factors=BF16), "lora_bias": integers(5, dtype=BF16)}
    tensors[name] = tensors[name].float()
    with pytest.raises(TypeError, match=f"{name}.*float32.*expected"):
        lora_linear(**tensors, scaling=1.0)


@pytest.mark.parametrize("autocast", [BF16, FP16])
@pytest.mark.parametrize("dtypes", DTYPE_TRIPLES, ids=str)
def test_dtypes_under_autocast(dtypes, autocast):
    """Autocast's dtype comes out whatever goes in; gradients have the dtype of what they are of."""
    x, W, factors = dtypes
    tensors = {
        name: t.requires_grad_() for name, t in operands(4, x=x, W=W, factors=factors).items()
    }
    with torch.autocast("cpu", autocast):
        y = lora_linear(**tensors, scaling=1.0)
    assert y.dtype == autocast
    assert torch.equal(y, formula(**tensors).to(autocast))
    y.backward(torch.ones_like(y))
    wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    formula(**wide).sum().backward()
    for name, t in tensors.items():
        assert t.grad.dtype == t.dtype
        assert torch.equal(t.grad, wide[name].grad.to(t.dtype)), name


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast_is_a_cast_of_the_input_and_the_weight(dtype):
    """The same bits as without it on operands that were cast; fp32 factors are not."""
    tensors = {name: torch.randn_like(t) for name, t in operands(7, K=33).items()}
    with torch.autocast("cpu", dtype):
        y = lora_linear(**tensors, scaling=0.7)
    cast = {name: tensors[name].to(dtype) for name in ("x", "weight", "bias")}
    assert torch.equal(y, lora_linear(**{**tensors, **cast}, scaling=0.7))


def test_autocast_leaves_fp64_alone(path):
    if path != "auto":
        pytest.skip("no kernels for float64")
    tensors = operands(4, x=FP64, W=FP64, factors=FP64)
    with torch.autocast("cpu", BF16):
        y = lora_linear(**tensors, scaling=1.0)
    assert y.dtype == FP64
    assert torch.equal(y, formula(**tensors))


def test_autocast_disabled_inside_autocast():
    tensors = operands(4)
    with torch.autocast("cpu", BF16), torch.autocast("cpu", enabled=False):
        assert lora_linear(**tensors, scaling=1.0).dtype == FP32


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_autocast_of_another_device_does_not_matter():
    with torch.autocast("cuda", BF16):
        assert lora_linear(**operands(4), scaling=1.0).dtype == FP32


# ---- shapes and strides


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3), (2, 1, 3, 2), (0,), (3, 0, 2)])
def test_any_leading_shape(batch, p):
    tensors, seed = operands(*batch), torch.tensor([3])
    y = lora_linear(**tensors, scaling=2.0, p=p, seed=seed)
    assert y.shape == (*batch, 5)
    assert torch.equal(y, formula(**tensors, scaling=2.0, p=p, seed=seed).float())


@pytest.mark.parametrize("batch", [(), (0,), (3, 0, 2)])
def test_gradients_of_any_leading_shape(batch):
    tensors = {name: t.requires_grad_() for name, t in operands(*batch).items()}
    lora_linear(**tensors, scaling=2.0, p=0.5).sum().backward()
    assert all(t.grad.shape == t.shape for t in tensors.values())
    if 0 in batch:
        assert not any(t.grad.any() for t in tensors.values())


VIEWS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "offset": lambda t: F.pad(t, (3, 2))[..., 3:-2],
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "flipped storage": lambda t: t.flip(0).contiguous().flip(0),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B"])
def test_any_strides(name, view):
    tensors, seed = operands(7), torch.tensor([3])
    tensors[name] = VIEWS[view](tensors[name])
    y = lora_linear(**tensors, scaling=2.0, p=0.5, seed=seed)
    assert torch.equal(y, formula(**tensors, scaling=2.0, p=0.5, seed=seed).float())


@pytest.mark.parametrize("name", NAMES)
def test_memory_beside_an_operand_is_not_read(name):
    tensors = operands(7)
    expected = lora_linear(**tensors, scaling=1.0)
    moat = F.pad(tensors[name], (3,) * 2 * tensors[name].dim(), value=float("nan"))
    tensors[name] = moat[(slice(3, -3),) * moat.dim()]
    assert torch.equal(lora_linear(**tensors, scaling=1.0), expected)


sizes = st.integers(0, 9)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    batch=st.lists(sizes, max_size=3),
    K=st.integers(1, 70),
    splits=st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=4),
    interleave=st.integers(1, 3),
    r=st.integers(1, 9),
    p=st.sampled_from([0.0, 0.5, 0.75]),
    scaling=st.sampled_from([0.0, 0.25, -2.0]),
    bias=st.booleans(),
    dtype=st.sampled_from([FP32, FP64]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_formula_at_random_sizes(batch, K, splits, interleave, r, p, scaling, bias, dtype, seed):
    if FP64 not in (backends.select().dtypes or {}).get("cpu", [FP64]):
        dtype = FP32
    widths, enabled = zip(*splits, strict=True)
    owner = torch.tensor(widths).repeat(interleave)
    owner = torch.arange(len(widths)).repeat(interleave).repeat_interleave(owner)
    out_splits, N = [n * interleave for n in widths], len(owner)
    adapted = [i for i, on in enumerate(enabled) if on]
    x, W, b = (
        integers(*batch, K, dtype=dtype),
        integers(N, K, dtype=dtype),
        integers(N, dtype=dtype),
    )
    A = integers(len(adapted) * r, K, dtype=dtype)
    B = integers(sum(out_splits[i] for i in adapted), r, dtype=dtype)
    options = {"scaling": scaling, "p": p, "seed": torch.tensor([seed])}
    y = grouped_lora_linear(
        *(x, W, A, B),
        enable_lora=enabled,
        out_splits=out_splits,
        interleave=interleave,
        bias=b if bias else None,
        **options,
    )
    expected = F.linear(x, W, b if bias else None).double()
    rows = 0
    for g, i in enumerate(adapted):
        B_g, rows = B[rows : rows + out_splits[i]], rows + out_splits[i]
        none = W.new_zeros(len(B_g), K)
        expected[..., owner == i] += formula(x, none, A[g * r : (g + 1) * r], B_g, **options)
    assert y.dtype == dtype
    assert torch.equal(y.double(), expected)


# ---- scaling, dropout, seed


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("value", [0.0, 0.7, -2.0, 3])
def test_scaling_as_a_tensor_is_the_number(value, p):
    tensors = {name: torch.randn_like(t) for name, t in operands(9, K=33).items()}
    options = {"p": p, "seed": torch.tensor([3])}
    expected = lora_linear(**tensors, scaling=value, **options)
    scaling = torch.tensor(value, dtype=FP64)
    assert torch.equal(lora_linear(**tensors, scaling=scaling, **options), expected)


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1)])
def test_scaling_as_one_element_of_any_shape(shape, dtype):
    tensors, options = operands(9), {"p": 0.5, "seed": torch.tensor([3])}
    y = lora_linear(**tensors, scaling=torch.full(shape, -0.5, dtype=dtype), **options)
    assert torch.equal(y, formula(**tensors, scaling=-0.5, **options).float())


@pytest.mark.parametrize("scaling", [np.float32(-0.5), np.float64(-0.5), np.int64(2)])
def test_scaling_and_p_as_numbers_of_numpy(scaling):
    tensors, seed = operands(9), torch.tensor([3])
    y = lora_linear(**tensors, scaling=scaling, p=np.float32(0.5), seed=seed)
    assert torch.equal(y, lora_linear(**tensors, scaling=float(scaling), p=0.5, seed=seed))


def test_scaling_as_a_tensor_reaches_gradients_and_bias():
    results = []
    for scaling in (0.5, torch.tensor(0.5), torch.full((1, 1, 1), 0.5)):
        torch.manual_seed(0)
        tensors = {name: t.requires_grad_() for name, t in operands(9).items()}
        lora_bias = integers(5).requires_grad_()
        y = lora_linear(**tensors, scaling=scaling, lora_bias=lora_bias)
        y.sum().backward()
        results.append([y, lora_bias.grad, *(t.grad for t in tensors.values())])
    assert all(map(torch.equal, results[0], other) for other in results[1:])


def test_p_of_one_leaves_the_plain_layer():
    tensors = {name: torch.randn_like(t).requires_grad_() for name, t in operands(9).items()}
    y = lora_linear(**tensors, scaling=2.0, p=1.0)
    assert torch.equal(y, F.linear(tensors["x"], tensors["weight"], tensors["bias"]))
    y.sum().backward()
    assert not tensors["lora_A"].grad.any()
    assert not tensors["lora_B"].grad.any()
    assert torch.equal(tensors["x"].grad, torch.ones(9, 5) @ tensors["weight"])


def test_dropout_is_off_outside_training():
    tensors = operands(9)
    y = lora_linear(**tensors, scaling=2.0, p=0.5, training=False)
    assert torch.equal(y, lora_linear(**tensors, scaling=2.0))


def test_seed_replays_a_mask():
    tensors = {name: torch.randn_like(t) for name, t in operands(9, K=33).items()}

    def run(seed):
        return lora_linear(**tensors, scaling=2.0, p=0.3, seed=seed)

    torch.manual_seed(5)
    seed = dropout.draw_seed(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(run(None), run(seed))
    assert torch.equal(run(seed), run(seed.squeeze()))
    assert not torch.equal(run(seed), run(seed + 1))
    assert not torch.equal(run(None), run(None))


def test_lora_bias_is_scaled():
    tensors, lora_bias = operands(4), integers(5)
    y = lora_linear(**tensors, scaling=0.5, lora_bias=lora_bias)
    assert torch.equal(y, (formula(**tensors, scaling=0.5) + 0.5 * lora_bias).float())
    del tensors["bias"]
    y = lora_linear(**tensors, scaling=0.5, lora_bias=lora_bias)
    assert torch.equal(y, (formula(**tensors, scaling=0.5) + 0.5 * lora_bias).float())


def test_no_block_adapted_is_the_plain_layer():
    x, W, b = integers(3, 6), integers(8, 6), integers(8)
    none = torch.empty(0, 6), torch.empty(0, 2)
    y = grouped_lora_linear(x, W, *none, scaling=1.0, enable_lora=[False, False], bias=b)
    assert torch.equal(y, F.linear(x, W, b))


# ---- tensors without data

CONV = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
CALLS = {
    "lora_linear": lambda f: lora_linear(
        f(3, 4, 6), f(5, 6), f(2, 6), f(5, 2), bias=f(5), scaling=2.0, p=0.1
    ),
    "grouped": lambda f: grouped_lora_linear(
        f(3, 4, 6), f(6, 6), f(4, 6), f(4, 2), scaling=2.0, p=0.1, enable_lora=[True, False, True]
    ),
    "embedding": lambda f: lora_embedding(
        f(3, 4).long(), f(9, 5), f(2, 9), f(5, 2), scaling=2.0, padding_idx=1
    ),
    "conv": lambda f: lora_conv(
        f(3, 4, 8, 8), f(5, 4, 3, 3), f(2, 4, 3, 3), f(5, 2), scaling=2.0, p=0.1, **CONV
    ),
    "dense conv": lambda f: lora_conv_dense(
        f(3, 4, 8, 8), f(5, 4, 3, 3), f(6, 12), f(15, 6), scaling=2.0, p=0.1, **CONV
    ),
}


@pytest.mark.parametrize("mode", ["meta", "fake"])
@pytest.mark.parametrize("name", CALLS)
def test_shapes_without_data(name, mode):
    """Forward and backward give the shapes, strides and dtypes that real tensors give."""
    leaves = []

    def run(device):
        def make(*shape):
            leaves.append(torch.ones(shape, device=device, requires_grad=True))
            return leaves[-1]

        leaves.clear()
        y = CALLS[name](make)
        y.sum().backward()
        grads = [t.grad for t in leaves if t.grad is not None]
        return [(t.shape, t.stride(), t.dtype) for t in (y, *grads)], y

    expected, _ = run("cpu")
    with FakeTensorMode() if mode == "fake" else nullcontext():
        got, y = run("cpu" if mode == "fake" else "meta")
    assert got == expected
    assert y.device.type == ("cpu" if mode == "fake" else "meta")


# ---- embeddings and convolutions


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
def test_embedding_is_its_formula(shape, dtype):
    index = torch.randint(0, 9, shape)
    W, A, B = (integers(*s, dtype=dtype) for s in ((9, 5), (2, 9), (5, 2)))
    y = lora_embedding(index, W, A, B, scaling=0.5)
    wide = F.embedding(index, W.double() + 0.5 * (B.double() @ A.double()).t())
    assert torch.equal(y, wide.to(dtype))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize(("groups", "padding"), [(1, "same"), (2, (1,)), (1, "valid")])
def test_conv_is_a_conv_by_the_merged_kernel(dimensions, groups, padding):
    conv = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
    kernel, r = (3,) * dimensions, 2
    padding = padding * dimensions if isinstance(padding, tuple) else padding
    x, W = integers(2, 4, *(5,) * dimensions), integers(6, 4 // groups, *kernel)
    A, B = integers(groups * r, 4 // groups, *kernel), integers(6, r)
    delta = B.view(groups, -1, r) @ A.view(groups, r, -1)
    ones = (1,) * dimensions
    y = lora_conv(
        x, W, A, B, scaling=2.0, stride=ones, padding=padding, dilation=ones, groups=groups
    )
    whole = W + 2 * delta.view(W.shape)
    assert torch.equal(y, conv(x, whole, padding=padding, groups=groups))


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("function", [lora_conv, lora_conv_dense])
def test_one_number_for_all_dimensions_of_a_conv(function, mode):
    x, W = integers(2, 4, 9, 9), integers(6, 4, 3, 3)
    A, B = (integers(2, 4, 3, 3), integers(6, 2))
    if function is lora_conv_dense:
        A, B = integers(6, 12), integers(18, 6)
    options = {"scaling": 1.0, "padding_mode": mode}
    expected = function(x, W, A, B, stride=(2, 2), padding=(1, 1), dilation=(2, 2), **options)
    for one in (lambda n: n, lambda n: (n,), lambda n: [np.int64(n)]):
        y = function(x, W, A, B, stride=one(2), padding=one(1), dilation=one(2), **options)
        assert torch.equal(y, expected)


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 12)])
def test_the_output_is_no_view(shape):
    """As from ``F.linear``: an in-place operation on it reaches no other tensor."""
    x = torch.randn(shape, requires_grad=True)
    A, B = torch.randn(2, 12, requires_grad=True), torch.randn(5, 2)
    y = lora_linear(x, torch.randn(5, 12), A, B, scaling=1.0)
    assert y.shape == (*shape[:-1], 5) and not y._is_view()
    index = torch.zeros(shape, dtype=torch.long)
    z = lora_embedding(index, torch.randn(7, 5), torch.randn(2, 7), B, scaling=1.0)
    assert z.shape == (*shape, 5) and not z._is_view()
    y += 1
    y.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize(
    ("dtype", "compiled"), [(BF16, False), (FP16, False), (FP32, False), (FP32, True)]
)
def test_a_tensor_as_scaling_is_not_rounded_with_dropout(dtype, compiled, path):
    wide = FP64 if path == "auto" else FP32
    x, A, B = (torch.ones(size, dtype=wide) for size in ((64, 32), (1, 32), (8, 1)))
    W, options = torch.zeros(8, 32, dtype=wide), {"p": 0.05, "seed": torch.tensor([5])}
    expected = lora_linear(x, W, A, B, scaling=1.5, **options)
    function = torch.compile(lora_linear, backend="aot_eager") if compiled else lora_linear
    got = function(x, W, A, B, scaling=torch.tensor(1.5, dtype=dtype), **options)
    assert torch.equal(got, expected)
