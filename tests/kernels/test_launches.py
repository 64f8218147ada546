"""How kernels are launched, at shapes that the interpreter is too slow for."""

import random

import pytest
import torch

pytest.importorskip("triton")

from fastlora.kernels import configs, launch
from fastlora.kernels.grad_expand import grad_expand
from fastlora.kernels.grad_shrink import grad_shrink
from fastlora.kernels.layout import Layout
from fastlora.kernels.reduce import sum_parts
from fastlora.kernels.shrink import shrink

ARCHITECTURES = [a for a in configs.architectures() if a != launch.INTERPRETER]
BF16, FP32 = torch.bfloat16, torch.float32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] * (DEVICE == "cuda")


@pytest.fixture(params=ARCHITECTURES)
def launched(request, monkeypatch):
    """The launches of a test, of an architecture that need not be here: name, grid, args, meta."""
    found = []

    def note(kernel, grid, device, args, meta):
        found.append((kernel.__name__, grid, args, meta))

    monkeypatch.setattr(configs, "architecture", lambda device: request.param)
    monkeypatch.setattr(launch, "_start", note)
    return found


def empty(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("r", [16, 64])
@pytest.mark.parametrize("factor_dtype", [BF16, FP32])
def test_no_two_threads_draw_the_same_bits(r, factor_dtype, launched):
    """However few the rows are: a thread has a byte of its own, or more."""
    for M in (1, 2048, 4096, 8192, 65536):
        A = empty(r, 8192, dtype=factor_dtype)
        shrink(empty(M, 8192), A, 1.0, None, 6554, empty(1, dtype=torch.int64))
    for _, _, _, meta in launched:
        width = 64 if torch.version.hip else 32
        assert meta["BLOCK_M"] * meta["BLOCK_K"] // 8 >= width * meta["num_warps"], meta
    assert len(launched) == 5


@pytest.mark.parametrize("r", [16, 64, 256])
def test_tiles_of_ranks_are_neighbours(r, launched):
    M, K, layout = 4096, 1024, Layout(((0, 1024, 0, 0),), 1024)
    X, S = empty(M, K), empty(M, r, dtype=FP32)
    grad_expand(X, S, empty(1024, r), 1.0, None, layout, True, True)
    grad_shrink(S, X, None, empty(r, K))
    kernels = [(grid, meta) for name, grid, _, meta in launched if "sum" not in name]
    for grid, meta in kernels:
        assert grid[0] == -(-r // meta["BLOCK_R"])
    assert len(kernels) == 2


def test_sums_are_not_compiled_for_each_number_of_tokens(launched):
    """A variant is what is constant, and whether the sum can be read by whole vectors."""
    random.seed(0)
    layout = Layout(((0, 1024, 0, 0), (1024, 3072, 1024, 1)), 4096)
    for _ in range(100):
        M = random.randint(64, 16384)
        X, S = empty(M, 4096), empty(M, 32, dtype=FP32)
        grad_expand(X, S, empty(4096, 16), 1.0, None, layout, True, True)
        grad_shrink(S, X, None, empty(32, 4096))
    sums = [(args, meta) for name, _, args, meta in launched if "sum" in name]
    variants = {tuple(meta.items()) for _, meta in sums}
    # dS of two blocks, and the others
    assert len(sums) == 300 and len(variants) == 2
    assert all(meta["STEP"] == 16 for _, meta in sums)


@pytest.mark.parametrize("counts", [None, (1, 1, 1), (9, 2, 5), (1, 3, 3)])
@pytest.mark.parametrize("width", [1, 5, 16])
@pytest.mark.parametrize("m", [1, 7, 96])
def test_parts_are_added_in_their_order(m, width, counts):
    torch.manual_seed(0)
    P = 9 if counts is None else max(counts)
    parts = torch.randn(P, m, 3 * width, device=DEVICE) * 1e3
    expected = torch.zeros(m, 3 * width, device=DEVICE)
    for i in range(P):
        for g, count in enumerate(counts or (P, P, P)):
            if i < count:
                columns = slice(g * width, (g + 1) * width)
                expected[:, columns] += parts[i, :, columns]
    assert torch.equal(sum_parts(parts, FP32, 2.0, None, counts), expected * 2)
    scale = torch.full((), 0.5, device=DEVICE)
    assert torch.equal(sum_parts(parts, BF16, 2.0, scale, counts), expected.bfloat16())
