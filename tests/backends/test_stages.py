"""Every stage of every backend against its formula.

Operands are small integers and c a power of two, so that every sum is exact in any order and each
comparison is for equality.
"""

import pytest
import torch

from fastlora import dropout
from fastlora.backends import native, reference, triton
from fastlora.blocks import Blocks

# the last of them takes more than one tile of rows, of columns and of the ranks
SIZES = [(0, 5, 12), (1, 1, 12), (17, 40, 48), (45, 136, 156)]
THRESHOLDS = [dropout.threshold(p) for p in (0.0, 0.1, 0.5, 1.0)]
RANKS = [1, 8, 65]
C = 0.5

# splits in twelfths of N, adapted or not, interleave
LAYOUTS = {
    "single": ((12,), (True,), 1),
    "q_v": ((4, 4, 4), (True, False, True), 1),
    "uneven": ((8, 2, 2), (True, True, True), 1),
    "by head": ((6, 3, 3), (True, False, True), 3),
    "all by head": ((4, 4, 4), (True, True, True), 2),
    "none": ((6, 6), (False, False), 1),
}

# the reference one row at a time, a few, and all; and the widest dtype of each
PATHS = {
    "reference-1": (reference, 1, torch.float64),
    "reference-100": (reference, 100, torch.float64),
    "reference-all": (reference, 1 << 18, torch.float64),
    "native": (native, None, torch.float64),
    "triton": (triton, None, torch.float32),
}
ON_GPU = ["triton"] * torch.cuda.is_available()


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.gpu] * (name in ON_GPU)) for name in PATHS]
)
def stages(request, monkeypatch):
    module, block_elements, dtype = PATHS[request.param]
    if reason := module.why_not():
        pytest.skip(f"{module.name}: {reason}")
    # of what is drawn without a dtype
    monkeypatch.setitem(WIDEST, "dtype", dtype)
    if block_elements:
        monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", block_elements)
    with torch.device("cuda" if request.param in ON_GPU else "cpu"):
        yield module


WIDEST = {"dtype": torch.float64}


def integers(*shape, dtype=None):
    generator = torch.Generator().manual_seed(sum(shape))
    drawn = torch.randint(-4, 5, shape, generator=generator, device="cpu")
    return drawn.to(torch.get_default_device(), dtype or WIDEST["dtype"])


def layout(name, N):
    """The layout at N features, and the features of each adapted block counted out one by one."""
    twelfths, enabled, interleave = LAYOUTS[name]
    splits = tuple(n * N // 12 for n in twelfths)
    owner = [
        i for _ in range(interleave) for i, n in enumerate(splits) for _ in range(n // interleave)
    ]
    features = [
        torch.tensor([j for j, o in enumerate(owner) if o == i])
        for i, on in enumerate(enabled)
        if on
    ]
    return Blocks(splits, enabled, interleave), features


def rows_of(features):
    """The rows of B of each adapted block: they follow each other."""
    first = 0
    for block in features:
        yield slice(first, first + len(block))
        first += len(block)


def dense(A, B, features, N, r):
    """``B_g A_g`` on the features of each block, zero elsewhere."""
    whole = A.new_zeros(N, A.shape[1])
    for g, (block, rows) in enumerate(zip(features, rows_of(features), strict=True)):
        whole[block] = B[rows] @ A[g * r : (g + 1) * r]
    return whole


def kept(mask, X):
    return X if mask is None else X * dropout.unpack_mask(mask, X.shape[1])


def drawn(M, K, t):
    return dropout.draw_mask(torch.tensor([5]), M, K, t) if t else None


@pytest.mark.parametrize("t", THRESHOLDS)
@pytest.mark.parametrize("R", [1, 16])
@pytest.mark.parametrize(("M", "K", "N"), SIZES)
def test_shrink(stages, M, K, N, R, t):
    X, A = integers(M, K), integers(R, K)
    S, mask = stages.shrink(X, A, C, t, torch.tensor([5]) if t else None)
    assert (mask is None) == (t == 0)
    if mask is not None:
        assert torch.equal(mask, drawn(M, K, t))
    assert torch.equal(S, C * kept(mask, X) @ A.t())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("M", "K", "N"), SIZES)
def test_expand(stages, M, K, N, name, r, bias):
    blocks, features = layout(name, N)
    X, W, S = integers(M, K), integers(N, K), integers(M, blocks.count * r)
    B = integers(blocks.adapted_features, r)
    b = integers(N) if bias else None
    expected = X @ W.t() + (b if bias else 0)
    for g, (block, rows) in enumerate(zip(features, rows_of(features), strict=True)):
        expected[:, block] += S[:, g * r : (g + 1) * r] @ B[rows].t()
    assert torch.equal(stages.expand(X, W, b, S, B, blocks), expected)


@pytest.mark.parametrize(("need_dS", "need_dB"), [(1, 1), (1, 0), (0, 1), (0, 0)])
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("M", "K", "N"), SIZES)
def test_grad_expand(stages, M, K, N, name, r, need_dS, need_dB):
    blocks, features = layout(name, N)
    dY, B = integers(M, N), integers(blocks.adapted_features, r)
    S = integers(M, blocks.count * r) if need_dB else None
    dS, dB = stages.grad_expand(dY, S, B, C, blocks, bool(need_dS), bool(need_dB))
    assert (dS is not None, dB is not None) == (bool(need_dS), bool(need_dB))
    for g, (block, rows) in enumerate(zip(features, rows_of(features), strict=True)):
        of_g = slice(g * r, (g + 1) * r)
        if need_dS:
            assert torch.equal(dS[:, of_g], C * dY[:, block] @ B[rows])
        if need_dB:
            assert torch.equal(dB[rows], dY[:, block].t() @ S[:, of_g])


