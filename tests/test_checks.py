"""Errors name the argument, what was got and what was expected; and nothing has changed by then."""

import json
import re
import struct
import warnings
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora import adapters, backends
from fastlora.functional import (
    grouped_lora_linear,
    lora_conv,
    lora_conv_dense,
    lora_embedding,
    lora_linear,
    multi_lora_linear,
)

NAN, INF = float("nan"), float("inf")


def ones(*shape, **options):
    return torch.ones(shape, **options)


def linear(**changed):
    given = {
        "x": ones(4, 6),
        "weight": ones(5, 6),
        "lora_A": ones(2, 6),
        "lora_B": ones(5, 2),
        "bias": ones(5),
        "scaling": 1.0,
    }
    return lora_linear(**{**given, **changed})


def grouped(**changed):
    given = {
        "x": ones(4, 6),
        "weight": ones(12, 6),
        "lora_A": ones(4, 6),
        "lora_B": ones(8, 2),
        "scaling": 1.0,
        "enable_lora": [True, False, True],
    }
    return grouped_lora_linear(**{**given, **changed})


def multi(**changed):
    given = {
        "x": ones(4, 6),
        "weights": [ones(5, 6), ones(3, 6)],
        "lora_A": [ones(2, 6), ones(4, 6)],
        "lora_B": [ones(5, 2), ones(3, 4)],
        "bias": [None, ones(3)],
        "scaling": 1.0,
    }
    return multi_lora_linear(**{**given, **changed})


def embedding(**changed):
    given = {
        "index": torch.tensor([1, 2]),
        "weight": ones(9, 5),
        "lora_A": ones(2, 9),
        "lora_B": ones(5, 2),
        "scaling": 1.0,
    }
    return lora_embedding(**{**given, **changed})


def conv(function=lora_conv, **changed):
    given = {
        "x": ones(2, 4, 8, 8),
        "weight": ones(6, 4, 3, 3),
        "lora_A": ones(2, 4, 3, 3),
        "lora_B": ones(6, 2),
        "scaling": 1.0,
        **dict.fromkeys(("stride", "padding", "dilation"), (1, 1)),
    }
    return function(**{**given, **changed})


def dense_conv(**changed):
    return conv(lora_conv_dense, **{"lora_A": ones(6, 12), "lora_B": ones(18, 6), **changed})


def layer(**options):
    return fastlora.Linear(4, 4, **{"r": 2, **options})


def merged_linear(**options):
    return fastlora.MergedLinear(6, 12, r=2, **{"enable_lora": [True, False, True], **options})


IN_FOUR = {"x": ones(2, 16, 8, 8), "groups": 4, "lora_A": ones(8, 4, 3, 3)}
GRAD = torch.ones((), requires_grad=True)
JAGGED = torch.nested.nested_tensor([ones(2, 6), ones(3, 6)], layout=torch.jagged)
# as nn.TransformerEncoder makes it
NESTED = torch._nested_tensor_from_mask(ones(2, 3, 6), ones(2, 3).bool())

