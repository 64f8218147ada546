"""The backend with fused products: what it makes of a call, and when it is not usable.

On the emulated device, where plain loops stand in for the products themselves.
"""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from fastlora import backends, testing
from fastlora.backends import cutlass, native
from fastlora.backends.operators import Operators
from fastlora.blocks import Blocks

from .test_native import (
    THIRDS,
    UNEVEN,
    WRONG_OTHERS,
    WRONG_SUMS,
    WRONG_TENSORS,
    assert_exact,
    built,
    each_pass_of_layers,
    of_layers,
    operands,
    run,
    signs,
    tensors,
)

BF16 = torch.bfloat16


@pytest.fixture
def fused(emulated, monkeypatch):
    """The backend, also by its name, for CPU tensors."""
    operators = Operators("fastlora_emulated_cutlass")
    backend = SimpleNamespace(
        **{stage: getattr(operators, stage) for stage in cutlass.STAGES},
        name="fused",
        dtypes=emulated.dtypes,
        why_not=lambda: None,
        description=lambda: "emulated",
    )
    monkeypatch.setitem(backends._BACKENDS, "fused", backend)
    monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, "fused"))
    return backend


# K, r, blocks: taken; not for the sizes; not for the blocks, in the forward pass
LAYERS = {
    "taken": (64, 5, Blocks.single(48)),
    "rank 100": (24, 100, Blocks.single(16)),
    "odd": (33, 5, Blocks.single(48)),
    "odd output": (64, 5, Blocks.single(45)),
    "by head, whole": (64, 5, Blocks((48,), (True,), 4)),
    "thirds": (64, 8, THIRDS),
    "uneven": (40, 3, UNEVEN),
    "no block": (40, 3, Blocks((16, 8), (False, False))),
}


