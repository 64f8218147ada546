"""The product with the frozen weight on a CPU: the extension's own, and torch's in its place."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastlora import testing
from fastlora.backends import native
from fastlora.blocks import Blocks

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason=f"native: {native.why_not()}")

BLOCKS = Blocks((150, 75, 75), (True, True, True))
PARTLY = Blocks((150, 75, 75), (True, False, True))


@pytest.fixture
def whose():
    """Sets whose products are used, until the test ends."""
    usual = native.build_info()["base_products"]
    yield native._C.set_base_products
    native._C.set_base_products(usual)


@pytest.fixture
def own(whose):
    whose("own")


@pytest.fixture(autouse=True)
def one_thread():
    """With more of them, products as small as these are torch's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2, 3, 4])
def threads(request, one_thread):
    torch.set_num_threads(request.param)
    return request.param


def integers(*shape):
    return torch.randint(-3, 4, shape, dtype=torch.float32)


def expand(X, W, bias, S, B):
    return torch.ops.fastlora.expand(X, W, bias, S, B, [W.shape[0]], [True], 1)


def both(whose, X, W, S, B):
    """The results of own products, and of torch's."""
    for name in ("own", "torch"):
        whose(name)
        yield expand(X, W, None, S, B)


def grad_input(dY, W, dS, A):
    return torch.ops.fastlora.grad_input(dY, W, dS, A, None)


@pytest.mark.parametrize(
    ("M", "K", "N", "r", "p", "bias", "blocks"),
    [
        (64, 128, 128, 8, 0.1, True, None),
        (65, 131, 300, 16, 0.1, False, BLOCKS),
        (200, 1100, 333, 3, 0.0, True, None),
        (127, 777, 300, 64, 0.5, True, PARTLY),
        (77, 3000, 130, 1, 0.0, False, None),
    ],
)
def test_no_less_accurate_than_the_composition(own, M, K, N, r, p, bias, blocks):
    testing.check_linear(M, K, N, r, p=p, bias=bias, blocks=blocks, backend="native")


@pytest.mark.parametrize("M", [64, 69, 83, 130])
@pytest.mark.parametrize(("K", "N"), [(128, 128), (256, 544), (257, 129), (521, 550)])
def test_exact_sums(own, M, K, N, threads):
    X, W, b, S, B, A = (
        *(integers(M, K), integers(N, K), integers(N), integers(M, 5)),
        *(integers(N, 5), integers(5, K)),
    )
    dY = integers(M, N)
    assert torch.equal(expand(X, W, b, S, B), X @ W.t() + b + S @ B.t())
    assert torch.equal(grad_input(dY, W, S, A), dY @ W + S @ A)


def strided(t):
    """The same numbers in other places: transposed, with gaps, and a row over and over."""
    gaps = torch.full((2 * t.shape[0], 3 * t.shape[1]), float("nan"))[::2, ::3]
    return [t.t().contiguous().t(), gaps.copy_(t), t[:1].expand_as(t)]


@pytest.mark.parametrize("view", range(3))
@pytest.mark.parametrize("which", ["X", "W"])
def test_any_strides(own, which, view):
    operands = {"X": integers(70, 200), "W": integers(170, 200)}
    operands[which] = strided(operands[which])[view]
    X, W = operands.values()
    S, B, A, dY = integers(70, 2), integers(170, 2), integers(2, 200), integers(70, 170)
    assert torch.equal(expand(X, W, None, S, B), X @ W.t() + S @ B.t())
    assert torch.equal(grad_input(dY, W, S, A), dY @ W + S @ A)


def test_the_number_of_threads_changes_no_bit(own, threads):
    torch.manual_seed(0)
    X, W, S, B = (torch.randn(*shape) for shape in ((150, 700), (550, 700), (150, 4), (550, 4)))
    Y = expand(X, W, None, S, B)
    torch.set_num_threads(1)
    assert torch.equal(Y, expand(X, W, None, S, B))


def test_blocks_that_are_not_adapted_are_the_plain_product(own):
    inputs = testing.make_inputs(200, 700, 300, 8, p=0.1, blocks=PARTLY, bias=True)
    y = testing.fused(inputs, "native")["y"]
    plain = F.linear(inputs.x, inputs.weight, inputs.bias)
    assert torch.equal(y[:, 150:225], plain[:, 150:225])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_row(own, value):
    X, W, S, B = torch.randn(70, 300), torch.rand(200, 300), torch.randn(70, 2), torch.randn(200, 2)
    X[17, 290] = value
    finite = expand(X, W, None, S, B).isfinite()
    assert not finite[17].any() and finite[torch.arange(70) != 17].all()


def test_torchs_precision_is_heeded(whose):
    """Where float32 may be multiplied in bfloat16, torch's product does as it sees fit."""
    X, W, S, B = (torch.randn(*shape) for shape in ((100, 300), (200, 300), (100, 2), (200, 2)))

    before = torch.backends.mkldnn.matmul.fp32_precision
    assert not torch.equal(*both(whose, X, W, S, B))
    try:
        for precision in ("bf16", "tf32"):
            torch.backends.mkldnn.matmul.fp32_precision = precision
            assert torch.equal(*both(whose, X, W, S, B))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize("sizes", [(63, 300, 200), (100, 127, 200), (100, 300, 127)])
def test_small_products_are_torchs(whose, sizes):
    torch.manual_seed(0)
    M, K, N = sizes
    X, W, S, B = (torch.randn(*shape) for shape in ((M, K), (N, K), (M, 2), (N, 2)))
    assert torch.equal(*both(whose, X, W, S, B))


def test_threads_with_few_columns_leave_it_to_torch(whose):
    X, W, S, B = (torch.randn(*shape) for shape in ((100, 300), (500, 300), (100, 2), (500, 2)))

    torch.set_num_threads(3)
    assert not torch.equal(*both(whose, X, W, S, B))
    torch.set_num_threads(4)
    assert torch.equal(*both(whose, X, W, S, B))


# ---- the choice

SCRIPT = "from fastlora.backends import native; print(native.build_info()['base_products'])"


def chosen(**variables):
    rest = {name: v for name, v in os.environ.items() if name != "FASTLORA_BASE_PRODUCTS"}
    env = {**rest, **variables}
    return subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the vendor is read from there")
def test_own_where_they_are_known_to_be_faster():
    amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    wide = native.build_info()["instruction_set"] == "avx512"
    assert chosen().stdout.strip() == ("own" if amd and wide else "torch")
    if platform.machine() == "x86_64":
        assert chosen(ATEN_CPU_CAPABILITY="avx2").stdout.strip() == "torch"


@pytest.mark.parametrize("name", ["own", "torch"])
def test_the_user_chooses(name):
    assert chosen(FASTLORA_BASE_PRODUCTS=name).stdout.strip() == name


def test_another_choice_is_refused():
    result = chosen(FASTLORA_BASE_PRODUCTS="mine")
    assert result.returncode and "got 'mine', expected 'own' or 'torch'" in result.stderr


def test_the_path_says_so(whose):
    whose("own")
    assert "own base products in float32" in native.description()
    whose("torch")
    assert "base products" not in native.description()