# call, changed arguments, exception; and what the message says was got and expected
CASES = [
    (linear, {"x": ones(4, 7)}, ValueError, "x", "(4, 7)", "(..., 6)"),
    (linear, {"x": torch.tensor(1.0)}, ValueError, "x", "()", "(..., 6)"),
    (linear, {"weight": ones(6)}, ValueError, "weight", "(6,)", "(out_features, in_features)"),
    (linear, {"lora_A": ones(3, 6)}, ValueError, "lora_A", "(3, 6)", "(2, 6)"),
    (linear, {"lora_A": ones(6)}, ValueError, "lora_A", "(6,)", "(2, 6)"),
    (linear, {"lora_B": ones(4, 2)}, ValueError, "lora_B", "(4, 2)", "(5, 2)"),
    (linear, {"lora_B": ones(5)}, ValueError, "lora_B", "(5,)", "(out_features, r)"),
    (linear, {"bias": ones(4)}, ValueError, "bias", "(4,)", "(5,)"),
    (linear, {"lora_bias": ones(4)}, ValueError, "lora_bias", "(4,)", "(5,)"),
    # dtypes
    (linear, {"x": ones(4, 6).long()}, TypeError, "x", "int64", "float32"),
    (linear, {"lora_A": ones(2, 6).int()}, TypeError, "lora_A", "int32", "float32"),
    (linear, {"lora_B": ones(5, 2).bool()}, TypeError, "lora_B", "bool", "float32"),
    (
        linear,
        {"weight": ones(5, 6).to(torch.complex64)},
        TypeError,
        "weight",
        "complex64",
        "float32",
    ),
    (linear, {"weight": ones(5, 6).half()}, TypeError, "weight", "float16", "float32"),
    (linear, {"bias": ones(5).half()}, TypeError, "bias", "float16", "float32"),
    (linear, {"lora_A": ones(2, 6).half()}, TypeError, "lora_A", "float16", "float32"),
    (linear, {"lora_bias": ones(5).half()}, TypeError, "lora_bias", "float16", "float32"),
    # layouts
    (linear, {"x": ones(4, 6).to_sparse()}, TypeError, "x", "sparse_coo", "dense"),
    (linear, {"x": JAGGED}, TypeError, "x", "nested", "dense"),
    (linear, {"x": NESTED}, TypeError, "x", "nested", "use_nested_tensor"),
    (multi, {"x": JAGGED}, TypeError, "x", "nested", "dense"),
    (conv, {"x": ones(2, 4, 8, 8).to_sparse()}, TypeError, "x", "sparse_coo", "dense"),
    (embedding, {"index": torch.tensor([1]).to_sparse()}, TypeError, "index", "sparse", "dense"),
    # not tensors
    (linear, {"x": None}, TypeError, "x", "NoneType", "Tensor"),
    (linear, {"weight": [[1.0]]}, TypeError, "weight", "list", "Tensor"),
    (linear, {"lora_A": None}, TypeError, "lora_A", "NoneType", "Tensor"),
    (linear, {"bias": [1.0]}, TypeError, "bias", "list", "Tensor"),
    (linear, {"p": 0.1, "seed": 3}, TypeError, "seed", "int", "Tensor"),
    (linear, {"scaling": "1"}, TypeError, "scaling", "'1'", "number"),
    (linear, {"p": None}, TypeError, "p", "None", "probability"),
    # devices
    (linear, {"weight": ones(5, 6, device="meta")}, ValueError, "weight", "meta", "cpu"),
    (linear, {"lora_A": ones(2, 6, device="meta")}, ValueError, "lora_A", "meta", "cpu"),
    (linear, {"lora_B": ones(5, 2, device="meta")}, ValueError, "lora_B", "meta", "cpu"),
    (linear, {"bias": ones(5, device="meta")}, ValueError, "bias", "meta", "cpu"),
    (linear, {"lora_bias": ones(5, device="meta")}, ValueError, "lora_bias", "meta", "cpu"),
    (linear, {"x": ones(4, 6, device="meta")}, ValueError, "weight", "cpu", "meta"),
    # options
    (linear, {"p": -0.1}, ValueError, "p", "-0.1", "[0, 1]"),
    (linear, {"p": 1.5}, ValueError, "p", "1.5", "[0, 1]"),
    (linear, {"p": NAN}, ValueError, "p", "nan", "[0, 1]"),
    (linear, {"seed": ones(1).int()}, ValueError, "seed", "int32", "int64"),
    (linear, {"seed": ones(2).long()}, ValueError, "seed", "(2,)", "one int64 element"),
    (linear, {"seed": ones(1, device="meta").long()}, ValueError, "seed", "meta", "cpu"),
    (linear, {"scaling": NAN}, ValueError, "scaling", "nan", "finite"),
    (linear, {"scaling": -INF}, ValueError, "scaling", "-inf", "finite"),
    (linear, {"scaling": GRAD}, ValueError, "scaling", "requires_grad=True", "no gradient"),
    (linear, {"scaling": ones(2)}, ValueError, "scaling", "(2,)", "one element"),
    (linear, {"backend": "cuda"}, ValueError, "backend", "'cuda'", "reference, native, triton"),
    # layers that share an input
    (multi, {"weights": []}, ValueError, "weights", "0 elements", "one or more"),
    (multi, {"weights": ones(2, 5, 6)}, TypeError, "weights", "Tensor", "list or tuple"),
    (multi, {"lora_A": None}, TypeError, "lora_A", "NoneType", "list or tuple"),
    (multi, {"lora_B": ones(5, 2)}, TypeError, "lora_B", "Tensor", "list or tuple"),
    (multi, {"lora_A": [ones(2, 6)]}, ValueError, "lora_A", "1 elements", "2, one for each"),
    (multi, {"bias": [None] * 3}, ValueError, "bias", "3 elements", "2, one for each"),
    (multi, {"bias": ones(5)}, TypeError, "bias", "Tensor", "list or tuple"),
    (multi, {"lora_bias": [ones(5)]}, ValueError, "lora_bias", "1 elements", "2, one for each"),
    (multi, {"seeds": ones(1).long()}, TypeError, "seeds", "Tensor", "list or tuple"),
    (multi, {"p": [0.1]}, ValueError, "p", "1 elements", "2, one for each"),
    (multi, {"scaling": (1.0,) * 3}, ValueError, "scaling", "3 elements", "2, one for each"),
    (multi, {"x": ones(4, 7)}, ValueError, "x", "(4, 7)", "(..., 6), in_features of weights[0]"),
    (multi, {"x": None}, TypeError, "x", "NoneType", "Tensor"),
    (
        multi,
        {"weights": [ones(5, 6), ones(6)]},
        ValueError,
        "weights[1]",
        "(6,)",
        "(out_features, in_features)",
    ),
    (
        multi,
        {"weights": [ones(5, 6), ones(3, 6).half()]},
        TypeError,
        "weights[1]",
        "float16",
        "float32",
    ),
    (
        multi,
        {"lora_A": [ones(2, 6), ones(3, 6)]},
        ValueError,
        "lora_A[1]",
        "(3, 6)",
        "(4, 6) (r=4 of lora_B[1]",
    ),
    (multi, {"lora_A": [None, ones(4, 6)]}, TypeError, "lora_A[0]", "NoneType", "Tensor"),
    (multi, {"lora_B": [ones(5, 2), None]}, TypeError, "lora_B[1]", "NoneType", "Tensor"),
    (multi, {"lora_B": [ones(4, 2), ones(3, 4)]}, ValueError, "lora_B[0]", "(4, 2)", "(5, 2)"),
    (multi, {"bias": [None, ones(5)]}, ValueError, "bias[1]", "(5,)", "(3,)"),
    (multi, {"lora_bias": [None, ones(5)]}, ValueError, "lora_bias[1]", "(5,)", "(3,)"),
    (multi, {"scaling": [1.0, NAN]}, ValueError, "scaling[1]", "nan", "finite"),
    (multi, {"scaling": None}, TypeError, "scaling", "None", "number"),
    (multi, {"p": [0.1, 1.5]}, ValueError, "p[1]", "1.5", "[0, 1]"),
    (multi, {"p": -0.1}, ValueError, "p", "-0.1", "[0, 1]"),
    (multi, {"seeds": [None, ones(1).int()]}, ValueError, "seeds[1]", "int32", "int64"),
    (multi, {"backend": "cuda"}, ValueError, "backend", "'cuda'", "reference, native, triton"),
    # blocks
    (grouped, {"enable_lora": []}, ValueError, "enable_lora", "empty", "one bool a block"),
    (grouped, {"enable_lora": [True] * 5}, ValueError, "enable_lora", "5 blocks", "divides"),
    (grouped, {"out_splits": [4, 4, 5]}, ValueError, "out_splits", "sum 13", "out_features=12"),
    (grouped, {"out_splits": [-4, 8, 8]}, ValueError, "out_splits", "[-4, 8, 8]", "positive"),
    (grouped, {"out_splits": [6, 6]}, ValueError, "out_splits", "2 blocks", "3"),
    (grouped, {"interleave": 3}, ValueError, "interleave", "3", "divides every block of [4, 4, 4]"),
    (grouped, {"interleave": 0}, ValueError, "interleave", "0", "positive"),
    (grouped, {"lora_A": ones(6, 6)}, ValueError, "lora_A", "(6, 6)", "(4, 6)"),
    (grouped, {"lora_B": ones(12, 2)}, ValueError, "lora_B", "(12, 2)", "(8, 2)"),
    # embeddings
    (embedding, {"index": ones(2)}, TypeError, "index", "float32", "int64"),
    (embedding, {"index": torch.tensor([9])}, IndexError, "index", "", ""),
    (embedding, {"index": torch.tensor([-1])}, IndexError, "index", "", ""),
    (embedding, {"weight": ones(5)}, ValueError, "weight", "(5,)", "embedding_dim"),
    (embedding, {"lora_A": ones(2, 8)}, ValueError, "lora_A", "(2, 8)", "(2, 9)"),
    (embedding, {"lora_B": ones(4, 2)}, ValueError, "lora_B", "(4, 2)", "(5, 2)"),
    (embedding, {"lora_A": ones(2, 9).double()}, TypeError, "lora_A", "float64", "float32"),
    (embedding, {"lora_A": ones(2, 9, device="meta")}, ValueError, "lora_A", "meta", "cpu"),
    (embedding, {"scaling": NAN}, ValueError, "scaling", "nan", "finite"),
    (embedding, {"padding_idx": 9}, ValueError, "padding_idx", "9", "num_embeddings"),
    # convolutions
    (conv, {"x": ones(2, 3, 8, 8)}, ValueError, "x", "(2, 3, 8, 8)", "(batch, 4, *, *)"),
    (conv, {"x": ones(4, 8)}, ValueError, "x", "(4, 8)", "(batch, 4, *, *)"),
    (conv, {"weight": ones(6, 4)}, ValueError, "weight", "(6, 4)", "*kernel"),
    (conv, IN_FOUR, ValueError, "groups", "4", "divisor of out_channels=6"),
    (conv, {"groups": 0}, ValueError, "groups", "0", "positive"),
    (conv, {"lora_A": ones(3, 4, 3, 3)}, ValueError, "lora_A", "(3, 4, 3, 3)", "(2, 4, 3, 3)"),
    (conv, {"lora_B": ones(5, 2)}, ValueError, "lora_B", "(5, 2)", "(6, 2)"),
    (conv, {"bias": ones(5)}, ValueError, "bias", "(5,)", "(6,)"),
    (conv, {"weight": ones(6, 4, 3, 3).half()}, TypeError, "weight", "float16", "float32"),
    (conv, {"lora_B": ones(6, 2).half()}, TypeError, "lora_B", "float16", "float32"),
    (conv, {"lora_A": ones(2, 4, 3, 3, device="meta")}, ValueError, "lora_A", "meta", "cpu"),
    (conv, {"p": 2}, ValueError, "p", "2", "[0, 1]"),
    (conv, {"scaling": INF}, ValueError, "scaling", "inf", "finite"),
    (conv, {"seed": ones(2).long()}, ValueError, "seed", "(2,)", "one int64 element"),
    (conv, {"padding": "sam"}, ValueError, "padding", "'sam'", "same"),
    (conv, {"padding": "same", "stride": (2, 2)}, ValueError, "padding", "same", "stride"),
    (conv, {"padding": -1}, ValueError, "padding", "-1", "0 or more"),
    (conv, {"padding": (1, 1, 1)}, ValueError, "padding", "(1, 1, 1)", "one number or 2"),
    (conv, {"stride": (0, 1)}, ValueError, "stride", "(0, 1)", "1 or more"),
    (conv, {"stride": ()}, ValueError, "stride", "()", "one number or 2"),
    (conv, {"stride": 1.5}, TypeError, "stride", "1.5", "int"),
    (conv, {"dilation": (1, True)}, TypeError, "dilation", "True", "int"),
    (conv, {"padding_mode": "zero"}, ValueError, "padding_mode", "'zero'", "'zeros'"),
    (dense_conv, {"lora_B": ones(17, 6)}, ValueError, "lora_B", "(17, 6)", "(18, 6)"),
    (dense_conv, {"lora_A": ones(6)}, ValueError, "lora_A", "(6,)", "expected"),
    # layers
    (layer, {"r": -1}, ValueError, "r", "-1", "positive"),
    (layer, {"r": True}, TypeError, "r", "True", "int"),
    (layer, {"r": 1.5}, TypeError, "r", "1.5", "int"),
    (layer, {"r": "8"}, TypeError, "r", "'8'", "int"),
    (layer, {"lora_alpha": NAN}, ValueError, "lora_alpha", "nan", "finite"),
    (layer, {"lora_alpha": "16"}, TypeError, "lora_alpha", "'16'", "number"),
    (layer, {"lora_dropout": 1.5}, ValueError, "lora_dropout", "1.5", "[0, 1]"),
    (
        layer,
        {"init_lora_weights": "pissa"},
        ValueError,
        "init_lora_weights",
        "'pissa'",
        "'gaussian'",
    ),
    (layer, {"lora_dtype": torch.int8}, TypeError, "lora_dtype", "int8", "float32"),
    (layer, {"backend": "cuda"}, ValueError, "backend", "'cuda'", "reference, native, triton"),
    (merged_linear, {"enable_lora": [True] * 5}, ValueError, "enable_lora", "5 blocks", "divides"),
    (merged_linear, {"out_splits": [6, 6]}, ValueError, "out_splits", "2 blocks", "3"),
    (merged_linear, {"interleave": 3}, ValueError, "interleave", "3", "divides"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].__name__}-{c[3]}-{c[4]}")
