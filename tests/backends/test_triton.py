"""The Triton backend in the interpreter: what the tests of every backend ask, at fewer shapes."""

import pytest
import torch

import fastlora
from fastlora import dropout, testing
from fastlora.backends import triton
from fastlora.blocks import Blocks

from .test_numerics import plain_product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(bool(triton.why_not()), reason=f"triton: {triton.why_not()}"),
    *[pytest.mark.gpu] * (DEVICE == "cuda"),
]

DTYPES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "bf16 under fp32": (torch.bfloat16, torch.float32),
    "fp16 under fp32": (torch.float16, torch.float32),
}
THIRDS = Blocks((28, 28, 28), (True, False, True))
UNEVEN = Blocks((60, 30, 15), (True, True, True))
BY_HEAD = Blocks((48, 24, 24), (True, False, True), 3)
# M, K, N, r, p, bias, blocks
CASES = [
    (63, 90, 84, 3, 0.5, True, THIRDS),
    (50, 75, 105, 16, 0.1, False, UNEVEN),
    (40, 33, 96, 8, 0.1, True, BY_HEAD),
    (70, 64, 50, 65, 0.0, True, None),
    (45, 56, 48, 33, 0.1, True, None),
    (34, 48, 44, 64, 0.5, False, None),
    (33, 40, 36, 1, 1.0, False, None),
]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[:5])))
def test_no_less_accurate_than_the_composition(case, dtypes):
    M, K, N, r, p, bias, blocks = case
    dtype, factor_dtype = DTYPES[dtypes]
    inputs = testing.make_inputs(
        *(M, K, N, r),
        p=p,
        bias=bias,
        blocks=blocks,
        dtype=dtype,
        factor_dtype=factor_dtype,
        device=DEVICE,
    )
    got = testing.fused(inputs, "triton")
    testing.assert_no_worse(got, testing.composition(inputs), testing.truth(inputs))
    again = testing.fused(inputs, "triton")
    assert all(torch.equal(again[name], t) for name, t in got.items()), "two runs differ"
    if blocks is THIRDS:
        plain = plain_product(inputs)
        assert torch.equal(got["y"][:, 28:56], plain[:, 28:56])