@pytest.mark.parametrize("t", [0, 6554])
@pytest.mark.parametrize("M", [0, 1, 37])
@pytest.mark.parametrize("dtypes", ["bf16", "fp16", "bf16 under fp32", "fp16 under fp32", "fp32"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_stage(layer, dtypes, M, t, fused):
    K, r, blocks = LAYERS[layer]
    assert_exact(fused, operands(M, K, r, dtypes, blocks, signs(), bias=t > 0, t=t))


def large():
    """Draws integers whose sums are exact, and too large for 16 bits."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randint(-99, 100, shape, generator=generator)


@pytest.mark.parametrize("dtypes", ["bf16", "fp16", "bf16 under fp32"])
def test_a_fused_product_is_rounded_once(dtypes, fused, emulated):
    """Which tells it from one that is added to what was rounded: so it is known to be taken."""
    draw = large()
    i = operands(64, 16, 4, dtypes, Blocks.single(24), draw, t=6554)
    wide = i.map(lambda name, t: t.double())
    exact = run(backends.reference, wide)
    for name in ("Y", "dX"):
        expected = exact[name].to(i.X.dtype)
        assert torch.equal(run(fused, i)[name], expected)
        assert not torch.equal(run(emulated, i)[name], expected)
    # all of it is, where some of the output is not adapted or in the way of no vector
    for changed in (THIRDS, Blocks.single(20)):
        other = operands(64, 16, 4, dtypes, changed, draw)
        assert torch.equal(run(fused, other)["Y"], run(emulated, other)["Y"])


# M, N, K, which of Y and dX are fused on a device of one pair of multiprocessors: (M, N) and (M, K)
FILLING = [
    (256, 256, 16, {"Y"}),
    (240, 256, 16, {"Y"}),
    (224, 256, 16, set()),
    (256, 16, 256, {"dX"}),
    (256, 16, 224, set()),
    (256, 264, 256, {"dX"}),
]


@pytest.mark.parametrize(("M", "N", "K", "expected"), FILLING)
def test_passes_fuse_what_fills_the_device(M, N, K, expected, fused, emulated, monkeypatch):
    monkeypatch.setattr(emulated.multiprocessors, "value", 2)
    i = operands(M, K, 4, "bf16", Blocks.single(N), large())
    layer = (i.X, i.W, i.bias, i.A, i.B, i.c, i.t, None)

    def passes(backend):
        Y, S, _ = backend.forward(*layer, i.blocks)
        dX, _, _ = backend.backward(
            i.dY, i.X, i.W, i.A, i.B, S, None, i.c, i.blocks, True, True, True
        )
        (shared,), _, _ = backend.multi_forward(i.X, *([value] for value in layer[1:]))
        return {"Y": Y, "dX": dX, "shared Y": shared}

    apart, got = passes(emulated), passes(fused)
    differ = {name for name, t in got.items() if not torch.equal(t, apart[name])}
    assert differ == expected | ({"shared Y"} if "Y" in expected else set())
    # and single stages whatever they can
    for name, t in run(fused, i).items():
        assert torch.equal(t, run(emulated, i)[name]) == (name not in ("Y", "dX")), name


@pytest.mark.parametrize("blocks", [None, Blocks((16, 8, 16), (True, False, True))])
@pytest.mark.parametrize("factor_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_no_less_accurate_than_the_composition(p, dtype, factor_dtype, blocks, fused):
    """By the rule of ``fastlora.testing``, output and gradients."""
    options = {"p": p, "dtype": dtype, "factor_dtype": factor_dtype, "blocks": blocks}
    testing.check_linear(96, 64, 40, 8, backend="fused", **options)


@pytest.mark.parametrize("blocks", [Blocks.single(24), Blocks((8, 16), (False, True))])
def test_only_what_is_asked_for(blocks, fused):
    """Each gradient is what it is among all, and what another needs may be missing."""
    i = operands(5, 16, 3, "bf16", blocks, signs(), t=6554)

    def gradients(dX, dA, dB):
        X, W, A = i.X if dA else None, i.W if dX else None, i.A if dA or dX else None
        S = i.S if dB else None
        return fused.backward(i.dY, X, W, A, i.B, S, i.mask, i.c, i.blocks, dX, dA, dB)

    together = gradients(True, True, True)
    for needed in product((False, True), repeat=3):
        for need, alone, expected in zip(needed, gradients(*needed), together, strict=True):
            assert torch.equal(alone, expected) if need else alone is None


def test_layers_that_share_an_input(fused):
    """Outputs and gradients of factors bit for bit those of each layer alone."""
    layers = [
        operands(5, 16, r, "bf16", Blocks.single(N), signs(N), t=t)
        for N, r, t in ((24, 3, 6554), (20, 2, 0), (8, 9, 32768))
    ]
    X = layers[0].X
    lists = {name: [getattr(i, name) for i in layers] for name in ("W", "bias", "A", "B", "c", "t")}
    seeds = [i.seed for i in layers]
    Y, S, masks = fused.multi_forward(X, *lists.values(), seeds)
    dY, yes = [i.dY for i in layers], [True] * len(layers)
    W, A, B, c = (lists[name] for name in "WABc")
    dX, dA, dB = fused.multi_backward(dY, X, W, A, B, S, masks, c, True, yes, yes)
    total = torch.zeros_like(dX, dtype=torch.float64)
    for n, i in enumerate(layers):
        alone = fused.forward(X, i.W, i.bias, i.A, i.B, i.c, i.t, i.seed, i.blocks)
        got = (Y[n], S[n]) if masks[n] is None else (Y[n], S[n], masks[n])
        assert all(map(torch.equal, got, alone))
        options = (i.c, i.blocks, True, True, True)
        d_x, *factors = fused.backward(i.dY, X, i.W, i.A, i.B, S[n], masks[n], *options)
        assert all(map(torch.equal, (dA[n], dB[n]), factors))
        total += d_x
    assert torch.equal(dX.double(), total)


def arguments():
    i = operands(5, 16, 3, "bf16", Blocks.single(24), signs(), t=6554)
    flags = dict.fromkeys(("need_dX", "need_dA", "need_dB", "need_dS"), True)
    layout = {"splits": [24], "enabled": [True], "interleave": 1}
    numbers = {"c": 0.5, "scaling": 0.5, "scale": None, "t": 6554}
    return {**tensors(i), "mask": i.mask, "seed": i.seed, **numbers, **layout, **flags}


each_operator = pytest.mark.parametrize("name", ["forward", "backward", "expand", "grad_input"])


@each_operator
def test_opcheck(name, fused):
    operator = getattr(torch.ops.fastlora_emulated_cutlass, name).default
    given = arguments()
    torch.library.opcheck(operator, tuple(given[a.name] for a in operator._schema.arguments))


@each_operator
def test_operators_refuse_what_does_not_fit(name, fused):
    operator = getattr(torch.ops.fastlora_emulated_cutlass, name).default
    names = [argument.name for argument in operator._schema.arguments]
    accepted = []
    for changed in names:
        given = arguments()[changed]
        wrong = {repr(value): value for value in WRONG_OTHERS.get(changed, [])}
        if changed == "interleave":
            wrong.pop("4")  # which divides this layer's output
        if isinstance(given, torch.Tensor) and changed != "seed":
            kinds = WRONG_TENSORS | (WRONG_SUMS if changed in ("S", "dS", "mask") else {})
            wrong |= {kind: change(given) for kind, change in kinds.items()}
        for kind, value in wrong.items():
            values = arguments() | {changed: value}
            try:
                operator(*(values[argument] for argument in names))
            except (ValueError, TypeError, RuntimeError, IndexError):
                continue
            accepted.append((changed, kind))
    # more rows of X make as many of Y, and grad_input without dS is the base product
    right = {"forward": [("X", "taller")]}
    assert accepted == right.get(name, [])


@each_pass_of_layers
def test_operators_of_layers(name, fused):
    """Of a layer, and of one without factors."""
    _, given = of_layers(name, fused, "bf16")
    operator = getattr(torch.ops.fastlora_emulated_cutlass, name).default
    torch.library.opcheck(operator, tuple(given.values()))


# ---- usable or not


def test_it_says_why_it_is_not_usable(monkeypatch):
    def says(text):
        reason = cutlass.why_not()
        assert text in reason
        assert backends.available()["cutlass"] == backends.available("cuda")["cutlass"] == reason
        with pytest.raises(ValueError, match=r"^backend: 'cutlass' is not usable here: "):
            backends.select("cutlass", "cuda")

    monkeypatch.setattr(native, "_obstacle", "the C++ extension is not built")
    says("the C++ extension is not built")
    monkeypatch.setattr(native, "_obstacle", None)
    info = {"cutlass": False}
    extension = SimpleNamespace(build_info=lambda: info, cuda_obstacle=lambda: None)
    monkeypatch.setattr(native, "_C", extension, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    says("the extension is built without CUTLASS (FASTLORA_CUTLASS=1 pip install .)")
    info["cutlass"] = True
    says("there is no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(extension, "cuda_obstacle", lambda: "no driver")
    says("no driver")
    monkeypatch.setattr(extension, "cuda_obstacle", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    says("the current GPU is of compute capability 10.0, its kernels are for 9.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert cutlass.why_not() is None
    assert backends.select("cutlass", "cuda", BF16) is cutlass
    assert "no kernels for tensors on cpu" in backends.available("cpu")["cutlass"]
    with pytest.raises(ValueError, match=r"^backend: 'cutlass' has no kernels for torch.float64"):
        backends.select("cutlass", "cuda", torch.float64)


def test_auto_takes_it_only_where_it_was_measured():
    assert "not measured" in backends.passed_over("cutlass", "cuda")


@built
def test_its_operators_are_there_where_it_is_built():
    for name in cutlass.STAGES:
        there = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastlora_cutlass::{name}", "CUDA")
        assert there == native._C.build_info()["cutlass"], name