def test_message(case):
    function, changed, kind, name, got, expected = case
    with pytest.raises(kind) as raised:
        function(**changed)
    message = str(raised.value)
    assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message), message
    assert got in message
    assert expected in message


@pytest.mark.parametrize(
    "function", [linear, grouped, multi, embedding, conv, dense_conv, layer, merged_linear]
)
def test_the_calls_above_are_right_but_for_what_is_changed(function):
    function()


def more(name, *fragments):
    """Matches a message that names the argument first and holds the fragments in this order."""
    return ".*".join([rf"^\W*{re.escape(name)}\b", *(re.escape(f) for f in fragments)])


@pytest.mark.parametrize("name", ["native", "triton"])
def test_a_backend_that_is_not_usable_says_why(name):
    if (reason := backends.available()[name]) is None:
        pytest.skip(f"{name} is usable here")
    for call in (lambda: linear(backend=name), lambda: backends.use_backend(name).__enter__()):
        with pytest.raises(ValueError, match=more("backend", name, reason)):
            call()


def test_an_unknown_backend_in_use_backend():
    before = backends.select()
    with pytest.raises(ValueError, match=more("backend", "'x'", "reference")):
        backends.use_backend("x").__enter__()
    assert backends.select() is before


@pytest.mark.skipif(bool(backends.native.why_not()), reason=f"native: {backends.native.why_not()}")
def test_a_backend_without_kernels_for_the_device():
    given = {name: ones(5, 5, device="meta") for name in ("x", "weight", "lora_A", "lora_B")}
    for name in ("auto", "native"):
        assert linear(**given, bias=None, backend=name).device.type == "meta"
    with pytest.raises(ValueError, match=more("backend", "'native'", "xpu", "cpu")):
        backends.select("native", "xpu")
    assert backends.select("auto", "meta").name == "reference"