@pytest.mark.parametrize("t", THRESHOLDS)
@pytest.mark.parametrize("R", [1, 16])
@pytest.mark.parametrize(("M", "K", "N"), SIZES)
def test_grad_shrink(stages, M, K, N, R, t):
    dS, X, A, mask = integers(M, R), integers(M, K), integers(R, K), drawn(M, K, t)
    assert torch.equal(stages.grad_shrink(dS, X, mask, A), dS.t() @ kept(mask, X))


@pytest.mark.parametrize("t", THRESHOLDS)
@pytest.mark.parametrize("R", [0, 1, 16])
@pytest.mark.parametrize(("M", "K", "N"), SIZES)
def test_grad_input(stages, M, K, N, R, t):
    """R = 0 stands for a layer without a gradient through its factors."""
    dY, W, A, mask = integers(M, N), integers(N, K), integers(R, K), drawn(M, K, t)
    dS = integers(M, R) if R else None
    through_factors = kept(mask, dS @ A) if R else 0
    got = stages.grad_input(dY, W, dS, A, mask)
    assert torch.equal(got, dY @ W + through_factors)


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_delta(stages, name, r):
    blocks, features = layout(name, 24)
    A, B = integers(blocks.count * r, 7), integers(blocks.adapted_features, r)
    assert torch.equal(stages.delta(A, B, C, blocks), C * dense(A, B, features, 24, r))


@pytest.mark.parametrize("c", [0.25, torch.tensor(0.25), torch.tensor([0.25])])
def test_c_is_a_number_or_a_tensor_of_one_element(stages, c):
    X, A, B, blocks = integers(4, 6), integers(2, 6), integers(5, 2), Blocks.single(5)
    assert torch.equal(stages.shrink(X, A, c, 0, None)[0], 0.25 * X @ A.t())
    dS, _ = stages.grad_expand(integers(4, 5), None, B, c, blocks, True, False)
    assert torch.equal(dS, 0.25 * integers(4, 5) @ B)
    assert torch.equal(stages.delta(A, B, c, blocks), 0.25 * B @ A)


@pytest.mark.parametrize("factor_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(stages, dtype, factor_dtype):
    """X's for Y and dX, the factors' own for dA, dB and ΔW, fp32 for S and dS: all exact here."""
    factor_dtype = factor_dtype or dtype
    X, W, dY = (integers(*s, dtype=dtype).sign() for s in ((4, 9), (6, 9), (4, 6)))
    A, B = (integers(*s, dtype=factor_dtype).sign() for s in ((2, 9), (6, 2)))
    wide = [t.double() for t in (X, W, dY, A, B)]
    blocks = Blocks.single(6)
    S, _ = stages.shrink(X, A, C, 0, None)
    dS, dB = stages.grad_expand(dY, S, B, C, blocks, True, True)
    results = {
        "Y": (stages.expand(X, W, None, S, B, blocks), dtype),
        "S": (S, torch.float32),
        "dS": (dS, torch.float32),
        "dB": (dB, factor_dtype),
        "dA": (stages.grad_shrink(dS, X, None, A), factor_dtype),
        "dX": (stages.grad_input(dY, W, dS, A, None), dtype),
        "delta": (stages.delta(A, B, C, blocks), factor_dtype),
    }
    X, W, dY, A, B = wide
    S, dS = C * X @ A.t(), C * dY @ B
    exact = {
        "Y": X @ W.t() + S @ B.t(),
        "S": S,
        "dS": dS,
        "dB": dY.t() @ S,
        "dA": dS.t() @ X,
        "dX": dY @ W + dS @ A,
        "delta": C * B @ A,
    }
    for name, (got, expected_dtype) in results.items():
        assert got.dtype == expected_dtype, name
        assert torch.equal(got, exact[name].to(expected_dtype)), name


@pytest.mark.parametrize("rows", [0, 1, 10, 1000])
@pytest.mark.parametrize("width", [0, 1, 99, 1 << 20])
def test_row_blocks_cover_every_row_once(rows, width):
    covered = [i for block in reference.row_blocks(rows, width) for i in range(rows)[block]]
    assert covered == list(range(rows))


@pytest.mark.parametrize("name", LAYOUTS)
def test_blocks_select_their_features(name):
    blocks, features = layout(name, 24)
    assert blocks.count == len(features)
    assert blocks.out_features == 24
    for g, (block, rows) in enumerate(zip(features, rows_of(features), strict=True)):
        assert torch.equal(blocks.output(torch.arange(24), g).flatten(), block)
        assert blocks.rows_of_B(g) == rows
