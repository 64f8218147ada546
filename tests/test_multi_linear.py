"""Layers that share an input: what each gives alone, from one call in each direction."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import backends, testing
from fastlora.backends import native
from fastlora.functional import lora_linear, multi_lora_linear

each_backend = pytest.mark.usefixtures("backend")
in_float64 = pytest.mark.parametrize("backend_name", ["reference", "native"], indirect=True)
needs_native = pytest.mark.skipif(bool(native.why_not()), reason=f"native: {native.why_not()}")

# of x, of the factors
DTYPES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "bf16 under fp32": (torch.bfloat16, torch.float32),
    "fp16 under fp32": (torch.float16, torch.float32),
    "fp64": (torch.float64, None),
}
# out_features, rank (0: no factors), p and bias of each layer
LAYERS = [(40, 8, 0.5, True), (24, 3, 0.0, False), (16, 0, 0.3, True), (33, 16, 0.1, False)]


class Layers:
    """Operands of layers that share ``x``, and the two ways to run them."""

    def __init__(self, M=12, K=40, layers=LAYERS, dtype=torch.float32, factor_dtype=None):
        options = {"dtype": dtype, "factor_dtype": factor_dtype}
        self.inputs = [
            testing.make_inputs(
                M, K, N, r or 1, p=p, bias=bias, scaling=2.0 - i / 8, seed=i, **options
            )
            for i, (N, r, p, bias) in enumerate(layers)
        ]
        self.x = self.inputs[0].x
        self.ranks = [r for _, r, _, _ in layers]
        adapted = list(zip(self.inputs, self.ranks, strict=True))
        self.operands = {
            "weights": [i.weight for i in self.inputs],
            "lora_A": [i.lora_A if r else None for i, r in adapted],
            "lora_B": [i.lora_B if r else None for i, r in adapted],
            "bias": [i.bias for i in self.inputs],
        }
        self.options = {
            "scaling": [i.scaling for i in self.inputs],
            "p": [p for _, _, p, _ in layers],
            "seeds": [i.seed for i in self.inputs],
        }

    def together(self, x, **changed):
        return multi_lora_linear(x, **{**self.operands, **self.options, **changed})

    def apart(self, x):
        """By a call for each layer."""
        lists = (*self.operands.values(), *self.options.values())
        return tuple(
            F.linear(x, W, b)
            if A is None
            else lora_linear(x, W, A, B, bias=b, scaling=scaling, p=p, seed=seed)
            for W, A, B, b, scaling, p, seed in zip(*lists, strict=True)
        )

    @property
    def leaves(self):
        return {
            f"{name}[{i}]": t
            for name, of in self.operands.items()
            for i, t in enumerate(of)
            if t is not None and name != "weights"
        }

    def run(self, call, used=None):
        """Outputs and gradients of ``call``, of the outputs ``used``."""
        x = self.x.detach().requires_grad_()
        leaves = {"x": x, **{name: t.requires_grad_() for name, t in self.leaves.items()}}
        Y = call(x)
        used = range(len(Y)) if used is None else used
        grads = torch.autograd.grad(
            [Y[i] for i in used],
            list(leaves.values()),
            [self.inputs[i].grad.view_as(Y[i]) for i in used],
            allow_unused=True,
        )
        outputs = {f"y[{i}]": y.detach() for i, y in enumerate(Y)}
        return outputs | {f"d_{name}": g for name, g in zip(leaves, grads, strict=True)}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, t in expected.items():
        assert (got[name] is None) == (t is None), name
        assert t is None or torch.equal(got[name], t), name


def of_integers(t):
    """Sums of these are exact in any order."""
    return None if t is None else t.mul(3).round().clamp(-1, 1)


def integer_layers(**options):
    layers = Layers(**options)
    layers.x = of_integers(layers.x)
    layers.inputs = [replace(i, grad=of_integers(i.grad)) for i in layers.inputs]
    layers.operands = {name: [*map(of_integers, of)] for name, of in layers.operands.items()}
    # 0.1 has no exact 1 / (1 - p)
    layers.options["p"] = [0.75 if p == 0.1 else min(p, 0.5) for p in layers.options["p"]]
    return layers


# ---- right


@pytest.mark.parametrize("dtypes", DTYPES)
def test_each_layer_is_what_it_is_alone(dtypes, backend):
    """Bit for bit, but for the gradient of x, which is as accurate as that of the composition."""
    dtype, factor_dtype = DTYPES[dtypes]
    if dtype not in (backends.select().dtypes or {}).get("cpu", [dtype]):
        pytest.skip(f"no kernels for {dtype}")
    layers = Layers(M=20, K=52, dtype=dtype, factor_dtype=factor_dtype)
    got, expected = layers.run(layers.together), layers.run(layers.apart)
    assert got["d_x"].dtype == dtype
    d_x, _ = got.pop("d_x"), expected.pop("d_x")
    assert_same(got, expected)
    if dtype == torch.float64:
        # the rule's own truth; see test_gradcheck
        return
    plain, exact = [], []
    for inputs, rank in zip(layers.inputs, layers.ranks, strict=True):
        i = replace(inputs, x=layers.x, lora_B=inputs.lora_B if rank else inputs.lora_B * 0)
        plain.append(testing.composition(i)["d_x"])
        exact.append(testing.truth(i)["d_x"])
    testing.assert_no_worse({"d_x": d_x}, {"d_x": sum(plain)}, {"d_x": sum(exact)})


SHAPES = {
    "no rows": lambda x: x[:0],
    "one row": lambda x: x[:1],
    "three dimensions": lambda x: x.view(4, 3, -1),
    "transposed": lambda x: x.t().contiguous().t(),
    "slices": lambda x: x.repeat_interleave(2, -1)[:, ::2],
    "one vector": lambda x: x[0],
}


@each_backend
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_and_strides_of_x(shape):
    layers = integer_layers()
    layers.x = SHAPES[shape](layers.x)
    rows = layers.x.numel() // layers.x.shape[-1]
    layers.inputs = [replace(i, grad=i.grad[:rows]) for i in layers.inputs]
    got = layers.run(layers.together)
    assert_same(got, layers.run(layers.apart))
    assert not any(got[f"y[{i}]"]._is_view() for i in range(len(LAYERS)))


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_and_rows(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with fastlora.use_backend("native"):
            for M in (2, 64, 300):
                layers = Layers(M=M, K=130)
                got, expected = layers.run(layers.together), layers.run(layers.apart)
                torch.testing.assert_close(got.pop("d_x"), expected.pop("d_x"))
                assert_same(got, expected)
    finally:
        torch.set_num_threads(before)


@each_backend
@pytest.mark.parametrize("layer", LAYERS[:3], ids=str)
def test_one_layer(layer):
    layers = Layers(layers=[layer])
    assert_same(layers.run(layers.together), layers.run(layers.apart))


@each_backend
def test_no_layer_has_factors():
    layers = Layers(layers=[(8, 0, 0.5, True), (5, 0, 0.0, False)])
    got, expected = layers.run(layers.together), layers.run(layers.apart)
    torch.testing.assert_close(got.pop("d_x"), expected.pop("d_x"))
    assert_same(got, expected)


@each_backend
@in_float64
def test_gradcheck():
    layers = Layers(
        M=3,
        K=5,
        layers=[(4, 2, 0.5, True), (3, 0, 0.0, True), (6, 1, 0.0, False)],
        dtype=torch.float64,
    )
    weights = [W.requires_grad_() for W in layers.operands["weights"]]
    leaves = [layers.x.requires_grad_(), *weights]
    leaves += [t.requires_grad_() for t in layers.leaves.values()]
    assert torch.autograd.gradcheck(lambda x, *_: layers.together(x), leaves)


@each_backend
def test_options_of_all_or_of_each():
    layers = Layers(layers=[(8, 2, 0.5, True)] * 2)
    one = layers.together(layers.x, scaling=0.5, p=0.5)
    each = layers.together(layers.x, scaling=(torch.tensor(0.5), 0.5), p=[0.5, 0.5])
    assert all(map(torch.equal, one, each))
    off = layers.together(layers.x, p=0.5, training=False)
    assert all(map(torch.equal, off, layers.together(layers.x, p=0.0)))


@each_backend
def test_biases_of_factors():
    layers = integer_layers()
    extra = [torch.arange(len(W)).float() for W in layers.operands["weights"]]
    extra[2] = None
    got = layers.together(layers.x, lora_bias=extra)
    scalings = layers.options["scaling"]
    for y, plain, b, s in zip(got, layers.together(layers.x), extra, scalings, strict=True):
        assert torch.equal(y, plain if b is None else plain + s * b)


# ---- masks


@each_backend
def test_masks_are_drawn_in_the_order_of_the_layers():
    """As by calls one after the other: also past a layer that has its seed or needs none."""
    layers = Layers(layers=[(8, 2, p, False) for p in (0.5, 0.0, 0.3, 0.5)] + LAYERS)
    layers.options["seeds"] = [None, None, torch.tensor([3]), *[None] * 5]
    results = []
    for call in (layers.together, layers.apart):
        torch.manual_seed(5)
        results.append([*call(layers.x), torch.rand(1)])
    assert all(map(torch.equal, *results))


@each_backend
def test_each_layer_has_its_own_mask():
    layers = Layers(layers=[(8, 2, 0.5, False)] * 2)
    layers.operands = {name: [of[0]] * 2 for name, of in layers.operands.items()}
    first, second = layers.together(layers.x, scaling=2.0, seeds=None)
    assert not torch.equal(first, second)
    same, again = layers.together(layers.x, scaling=2.0, seeds=[torch.tensor([9])] * 2)
    assert torch.equal(same, again)


@each_backend
def test_a_call_that_is_refused_draws_no_seed():
    layers = Layers()
    layers.operands["weights"][-1] = torch.zeros(3, 4)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"weights\[3\]"):
        layers.together(layers.x, seeds=None)
    assert torch.equal(torch.get_rng_state(), before)


# ---- no more computed or saved than needed


@each_backend
@pytest.mark.parametrize("used", [[1], [0, 3], [2], [3, 2]], ids=str)
def test_outputs_that_are_not_used(used):
    layers = integer_layers()
    assert_same(layers.run(layers.together, used), layers.run(layers.apart, used))


class Recording:
    """A backend that keeps the arguments of its passes."""

    def __init__(self, backend):
        self.backend, self.calls = backend, {}

    def __getattr__(self, name):
        value = getattr(self.backend, name)
        if "forward" not in name and "backward" not in name:
            return value

        def recorded(*args):
            assert name not in self.calls
            self.calls[name] = args
            return value(*args)

        return recorded


def test_one_call_in_each_direction_of_what_is_used(backend, monkeypatch):
    recording = Recording(backends.select())
    monkeypatch.setitem(backends._BACKENDS, backend, recording)
    layers = Layers()
    layers.run(layers.together, [0, 3])
    assert list(recording.calls) == ["multi_forward", "multi_backward"]
    dY, _, W, A, B, S, mask, *_ = recording.calls["multi_backward"]
    assert all(len(of) == 2 for of in (dY, W, A, B, S, mask))


FROZEN = {
    "x": ["x"],
    "all factors": ["lora_A[0]", "lora_A[1]", "lora_A[3]", "lora_B[0]", "lora_B[1]", "lora_B[3]"],
    "one layer": ["lora_A[0]", "lora_B[0]"],
    "x and a factor": ["x", "lora_A[1]", "lora_B[3]"],
    "all but B": ["x", "lora_A[0]", "lora_A[1]", "lora_A[3]"],
}


@contextmanager
def saved():
    """The tensors that autograd saves within the block, each storage once."""
    tensors = {}

    def pack(t):
        tensors.setdefault((t.data_ptr(), tuple(t.shape)), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield tensors


@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_operands(frozen, backend, monkeypatch):
    """Nothing is computed or saved for them, and the other gradients are the same."""
    layers = integer_layers()
    whole = layers.run(layers.together)
    frozen = FROZEN[frozen]
    recording = Recording(backends.select())
    monkeypatch.setitem(backends._BACKENDS, backend, recording)
    leaves = {"x": layers.x.detach(), **layers.leaves}
    for name, t in leaves.items():
        t.requires_grad_(name not in frozen)
    with saved() as found:
        Y = layers.together(leaves["x"])
    torch.autograd.backward(Y, [i.grad for i in layers.inputs])
    for name, t in leaves.items():
        assert (t.grad is None) == (name in frozen), name
        assert t.grad is None or torch.equal(t.grad, whole[f"d_{name}"]), name

    x = "x" not in frozen
    need_A = [bool(r) and f"lora_A[{i}]" not in frozen for i, r in enumerate(layers.ranks)]
    need_B = [bool(r) and f"lora_B[{i}]" not in frozen for i, r in enumerate(layers.ranks)]
    *_, need_dX, need_dA, need_dB = recording.calls["multi_backward"]
    assert (need_dX, need_dA, need_dB) == (x, need_A, need_B)

    expected, (M, K) = Counter(), layers.x.shape
    expected["x"] = any(need_A)
    for i, r in enumerate(layers.ranks):
        expected[f"weight[{i}]"] = x
        if r:
            expected[f"lora_A[{i}]"] = x or need_A[i]
            expected[f"lora_B[{i}]"] = True
            expected[(M, r), torch.float32] += need_B[i]
            masked = layers.options["p"][i] > 0 and (x or need_A[i])
            expected[(M, 4 * -(-K // 32)), torch.uint8] += masked
    names = {t.data_ptr(): name for name, t in leaves.items()}
    names |= {W.data_ptr(): f"weight[{i}]" for i, W in enumerate(layers.operands["weights"])}
    described = Counter(
        names.get(t.data_ptr(), (tuple(t.shape), t.dtype)) for t in found.values() if t.numel()
    )
    assert described == Counter({name: int(n) for name, n in expected.items() if n})


@needs_native
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_one_buffer_for_the_gradient_of_x(p):
    """And but for it and the outputs nothing of even a byte for each element of x."""
    M, K, N = 256, 96, 80
    layers = Layers(M=M, K=K, layers=[(N, 4, p, True)] * 3, dtype=torch.bfloat16)
    layers.x.requires_grad_()
    grads = [i.grad for i in layers.inputs]
    with (
        fastlora.use_backend("native"),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        torch.autograd.backward(layers.together(layers.x), grads)
    allocated = Counter(event.self_cpu_memory_usage for event in profiled.events())
    assert allocated.pop(2 * M * N) == 3
    assert allocated.pop(2 * M * K) == 1
    assert 0 < max(allocated) < M * K


# ---- inside PyTorch's machinery


@each_backend
def test_second_derivatives_raise():
    layers = Layers()
    y = layers.together(layers.x.requires_grad_())
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(sum(t.sum() for t in y), layers.x, create_graph=True)


@each_backend
def test_sums_of_outputs():
    """Their gradients have strides of zero."""
    layers = integer_layers()
    layers.inputs = [replace(i, grad=torch.ones_like(i.grad)) for i in layers.inputs]
    expected = layers.run(layers.together)
    layers.inputs = [replace(i, grad=torch.ones(1, 1).expand_as(i.grad)) for i in layers.inputs]
    assert_same(layers.run(layers.together), expected)


def drawn(call):
    """``call`` with seeds drawn by it, always the same."""

    def seeded(x):
        torch.manual_seed(3)
        return call(x, seeds=None)

    return seeded


@each_backend
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    layers = Layers()

    def checkpointed(x, **options):
        return checkpoint(lambda x: layers.together(x, **options), x, use_reentrant=reentrant)

    expected = layers.run(drawn(layers.together))
    if reentrant:
        # it gives gradients to leaves alone, and by backward
        leaves = {"x": layers.x.requires_grad_(), **layers.leaves}
        torch.autograd.backward(drawn(checkpointed)(leaves["x"]), [i.grad for i in layers.inputs])
        assert_same(
            {f"d_{name}": t.grad for name, t in leaves.items()},
            {name: t for name, t in expected.items() if name.startswith("d_")},
        )
    else:
        assert_same(layers.run(drawn(checkpointed)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_a_cast_of_x_and_the_weights(dtype, backend):
    layers = Layers()

    def under_autocast(x):
        with torch.autocast("cpu", dtype):
            return layers.together(x)

    got = layers.run(under_autocast)
    assert all(got[f"y[{i}]"].dtype == dtype for i in range(len(LAYERS)))
    assert all(t.dtype == torch.float32 for name, t in got.items() if name.startswith("d_"))
    layers.x = layers.x.to(dtype)
    layers.operands["weights"] = [W.to(dtype) for W in layers.operands["weights"]]
    layers.operands["bias"] = [b if b is None else b.to(dtype) for b in layers.operands["bias"]]
    expected = layers.run(layers.together)
    for name, t in expected.items():
        assert torch.equal(got[name], t.float() if "d_" in name and t.dtype == dtype else t), name


QKV = [(8, 2, 0.5, True), (4, 0, 0.0, False), (4, 3, 0.3, True)]


@pytest.mark.parametrize("used", [None, [2]], ids=["all used", "one used"])
def test_compile(used, backend):
    """One graph, eager's bits, dropout and all."""
    if used and backend == "reference":
        pytest.skip("like the others, but slow to trace")
    torch._dynamo.reset()
    layers = Layers(layers=QKV)
    call = drawn(torch.compile(layers.together, backend="aot_eager", fullgraph=True))
    got, expected = layers.run(call, used), layers.run(drawn(layers.together), used)
    for name, t in expected.items():
        # of what is not used, a compiled function gives a gradient of zeros
        assert torch.equal(got[name], torch.zeros_like(got[name]) if t is None else t), name


