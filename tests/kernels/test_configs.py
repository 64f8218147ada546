"""Tables of tiles, and where the blocks of a layer lie."""

import json
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from fastlora import backends  # noqa: E402
from fastlora.backends import triton as backend  # noqa: E402
from fastlora.blocks import Blocks  # noqa: E402
from fastlora.kernels import configs, expand, gemm  # noqa: E402
from fastlora.kernels.launch import launch  # noqa: E402
from fastlora.kernels.layout import Layout, slab  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] * (DEVICE == "cuda")
STAGES = ("shrink", "expand", "grad_expand", "grad_shrink", "grad_input", "delta")
FUSED = ("expand_fused", "grad_input_fused")
FACTORS = {"16": torch.bfloat16, "mixed": torch.float32, "32": torch.float32}


def operands(kind, r, K=64):
    dtype = torch.float32 if kind == "32" else torch.bfloat16
    return torch.empty(4, K, dtype=dtype), torch.empty(r, K, dtype=FACTORS[kind])


@pytest.mark.parametrize("architecture", configs.architectures())
@pytest.mark.parametrize("kind", FACTORS)
def test_every_stage_has_a_config_for_every_rank(architecture, kind, monkeypatch):
    monkeypatch.setattr(configs, "architecture", lambda device: architecture)
    # delta has one kernel for float32 factors, whatever they stand beside
    for stage in (*STAGES, *FUSED):
        if (stage, kind) == ("delta", "mixed"):
            continue
        for r in (1, 16, 17, 64, 65, 256):
            found = configs.config(stage, *operands(kind, r, K=512))
            assert found.ranks(r) in (16, 32, 64, 128)
            assert found.ranks(r) <= max(found.most_ranks, configs.LEAST_RANKS)
            # the mask is read by words of 32
            assert found.BLOCK_K % 32 == 0


def test_the_smallest_row_that_takes_the_rank_is_chosen(monkeypatch):
    row = {"BLOCK_M": 16, "BLOCK_N": 0, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}
    rows = [["shrink", "32", most, row | {"BLOCK_M": m}] for most, m in [(8, 16), (None, 64)]]
    text = json.dumps(
        {"origin": "here", "measured": False, "programs": 7, "rows": rows, "fused": []}
    )
    table = configs.Table.parse(text)
    monkeypatch.setattr(configs, "table", lambda architecture: table)
    sizes = [configs.config("shrink", *operands("32", r)).BLOCK_M for r in (1, 8, 9, 200)]
    assert sizes == [16, 16, 64, 64]
    assert table.rows["shrink"][0][2].programs == 7


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("sm_75", "sm_80"),
        ("sm_86", "sm_80"),
        ("sm_89", "sm_80"),
        ("sm_90", "sm_90"),
        ("sm_103", "sm_100"),
        ("sm_120", "sm_80"),
        ("gfx90a", "gfx942"),
        ("gfx950", "gfx942"),
        ("gfx1100", "gfx942"),
    ],
)
def test_an_architecture_without_a_table_takes_one_of_its_family(architecture, expected):
    assert configs.table(architecture) == configs.table(expected)


@pytest.mark.filterwarnings("ignore:fastlora runs in plain PyTorch")
@pytest.mark.parametrize("measured", [True, False])
def test_auto_takes_triton_on_a_gpu_that_it_was_measured_on(measured, monkeypatch):
    table = replace(configs.table("sm_90"), measured=measured)
    monkeypatch.setattr(configs, "table", lambda architecture: table)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    for architecture, expected in (("sm_90", measured), ("sm_86", False)):
        monkeypatch.setattr(backend, "_architecture", lambda name=architecture: name)
        chosen = "triton" if expected else "reference"
        assert backends.select("auto", "cuda", torch.bfloat16).name == chosen
        assert backends.select("auto", "cuda", torch.float64).name == "reference"
        reason = backends.passed_over("triton", "cuda")
        assert reason is None if expected else f"not measured on {architecture}" in reason
        # by name it always does
        assert backends.select("triton", "cuda", torch.bfloat16).name == "triton"