@pytest.mark.parametrize(
    ("build", "name", "got", "expected"),
    [
        (lambda m: fastlora.Linear.from_linear(m, r=2), "module", "LayerNorm", "Linear"),
        (
            lambda m: fastlora.MergedLinear.from_linear(m, 2, [True]),
            "module",
            "LayerNorm",
            "Linear",
        ),
        (lambda m: fastlora.Conv2d.from_conv(m, r=2), "module", "LayerNorm", "Conv2d"),
        (lambda m: fastlora.Embedding.from_embedding(m, r=2), "module", "LayerNorm", "Embedding"),
        (fastlora.explain, "layer", "LayerNorm", "fastlora layer"),
    ],
)
def test_a_module_of_another_kind(build, name, got, expected):
    with pytest.raises(TypeError, match=more(name, got, expected)):
        build(nn.LayerNorm(3))


@pytest.mark.parametrize(
    ("build", "name", "got", "expected"),
    [
        (lambda: fastlora.Embedding(9, 5, r=2, max_norm=1.0), "max_norm", "1.0", "None"),
        (
            lambda: fastlora.Conv2d(3, 4, 3, r=2, factorization="cp"),
            "factorization",
            "'cp'",
            "tucker",
        ),
    ],
)
def test_other_options_of_layers(build, name, got, expected):
    with pytest.raises(ValueError, match=more(name, got, expected)):
        build()


