"""Products of tiles: the arithmetic that each pair of dtypes gets."""

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from fastlora.kernels import products  # noqa: E402
from fastlora.kernels.launch import launch  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] * (DEVICE == "cuda")
NARROW = [torch.bfloat16, torch.float16]

# each in a process of its own: what was set before changes how it reads
SETTINGS = {
    "pass": "ieee",
    "torch.set_float32_matmul_precision('highest')": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.set_float32_matmul_precision('medium')": "tf32",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    "torch.backends.cuda.matmul.allow_tf32 = False": "ieee",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    "torch.set_float32_matmul_precision('high'); "
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
}
SCRIPT = """
import os, sys, torch
from fastlora.kernels.products import base_precision
for setting in sys.argv[1:]:
    if os.fork() == 0:
        exec(setting)
        print(base_precision(), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_float32_is_multiplied_as_pytorch_is_set():
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *SETTINGS], capture_output=True, text=True
    )
    found = result.stdout.split()
    assert dict(zip(SETTINGS, found, strict=True)) == SETTINGS, result.stderr


@triton.jit
def dot_kernel(A, B, C, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(A + m[:, None] * K + k[None, :]), tl.load(B + k[:, None] * N + n[None, :])
    acc = products.dot(a, b, tl.zeros((M, N), tl.float32), PRECISION)
    tl.store(C + m[:, None] * N + n[None, :], acc)


def dot(A, B, precision):
    A, B = A.to(DEVICE), B.to(DEVICE)
    C = A.new_empty(A.shape[0], B.shape[1], dtype=torch.float32)
    launch(dot_kernel, (1,), C.device, A, B, C, *C.shape, A.shape[1], PRECISION=precision)
    return C.cpu()


@pytest.mark.parametrize("dtype", NARROW)
def test_a_wide_factor_keeps_its_bits(dtype):
    """One element times one, so that nothing is rounded but the factor."""
    torch.manual_seed(0)
    wide = torch.randn(16, 16) * torch.logspace(-4, 4, 16)
    exact = dot(torch.eye(16).to(dtype), wide, products.precision(dtype, torch.float32))
    error = ((exact - wide) / wide).abs()
    assert error.max() <= (0 if dtype == torch.bfloat16 else 2**-23)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_split_operand_keeps_twice_the_bits(side, dtype):
    torch.manual_seed(0)
    wide, eye = torch.rand(16, 16) + 0.5, torch.eye(16).to(dtype)
    found = dot(wide, eye, "split") if side == "left" else dot(eye, wide, "split")
    assert ((found - wide) / wide).abs().max() <= torch.finfo(dtype).eps ** 2 / 4


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("value", [1e5, -3e38, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("factor_dtype", ["16", "32"])
def test_what_is_too_large_is_not_nan(factor_dtype, value, dtype):
    factors = {"16": dtype, "32": torch.float32}[factor_dtype]
    wide = torch.full((16, 16), value)
    found = dot(torch.ones(16, 16).to(dtype), wide, products.precision(dtype, factors))
    expected = wide * 16
    limit = torch.finfo(dtype).max
    if factor_dtype == "16" and abs(value) > limit:
        expected = wide.sign() * float("inf")
    torch.testing.assert_close(found, expected, rtol=2**-15, atol=0, equal_nan=True)