@pytest.mark.parametrize("defect", ["shape", "X", "W", None])
def test_a_fused_product_is_taken_only_as_it_was_measured(defect, monkeypatch):
    table = configs.table("interpreter")
    known = frozenset({("expand_fused", "32", 6, 8, 4, 2)})
    table = replace(table, fused=known)
    monkeypatch.setattr(configs, "table", lambda architecture: table)
    taken = []
    monkeypatch.setattr(expand, "expand_fused", lambda *operands: taken.append(True))
    X, W = torch.randn(6, 4), torch.randn(8, 4)
    if defect == "X":
        X = torch.randn(4, 6).t()
    if defect == "W":
        W = torch.randn(4, 8).t()
    if defect == "shape":
        X = X[:5]
    S, B = torch.randn(len(X), 2), torch.randn(8, 2)
    Y = expand.expand(X, W, None, S, B, Layout(((0, 8, 0, 0),), 8))
    assert bool(taken) == (defect is None)
    if defect:
        torch.testing.assert_close(Y, X @ W.t() + S @ B.t())


@pytest.mark.parametrize(
    "blocks",
    [
        Blocks((7, 5, 9), (True, True, True)),
        Blocks((16, 16, 16), (True, False, True)),
        Blocks((12, 6, 6), (True, False, True), 3),
        Blocks((4, 4, 4), (False, True, True), 4),
    ],
    ids=["uneven", "thirds", "by head", "interleaved"],
)
@pytest.mark.parametrize("block", [4, 16])
def test_slabs_cover_every_feature_once_each_on_one_block(blocks, block):
    layout = Layout(*blocks.pattern)
    N, programs = blocks.out_features, layout.slabs(block)
    expected = torch.full((3, N), -1, dtype=torch.int32)
    columns = torch.arange(N)
    for g in range(blocks.count):
        at, rows = blocks.output(columns, g).flatten(), blocks.rows_of_B(g)
        expected[0, at] = g
        expected[1, at] = torch.arange(rows.start, rows.stop, dtype=torch.int32)
    expected[2] = 1
    found = torch.full((3, N), -1, dtype=torch.int32, device=DEVICE)
    found[2] = 0
    launch(slab_kernel, (programs,), found.device, found, N, **layout.constants(), BLOCK=block)
    assert torch.equal(found.cpu(), expected)


@triton.jit
def slab_kernel(
    found,
    N,
    SPANS: tl.constexpr,
    PERIOD: tl.constexpr,
    REPEATS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column, row, inside, group, _ = slab(tl.program_id(0), SPANS, PERIOD, REPEATS, ALIGNED, BLOCK)
    tl.store(found + column, tl.zeros_like(column) + group, inside)
    tl.store(found + N + column, tl.where(group >= 0, row, -1), inside)
    tl.atomic_add(found + 2 * N + column, tl.full((BLOCK,), 1, tl.int32), inside)


@pytest.mark.parametrize(("tiles_m", "tiles_n"), [(1, 1), (11, 3), (8, 5), (3, 9)])
def test_every_tile_is_computed_once(tiles_m, tiles_n):
    found = torch.zeros(2, tiles_m * tiles_n, dtype=torch.int32, device=DEVICE)
    launch(place_kernel, (tiles_m * tiles_n,), found.device, found, tiles_m, tiles_n)
    order = list(zip(*found.tolist(), strict=True))
    assert sorted(order) == [(m, n) for m in range(tiles_m) for n in range(tiles_n)]
    # rows that share the columns of W come one after the other
    height = min(tiles_m, gemm.GROUP.value)
    assert [n for _, n in order[:height]] == [0] * height


@triton.jit
def place_kernel(found, tiles_m, tiles_n):
    tile = tl.program_id(0)
    m, n = gemm.place(tile, tiles_m, tiles_n)
    tl.store(found + tile, m)
    tl.store(found + tiles_m * tiles_n + tile, n)