def test_another_kind_of_dropout():
    module = layer()
    module.lora_dropout = nn.Dropout2d(0.1)
    with pytest.raises(TypeError, match=more("lora_dropout", "Dropout2d", "nn.Dropout")):
        module(ones(1, 4))


# ---- nothing has changed


class Net(nn.Sequential):
    """Two linear layers, an embedding, a norm and a convolution."""

    def __init__(self):
        super().__init__(
            OrderedDict(
                embed=nn.Embedding(9, 6),
                first=nn.Linear(6, 6),
                norm=nn.LayerNorm(6),
                second=nn.Linear(6, 5),
                conv=nn.Conv1d(5, 5, 1),
            )
        )


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def model(net):
    """With factors that are not zero, and biases that train."""
    fastlora.inject(net, ["first", "second"], r=2, init_lora_weights=False)
    fastlora.mark_only_lora_as_trainable(net, bias="lora_only")
    return net


def state(model):
    """All that an operation could have changed, by name."""
    found = {"state_dict": {k: t.clone() for k, t in model.state_dict().items()}}
    for name, module in model.named_modules():
        lora = [getattr(module, key, None) for key in ("r", "scaling", "merged", "merge_nbytes")]
        found[name] = (id(module), type(module), module.training, *lora, list(module._parameters))
    for name, p in model.named_parameters():
        found[name] = (id(p), p.requires_grad, p.dtype, p.detach().clone())
    return found


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(
            a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def refuses(model, kind, match, operation):
    """``operation`` raises, and the model is as it was."""
    before = state(model)
    with pytest.raises(kind, match=match):
        operation()
    after = state(model)
    assert [name for name in before if not same(before[name], after.get(name))] == []
    assert before.keys() == after.keys()


INJECT = [
    ({"target_modules": ["frist"]}, ValueError, more("target_modules", "'frist'", "first")),
    ({"target_modules": []}, ValueError, more("target_modules", "empty", "at least one")),
    (
        {"target_modules": ["norm"]},
        ValueError,
        more("target_modules", "norm", "LayerNorm", "linear"),
    ),
    ({"target_modules": "first("}, ValueError, more("target_modules", "'first('", "regular")),
    ({"exclude_modules": "first("}, ValueError, more("exclude_modules", "'first('", "regular")),
    ({"rank_pattern": {"second": 0}}, ValueError, more("second", "0", "1 or more")),
    ({"rank_pattern": {"second": 1.5}}, TypeError, more("second", "1.5", "int")),
    ({"rank_pattern": {"second(": 2}}, ValueError, more("rank_pattern", "'second('", "regular")),
    ({"alpha_pattern": {"second": NAN}}, ValueError, more("lora_alpha", "nan", "finite")),
    ({"r": 0}, ValueError, more("r", "0", "1 or more")),
    ({"r": -2}, ValueError, more("r", "-2", "positive")),
    ({"r": True}, TypeError, more("r", "True", "int")),
    ({"lora_dropout": 2.0}, ValueError, more("lora_dropout", "2.0", "[0, 1]")),
    ({"lora_alpha": INF}, ValueError, more("lora_alpha", "inf", "finite")),
    ({"init_lora_weights": "x"}, ValueError, more("init_lora_weights", "'x'", "'gaussian'")),
    ({"factorization": "x"}, ValueError, more("factorization", "'x'", "'locon'")),
    ({"enable_lora": [True, False]}, ValueError, more("enable_lora", "2 blocks", "out_features=5")),
    ({"enable_lora": [False] * 3}, ValueError, more("enable_lora", "False", "a block to adapt")),
    ({"out_splits": [3, 3]}, ValueError, more("out_splits", "layout", "enable_lora")),
    ({"interleave": 2}, ValueError, more("out_splits, interleave", "layout", "enable_lora")),
    ({"backend": "x"}, ValueError, more("backend", "'x'", "reference")),
    ({"lora_dtype": torch.int8}, TypeError, more("lora_dtype", "int8", "float32")),
]


@pytest.mark.parametrize(("options", "kind", "match"), INJECT, ids=[str(c[0]) for c in INJECT])
def test_inject_refuses(net, options, kind, match):
    """One of several layers is wrong, and none is replaced."""
    targets = {"target_modules": ["first", "second", "conv"]}
    refuses(net, kind, match, lambda: fastlora.inject(net, **{**targets, **options}))


def test_inject_that_fails_halfway_changes_nothing(net, monkeypatch):
    """For lack of memory, say; or since a warning is an error."""
    adopt, targets = fastlora.Linear.adopt, ["first", "second"]

    def fail(layer, module):
        if module is net.second:
            raise torch.OutOfMemoryError("no room for it")
        return adopt(layer, module)

    with monkeypatch.context() as patch:
        patch.setattr(fastlora.Linear, "adopt", fail)
        refuses(net, RuntimeError, "no room", lambda: fastlora.inject(net, targets, r=2))
    net.tied = nn.Linear(6, 6)
    net.tied.weight = net.first.weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuses(net, UserWarning, "its weight is also", lambda: fastlora.inject(net, targets, r=2))


def test_inject_twice_refuses(model):
    match = more("target_modules", "LoRA layer already")
    refuses(model, ValueError, match, lambda: fastlora.inject(model, ["first"]))


def test_mark_only_lora_as_trainable_refuses(model):
    match = more("bias", "'lora'", "'lora_only'")
    mark = fastlora.mark_only_lora_as_trainable
    refuses(model, ValueError, match, lambda: mark(model, bias="lora"))


def damaged(model, name, value):
    """The adapter of ``model``, one tensor in it replaced."""
    adapter = {key: t.clone() for key, t in fastlora.lora_state_dict(model).items()}
    adapter = {key: t + 1 for key, t in adapter.items()}
    if value is None:
        del adapter[name]
    else:
        adapter[name] = value
    return adapter


# factor of the last layer, its value, exception, message
DAMAGE = [
    ("second.lora_B", None, KeyError, "second.*lora_B"),
    ("second.lora_A", ones(3, 6), ValueError, "second.*lora_A.*\\(3, 6\\).*\\(2, 6\\)"),
    ("third.lora_A", ones(2, 6), KeyError, "third"),
]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("name", "value", "kind", "match"), DAMAGE)
@pytest.mark.parametrize("entry", ["load", "load file", "switch"])
def test_an_adapter_that_does_not_fit(model, merged, name, value, kind, match, entry, tmp_path):
    source = adapter = damaged(model, name, value)
    model.train(not merged)
    if entry == "load file":
        save_file(adapter, source := tmp_path / "adapter.safetensors")
    run = fastlora.switch if entry == "switch" else adapters.load
    refuses(model, kind, match, lambda: run(model, source))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("name", "value"), [damage[:2] for damage in DAMAGE[:2]])