@pytest.mark.parametrize("M", [0, 1, 17])
@pytest.mark.parametrize("strides", ["transposed", "every other", "expanded"])
def test_any_rows_and_strides(strides, M):
    def strided(m, n):
        # small integers, so that every sum is exact
        t = torch.randint(-2, 3, (m, 2 * n), device=DEVICE).float()
        if strides == "transposed":
            return t[:, :n].t().contiguous().t()
        return t[:, ::2] if strides == "every other" else t[:, :1].expand(m, n)

    x, W, A, B = (strided(*shape) for shape in ((M, 40), (24, 40), (3, 40), (24, 3)))
    leaves = [t.requires_grad_() for t in (x, A, B)]
    seed = torch.tensor([5], device=DEVICE)
    results = {}
    for backend in ("triton", "reference"):
        y = fastlora.functional.lora_linear(
            x, W, A, B, scaling=0.5, p=0.5, seed=seed, backend=backend
        )
        results[backend] = (y, *torch.autograd.grad(y.sum(), leaves))
    for got, expected in zip(*results.values(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("t", [1, 6554, 32768, 65535, 65536])
@pytest.mark.parametrize("K", [1, 31, 32, 77])
def test_the_mask_is_that_of_every_backend(K, t):
    seed = torch.tensor([-(2**62) + 12345], device=DEVICE)
    X = torch.ones(19, K, device=DEVICE)
    _, mask = triton.shrink(X, torch.ones(1, K, device=DEVICE), 1.0, t, seed)
    assert torch.equal(mask, dropout.draw_mask(seed, 19, K, t))


def test_offsets_beyond_32_bits():
    """Rows so far apart that a 32-bit offset would wrap; only the touched pages are there."""
    x = torch.empty(3 * 2**30 + 64, dtype=torch.bfloat16, device=DEVICE)
    x = x.as_strided((4, 64), (2**30, 1)).copy_(torch.randn(4, 64))
    A = torch.randn(2, 64, device=DEVICE).bfloat16()
    S, _ = triton.shrink(x, A, 1.0, 0, None)
    torch.testing.assert_close(S, x.float() @ A.float().t(), rtol=1e-3, atol=1e-3)


def test_the_fused_products_are_right():
    from fastlora.kernels.expand import expand_fused
    from fastlora.kernels.grad_input import grad_input_fused
    from fastlora.kernels.layout import Layout

    def integers(*shape):
        return torch.randint(-3, 4, shape, device=DEVICE).float()

    for M, K, N, r in [(35, 44, 52, 3), (20, 33, 40, 17)]:
        X, W, S, B = integers(M, K), integers(N, K), integers(M, r), integers(N, r)
        dS, A = integers(M, r), integers(r, K)
        dY, bias = integers(M, N), integers(N)
        Y = expand_fused(X, W, bias, S, B, Layout(((0, N, 0, 0),), N))
        assert torch.equal(Y, X @ W.t() + bias + S @ B.t())
        mask = dropout.draw_mask(torch.tensor([5], device=DEVICE), M, K, 16384)
        dX = grad_input_fused(dY, W, dS, A, mask)
        assert torch.equal(dX, dY @ W + dropout.keep(dS @ A, mask))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x", "grad", "lora_A", "lora_B"])
def test_what_is_not_finite_goes_where_the_reference_puts_it(name, value, dtypes):
    """As NaN or Inf: a split factor makes NaN of some Inf."""
    dtype, factor_dtype = DTYPES[dtypes]
    inputs = testing.make_inputs(
        *(20, 40, 24, 3), p=0.5, dtype=dtype, factor_dtype=factor_dtype, device=DEVICE
    )
    getattr(inputs, name)[2, 1] = value
    expected = testing.fused(inputs, "reference")
    for output, got in testing.fused(inputs, "triton").items():
        assert torch.equal(got.isfinite(), expected[output].isfinite()), output


@pytest.mark.parametrize("compiled", [True, False])
def test_kernels_get_tensors_of_one_device(compiled, monkeypatch):
    """A number under torch.compile is a tensor on the CPU, which a GPU's kernel cannot read."""
    from fastlora.kernels import configs, launch

    X, W, A, B = (torch.empty(s, device="meta") for s in ((5, 12), (8, 12), (2, 12), (8, 2)))
    seed, layout = torch.empty(1, dtype=torch.int64, device="meta"), ([8], [True], 1)
    monkeypatch.setattr(configs, "architecture", lambda device: launch.INTERPRETER)
    launched = []

    def check(kernel, grid, device, args, meta):
        assert {t.device for t in args if isinstance(t, torch.Tensor)} == {X.device} == {device}
        launched.append([c for c in args if isinstance(c, float)])

    monkeypatch.setattr(launch, "_start", check)
    scale = torch.full((), 0.5, dtype=torch.float64, device="cpu" if compiled else "meta")
    Y, S, mask = triton._forward(X, W, None, A, B, 3.0, scale, 6554, seed, *layout)
    triton._backward(Y, X, W, A, B, S, mask, 3.0, scale, *layout, True, True, True)
    triton._delta(A, B, 3.0, scale, *layout)
    factors = [c for found in launched for c in found if c != 1.0]
    assert factors == [1.5 if compiled else 3.0] * 3


def test_float64_is_refused_by_name():
    x = torch.zeros(2, 4, dtype=torch.float64, device=DEVICE)
    W, A, B = (torch.zeros(s, dtype=torch.float64, device=DEVICE) for s in ((3, 4), (1, 4), (3, 1)))
    with pytest.raises(ValueError, match="'triton' has no kernels for"):
        fastlora.functional.lora_linear(x, W, A, B, scaling=1.0, backend="triton")


def test_operators_pass_opcheck():
    X, W, A, B = (torch.randn(s, device=DEVICE) for s in ((5, 12), (8, 12), (2, 12), (8, 2)))
    seed, layout = torch.tensor([3], device=DEVICE), ([8], [True], 1)
    ops = torch.ops.fastlora_triton
    arguments = (X, W, None, A, B, 1.0, None, 6554, seed, *layout)
    torch.library.opcheck(ops.forward.default, arguments)
    Y, S, mask = ops.forward(*arguments)
    backward = (Y, X, W, A, B, S, mask, 1.0, None, *layout, True, True, True)
    torch.library.opcheck(ops.backward.default, backward)
