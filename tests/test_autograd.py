"""Gradients: right for every subset of inputs, no more computed or saved than needed."""

import inspect
import itertools
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora import backends, dropout, functional
from fastlora.backends import native, reference
from fastlora.blocks import Blocks
from fastlora.layers.conv import FACTORIZATIONS
from fastlora.testing import make_inputs

NAMES = ("x", "weight", "lora_A", "lora_B", "bias")
SUBSETS = list(itertools.product((False, True), repeat=len(NAMES)))
LAYOUTS = {
    "single": Blocks.single(6),
    "grouped": Blocks((4, 2, 2), (True, False, True), 2),
}


each_backend = pytest.mark.usefixtures("backend")
# where gradients are compared with differences, which needs float64
in_float64 = pytest.mark.parametrize("backend_name", ["reference", "native"], indirect=True)
needs_native = pytest.mark.skipif(bool(native.why_not()), reason=f"native: {native.why_not()}")


def ids(needs):
    return ",".join(name for name, need in zip(NAMES, needs, strict=True) if need) or "none"


def operands(M=3, K=5, blocks=LAYOUTS["single"], r=2, dtype=torch.float64, needs=(True,) * 5, **kw):
    """The five tensors by name, those of ``needs`` as leaves that want a gradient."""
    inputs = make_inputs(M, K, blocks.out_features, r, dtype=dtype, blocks=blocks, **kw)
    return {
        name: getattr(inputs, name).requires_grad_(need)
        for name, need in zip(NAMES, needs, strict=True)
    }


def call(tensors, p=0.0, blocks=LAYOUTS["single"], scaling=2.0):
    seed = torch.tensor([7])
    return functional.block_lora_linear(**tensors, scaling=scaling, blocks=blocks, p=p, seed=seed)


# ---- right


@each_backend
@in_float64
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("needs", SUBSETS, ids=ids)
def test_gradcheck(needs, layout, p):
    blocks = LAYOUTS[layout]
    tensors = operands(blocks=blocks, needs=needs)

    def function(*values):
        return call(dict(zip(NAMES, values, strict=True)), p, blocks)

    if any(needs):
        assert torch.autograd.gradcheck(function, tuple(tensors.values()))
    else:
        assert not function(*tensors.values()).requires_grad