def test_load_state_dict_leaves_a_layer_that_does_not_fit(model, merged, name, value):
    """torch.nn's own method loads the layers that fit, whatever else it has to report."""
    adapter = damaged(model, name, value)
    adapter = {key: t for key, t in adapter.items() if key.startswith("second")}
    model.train(not merged)
    load = model.load_state_dict
    refuses(model, RuntimeError, f"{name}: (is missing|got shape)", lambda: load(adapter))


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("entry", ["load", "switch"])
def test_an_adapter_that_cannot_be_merged(model, entry, value):
    """In a merged model an adapter with NaN in its last layer is refused as a whole."""
    adapter = damaged(model, "second.lora_A", ones(2, 6) * value)
    model.eval()
    run = adapters.load if entry == "load" else fastlora.switch
    refuses(model, fastlora.MergeError, "NaN or Inf", lambda: run(model, adapter))
    pristine = model.state_dict()["first.weight"]
    model.train()
    assert torch.equal(model.first.weight, pristine)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("scaling", [NAN, INF])
def test_switch_refuses_a_scaling(model, scaling, merged):
    model.train(not merged)
    adapter = damaged(model, "second.lora_A", ones(2, 6))
    switch = fastlora.switch
    refuses(
        model, (ValueError, fastlora.MergeError), "scaling", lambda: switch(model, adapter, scaling)
    )