@each_backend
@pytest.mark.parametrize("backend_name", ["reference"], indirect=True)
def test_compile_within_autocast():
    """The backward is traced under autocast, too, and computes as that of eager all the same."""
    torch._dynamo.reset()
    layers = Layers(layers=QKV)
    results = []
    for call in (torch.compile(layers.together, backend="aot_eager"), layers.together):

        def within_autocast(x, call=call):
            with torch.autocast("cpu", torch.bfloat16):
                return call(x)

        results.append(layers.run(within_autocast))
    assert_same(*results)


@each_backend
@pytest.mark.parametrize("backend_name", ["native"], indirect=True)
def test_compile_for_any_batch():
    torch._dynamo.reset()
    layers = Layers(layers=QKV[:2])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layers.together, backend=counter, fullgraph=True)
    x, inputs = layers.x, layers.inputs
    for rows in (5, 7, 12):
        layers.x, layers.inputs = x[:rows], [replace(i, grad=i.grad[:rows]) for i in inputs]
        assert_same(layers.run(compiled), layers.run(layers.together))
    assert counter.frame_count == 2, "for 5 rows, and for any number"


class Projections(torch.nn.Module):
    """q, k and v, of which k has no factors."""

    def __init__(self):
        super().__init__()
        self.layers = Layers(layers=QKV)

    def forward(self, x):
        return self.layers.together(x, seeds=None)


def test_export(backend):
    """With a batch of any size, as one call of the backend's operator where it has one."""
    module = Projections()
    batch = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(module, (torch.randn(5, 40),), dynamic_shapes=batch).module()
    for rows in (5, 2, 64):
        x, results = torch.randn(rows, 40), []
        for call in (program, module):
            torch.manual_seed(3)
            results.append(call(x))
        assert all(map(torch.equal, *results))
    operators = Counter(str(n.target) for n in program.graph.nodes if "fastlora" in str(n.target))
    expected = {
        "native": {"fastlora.multi_forward.default": 1},
        "emulated": {"fastlora_emulated.multi_forward.default": 1},
        "triton": {"fastlora_triton.forward.default": 2},
    }
    assert operators == expected.get(backend, {})