@each_backend
@in_float64
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_of_lora_bias(layout):
    blocks = LAYOUTS[layout]
    lora_bias = torch.randn(blocks.adapted_features, dtype=torch.float64, requires_grad=True)
    tensors = operands(blocks=blocks)
    assert torch.autograd.gradcheck(
        lambda b: call({**tensors, "lora_bias": b}, 0.3, blocks), lora_bias
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("needs", SUBSETS[1:], ids=ids)
def test_gradients_are_those_of_the_reference(needs, layout, backend):
    """On small integers, where every sum is exact."""
    blocks = LAYOUTS[layout]
    tensors = operands(M=5, K=35, blocks=blocks, dtype=torch.float32, needs=needs)
    for t in tensors.values():
        t.data = t.mul(2).round()
    wanted = [t for t in tensors.values() if t.requires_grad]
    results = []
    for name in (backend, "reference"):
        with fastlora.use_backend(name):
            y = call(tensors, 0.5, blocks)
            results.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_backend
def test_a_gradient_does_not_depend_on_what_else_is_asked_for():
    whole = operands(M=9, K=33, dtype=torch.float32)
    call(whole, 0.3).sum().backward()
    for needs in SUBSETS[1:]:
        some = operands(M=9, K=33, dtype=torch.float32, needs=needs)
        call(some, 0.3).sum().backward()
        for name, need in zip(NAMES, needs, strict=True):
            assert (some[name].grad is not None) == need
            assert not need or torch.equal(some[name].grad, whole[name].grad)


@each_backend
@pytest.mark.parametrize("M", [0, 4])
@pytest.mark.parametrize("K", [5, 40])
def test_gradients_of_strided_operands(M, K):
    """Transposed, offset and expanded operands and output gradients against contiguous copies."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape):
        return torch.randint(-4, 5, shape, generator=generator).float()

    strided = {
        "x": integers(K + 3, 2 * M).t()[::2, 2 : K + 2],
        "weight": integers(K, 7).t()[1:],
        "lora_A": integers(1, K).expand(2, K),
        "lora_B": integers(6, 4)[:, ::2],
        "bias": integers(1).expand(6),
    }
    grads = {"expanded": integers(1, 1).expand(M, 6), "transposed": integers(6, M).t()}
    for grad in grads.values():
        results = []
        for values in (strided, {name: t.contiguous() for name, t in strided.items()}):
            leaves = {name: t.detach().requires_grad_() for name, t in values.items()}
            y = call(leaves, 0.5)
            y.backward(grad if values is strided else grad.contiguous())
            results.append([y, *(t.grad for t in leaves.values())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_backend
def test_sum_backward():
    """``y.sum()`` gives a gradient with strides of zero."""
    results = []
    for expanded in (True, False):
        tensors = operands(M=9, K=33, dtype=torch.float32)
        y = call(tensors, 0.1)
        y.sum().backward() if expanded else y.backward(torch.ones_like(y))
        results.append([t.grad for t in tensors.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_backend
def test_a_second_backward_gives_the_same():
    tensors = operands(M=9, K=33, dtype=torch.float32)
    y = call(tensors, 0.3)
    first = torch.autograd.grad(y.square().sum(), tensors.values(), retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), tensors.values())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_backend
def test_inputs_are_never_written():
    tensors = operands(M=9, K=33, dtype=torch.float32)
    grad, seed = torch.randn(9, 6), torch.tensor([7])
    everything = [*tensors.values(), grad, seed]
    before = [(t.detach().clone(), t._version) for t in everything]
    y = functional.lora_linear(**tensors, scaling=2.0, p=0.3, seed=seed)
    y.backward(grad)
    for t, (value, version) in zip(everything, before, strict=True):
        assert torch.equal(t, value)
        assert t._version == version


# ---- no more work than needed

STAGES = ("shrink", "expand", "grad_expand", "grad_shrink", "grad_input")


@pytest.mark.parametrize("needs", SUBSETS[1:], ids=ids)
def test_only_gradients_asked_for_are_computed(needs, monkeypatch):
    calls = Counter()

    def counted(name):
        stage = getattr(reference, name)
        options = list(inspect.signature(stage).parameters)

        def count(*args):
            calls[name] += 1
            given = zip(options, args, strict=True)
            calls.update(option for option, value in given if "need" in option and value)
            return stage(*args)

        return count

    for name in STAGES:
        monkeypatch.setattr(reference, name, counted(name))
    with fastlora.use_backend("reference"):
        y = call(operands(needs=needs), 0.3)
    assert calls == {"shrink": 1, "expand": 1}
    y.sum().backward()
    x, _, A, B, _ = needs
    expected = {"shrink": 1, "expand": 1, "grad_expand": x or A or B, "need_dS": x or A}
    expected |= {"need_dB": B, "grad_shrink": A, "grad_input": x}
    assert calls == Counter({name: int(n) for name, n in expected.items()})


class Operators(TorchDispatchMode):
    """Calls of the library's own operators, by name: arguments and results."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "fastlora":
            assert str(func) not in self.calls
            self.calls[str(func)] = args, result
        return result


@needs_native
@pytest.mark.parametrize("needs", SUBSETS[1:], ids=ids)
def test_the_operator_gets_and_gives_only_what_is_asked_for(needs):
    with Operators() as operators, fastlora.use_backend("native"):
        call(operands(needs=needs), 0.3).sum().backward()
    assert list(operators.calls) == ["fastlora.forward.default", "fastlora.backward.default"]
    (_, X, W, A, _, S, mask, *_, need_dX, need_dA, need_dB), results = operators.calls.popitem()[1]
    need_x, need_W, need_A, need_B, _ = needs
    assert (need_dX, need_dA, need_dB) == (need_x, need_A, need_B)
    assert [t.numel() > 0 for t in results] == [need_x, need_A, need_B]
    assert [t is not None for t in (X, W, A, S, mask)] == [
        need_A or need_W,
        need_x,
        need_x or need_A,
        need_B,
        need_x or need_A,
    ]


class Counting:
    """A backend that counts its calls."""

    def __init__(self, backend):
        self.backend, self.calls = backend, Counter()

    def __getattr__(self, name):
        value = getattr(self.backend, name)
        if not callable(value):
            return value

        def counted(*args):
            self.calls[name] += 1
            return value(*args)

        return counted


def test_a_layer_runs_on_the_backend_that_was_chosen(backend, monkeypatch):
    counting = Counting(backends.select())
    monkeypatch.setitem(backends._BACKENDS, backend, counting)
    layer = fastlora.Linear(5, 6, r=2)
    layer(torch.randn(3, 5)).sum().backward()
    assert counting.calls["forward"] == counting.calls["backward"] == 1


# ---- no more saved than needed


@contextmanager
def saved():
    """The tensors that autograd saves within the block, each storage once."""
    tensors = {}

    def pack(t):
        tensors.setdefault((t.data_ptr(), tuple(t.shape)), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield tensors


def describe(tensors, known):
    """Of each saved tensor the name of the operand whose memory it is, or its shape and dtype."""
    names = {t.data_ptr(): name for name, t in known.items() if t is not None}
    return Counter(names.get(t.data_ptr(), (tuple(t.shape), t.dtype)) for t in tensors.values())


@each_backend
@pytest.mark.parametrize("factor_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("needs", SUBSETS[1:], ids=ids)
def test_saved_for_backward(needs, p, dtype, factor_dtype):
    """X by alias, S, one bit per element of X and parameters, nothing else."""
    M, K, r = 4, 37, 3
    tensors = operands(M, K, r=r, dtype=dtype, factor_dtype=factor_dtype, needs=needs)
    with saved() as found:
        call(tensors, p)
    x, W, A, B, _ = needs
    expected = {
        "x": A or W,
        "weight": x,
        "lora_A": x or A,
        "lora_B": True,
        ((M, r), torch.float32): B,
        ((M, 4 * -(-K // 32)), torch.uint8): p > 0 and (x or A),
    }
    assert describe(found, tensors) == Counter({name: int(n) for name, n in expected.items()})


GROUPS = {"enable_lora": [True, False, True]}
KINDS = {
    "Linear": (fastlora.Linear, {}),
    "lora_bias": (fastlora.Linear, {"lora_bias": True}),
    "fan_in_fan_out": (fastlora.Linear, {"fan_in_fan_out": True}),
    "MergedLinear": (fastlora.MergedLinear, GROUPS),
    "MergedLinear fan_in_fan_out": (fastlora.MergedLinear, {**GROUPS, "fan_in_fan_out": True}),
}


def make_layer(kind, **options):
    layer, own = KINDS[kind]
    return layer(24, 36, r=4, lora_dropout=0.1, **own, **options)


@each_backend
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_save_nothing_of_the_weights_size(kind, autocast):
    """But the weight itself: under autocast the fp32 parameter, not a 16-bit copy."""
    layer = make_layer(kind)
    x = torch.randn(5, 24, requires_grad=True)
    with saved() as found, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    R = layer.lora_A.shape[0]
    expected = dict.fromkeys(("weight", "lora_A", "lora_B"), 1)
    expected |= {((5, R), torch.float32): 1, ((5, 4), torch.uint8): 1}
    expected |= {((5, 24), torch.bfloat16): 1} if autocast else {"x": 1}
    known = {"x": x, **dict(layer.named_parameters())}
    assert describe(found, known) == expected
    y.sum().backward()
    for parameter in (x, layer.lora_A, layer.lora_B):
        assert parameter.grad.dtype == torch.float32


@each_backend
@pytest.mark.parametrize("kind", [*KINDS, *FACTORIZATIONS, "embedding"])
def test_backward_may_be_called_inside_of_autocast(kind):
    """It gives the same bits there as outside, where it belongs."""
    if kind in KINDS:
        layer, x = make_layer(kind), torch.randn(33, 24, requires_grad=True)
    elif kind in FACTORIZATIONS:
        layer = fastlora.Conv2d(4, 6, 3, r=4, lora_dropout=0.1, factorization=kind)
        x = torch.randn(2, 4, 9, 9, requires_grad=True)
    else:
        layer, x = fastlora.Embedding(30, 24, r=4), torch.randint(30, (33,))
    for factor in layer.lora_parameters().values():
        torch.nn.init.normal_(factor)
    gradients = []
    for inside in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            wanted = [t for t in (x, *layer.parameters()) if t.requires_grad]
            gradients.append(torch.autograd.grad(y, wanted, torch.ones_like(y)))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_no_wide_copy_of_a_16_bit_input(p, backend, monkeypatch):
    """But for Y and dX nothing is allocated of even a byte for each element of x."""
    M, K, N, r = 256, 96, 80, 4
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 2048)
    blocks = Blocks.single(N)
    tensors = operands(M, K, blocks, r, torch.bfloat16, factor_dtype=torch.float32)
    tensors["weight"].requires_grad_(False)
    grad = torch.ones(M, N, dtype=torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call(tensors, p, blocks).backward(grad)
    allocated = Counter(event.self_cpu_memory_usage for event in profiled.events())
    Y, dX = 2 * M * N, 2 * M * K
    assert allocated.pop(Y) == allocated.pop(dX) == 1
    assert 0 < max(allocated) < M * K


# ---- what is not supported says so


def test_forward_mode_raises():
    tensors = operands()
    for name in ("x", "lora_A", "lora_B"):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
            dual = forward_ad.make_dual(tensors[name].detach(), torch.ones_like(tensors[name]))
            call({**tensors, name: dual})


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jacrev", "jacfwd", "vmap"])
def test_functorch_transforms_raise(transform):
    tensors = operands()
    x = tensors["x"].detach()

    def function(x):
        return call({**tensors, "x": x}).sum()

    with pytest.raises(RuntimeError, match="functorch"):
        if transform == "jvp":
            torch.func.jvp(function, (x,), (x,))
        elif transform == "vjp":
            torch.func.vjp(function, x)
        else:
            getattr(torch.func, transform)(function)(x)


def composition(tensors):
    delta = tensors["x"] @ tensors["lora_A"].t() @ tensors["lora_B"].t()
    return tensors["x"] @ tensors["weight"].t() + tensors["bias"] + 2.0 * delta


def by_backward(forward, tensors):
    (g,) = torch.autograd.grad(forward(tensors).square().sum(), tensors["x"], create_graph=True)
    g.square().sum().backward()
    return tensors["lora_A"].grad


def by_grad(forward, tensors):
    (g,) = torch.autograd.grad(forward(tensors).square().sum(), tensors["x"], create_graph=True)
    return torch.autograd.grad(g.square().sum(), tensors["lora_A"])[0]


def penalty(forward, tensors):
    """A gradient penalty beside the loss, whose own gradient does not require one."""
    y = forward(tensors).sum()
    (g,) = torch.autograd.grad(y, tensors["x"], create_graph=True)
    (y + g.square().sum()).backward()
    return tensors["lora_A"].grad


def hessian(forward, tensors):
    def loss(x):
        return forward({**tensors, "x": x}).square().sum()

    return torch.autograd.functional.hessian(loss, tensors["x"].detach())


@pytest.mark.parametrize("second_order", [by_backward, by_grad, penalty, hessian])
def test_double_backward_works_or_raises(second_order):
    expected = second_order(composition, operands())
    try:
        got = second_order(call, operands())
    except RuntimeError:
        return
    torch.testing.assert_close(got, expected)


# ---- what is saved is guarded


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B"])
def test_in_place_change_of_a_saved_tensor_raises(name):
    tensors = operands()
    y = call(tensors, 0.3)
    with torch.no_grad():
        tensors[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_merging_between_forward_and_backward_raises(kind):
    layer = make_layer(kind, init_lora_weights=False)
    y = layer(torch.randn(5, 24, requires_grad=True))
    layer.merge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each_backend
def test_the_mask_of_backward_is_that_of_forward():
    """Gradients reach exactly the elements of x that the packed mask keeps."""
    tensors = operands(M=6, K=45, dtype=torch.float32)
    tensors["weight"].data.zero_()
    call(tensors, 0.5).sum().backward()
    mask = dropout.draw_mask(torch.tensor([7]), 6, 45, 32768)
    assert torch.equal(tensors["x"].grad != 0, dropout.unpack_mask(mask, 45))