@pytest.mark.parametrize("value", [NAN, INF])
def test_merge_refuses_what_is_not_finite(model, value):
    model.second.lora_B.data[1, 1] = value
    error = fastlora.MergeError
    refuses(model, error, "NaN or Inf.*finite", model.second.merge)

    def merge_all():
        with fastlora.merged(model):
            raise AssertionError("merged")

    refuses(model, error, "NaN or Inf.*finite", merge_all)


def test_merge_refuses_a_scaling(model):
    model.second.scaling = NAN
    refuses(model, fastlora.MergeError, more("scaling", "nan", "finite"), model.second.merge)


@pytest.mark.parametrize("merged", [False, True])
def test_merge_refuses_overflow(model, merged):
    """Beyond fp16's largest number; a merged model keeps the old update."""
    model.half()
    if merged:
        model.second.merge()
    huge = {name: torch.full_like(p, 300.0) for name, p in model.second.lora_parameters().items()}
    if merged:
        match = more("weight", "overflow", "float16")
        refuses(model, fastlora.MergeError, match, lambda: model.second.switch(huge))
    else:
        model.second.switch(huge)
        refuses(
            model, fastlora.MergeError, more("weight", "overflow", "float16"), model.second.merge
        )


def test_merge_refuses_a_shared_weight(model):
    model.head = nn.Linear(6, 5)
    model.head.weight = model.second.weight
    with pytest.warns(UserWarning, match="second.*head.weight"):
        fastlora.mark_only_lora_as_trainable(model, bias="lora_only")
    refuses(model, ValueError, more("merge", "shared", "untie"), model.second.merge)


def test_unmerge_refuses_an_edited_weight(model):
    model.second.merge()
    with torch.no_grad():
        model.second.weight[0, 0] += 1
    with pytest.raises(fastlora.MergeError, match=more("weight", "edited")):
        model.second.unmerge()
    assert model.second.merged


# ---- files


@pytest.fixture
def saved(model, tmp_path):
    """An adapter that differs from the model's, in a file."""
    path = tmp_path / "adapter.safetensors"
    adapters.save(model, path)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            parameter.add_(1)
    return path


def header(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path, head, body):
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def change_metadata(path, **changed):
    head, body = header(path)
    head["__metadata__"].update(changed)
    write(path, head, body)


def bad_offsets(path):
    head, body = header(path)
    head["first.lora_A"]["data_offsets"][1] += 4
    write(path, head, body)


FILES = {
    "empty": lambda p: p.write_bytes(b""),
    "cut in the header": lambda p: p.write_bytes(p.read_bytes()[:20]),
    "cut in the data": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "huge header": lambda p: p.write_bytes(b"\xff" * 8 + p.read_bytes()[8:]),
    "not json": lambda p: p.write_bytes(p.read_bytes()[:8] + b"#" + p.read_bytes()[9:]),
    "offsets that do not fit": bad_offsets,
    "a pickle": lambda p: torch.save({"a": ones(1)}, p),
    "text": lambda p: p.write_text("not an adapter"),
    "scaling is not json": lambda p: change_metadata(p, scaling="{"),
    "scaling is no mapping": lambda p: change_metadata(p, scaling="[1]"),
    "scaling is no number": lambda p: change_metadata(p, scaling='{"first": "x"}'),
}


@pytest.mark.parametrize("damage", FILES)
def test_a_damaged_file_is_refused(model, saved, damage):
    FILES[damage](saved)
    refuses(model, ValueError, re.escape(str(saved)), lambda: adapters.load(model, saved))


def test_the_file_before_it_is_damaged_loads(model, saved):
    adapters.load(model, saved)
    assert same(fastlora.lora_state_dict(model), load_file(saved))


def test_a_missing_file(model, tmp_path):
    path = tmp_path / "nowhere.safetensors"
    refuses(model, FileNotFoundError, str(path), lambda: adapters.load(model, path))


def test_an_adapter_of_another_scaling(model, saved):
    model.second.scaling = 0.25
    match = more("second", "scaling=1", "expected 0.25")
    refuses(model, ValueError, match, lambda: adapters.load(model, saved))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("entry", ["load", "load_state_dict"])
def test_a_checkpoint_that_was_saved_merged(model, entry, merged):
    """loralib's ``state_dict`` in eval mode, whose weights hold the update already."""
    checkpoint = {key: t.clone() for key, t in model.state_dict().items()}
    for name in ("first", "second"):
        checkpoint[f"{name}.weight"] += getattr(model, name).delta_weight()
    if merged:
        model.eval()
    match = "weight: already holds.*assume_merged=True"
    if entry == "load":
        refuses(model, ValueError, match, lambda: adapters.load(model, checkpoint))
    else:
        refuses(model, RuntimeError, match, lambda: model.load_state_dict(checkpoint))


def test_an_entry_that_no_checkpoint_has(model):
    model.register_buffer("mask", ones(2), persistent=False)
    adapter = damaged(model, "mask", ones(2))
    match = "mask: the model has no such parameter"
    refuses(model, KeyError, match, lambda: adapters.load(model, adapter))


def test_something_else_than_a_tensor(model):
    adapter = damaged(model, "second.lora_A", [1.0])
    match = "second.lora_A.*list.*Tensor"
    refuses(model, TypeError, match, lambda: adapters.load(model, adapter))


def test_save_refuses_and_leaves_no_file(model, net, tmp_path):
    path = tmp_path / "adapter.safetensors"
    for call, match in (
        (lambda: adapters.save(model, path, format="x"), more("format", "'x'", "'loralib'")),
        (lambda: adapters.save(model, path, bias="x"), more("bias", "'x'", "'all'")),
        (lambda: adapters.save(nn.Linear(2, 2), path), more("model", "no LoRA layer", "one")),
    ):
        refuses(model, ValueError, match, call)
    assert list(tmp_path.iterdir()) == []
