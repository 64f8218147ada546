"""Kernels compiled for GPUs that are not here: what they ask of one.

Every row of every table, on the architectures that have one; ``python -m benchmarks.compile`` also
compiles them for those that take another's, and with ``--full`` every dtype, rank and shape.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
# of an SM: 32-bit registers, and shared memory with what each program's own KiB leaves of it
REGISTERS, SHARED = 65536, {"sm_90": 233_472, "sm_100": 233_472}
PIPELINED = ("shrink", "grad_expand", "grad_shrink")
STREAMING = (*PIPELINED, "expand", "grad_input", "delta")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request, tmp_path_factory):
    """An architecture, and its kernels by stage, dtype, rank and shape."""
    out = tmp_path_factory.mktemp("compiled") / "kernels.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile", "--jobs", "1"]
    result = subprocess.run(
        [*command, "--only", request.param + " ", "--out", str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    kernels = {}
    for case in json.loads(out.read_text()):
        where = (case["stage"], case["dtype"], case["r"], case["shape"])
        # the last one only adds up what the first has left
        kernels[where] = case["result"][0]
    return request.param, kernels


def test_every_row_compiles_and_fits(compiled):
    from benchmarks.compile import KINDS, SHARED_LIMIT, TENSOR_LIMIT
    from fastlora.kernels import configs

    architecture, kernels = compiled
    for stage, rows in configs.table(architecture).rows.items():
        for kind, most, best in rows:
            r = min(most or best.most_ranks, best.most_ranks)
            assert (stage, KINDS[kind], r, "even") in kernels
    for where, kernel in kernels.items():
        assert kernel["scratch"] == 0, where
        assert kernel["shared"] <= SHARED_LIMIT[architecture], where
        assert kernel["tensor"] <= TENSOR_LIMIT, where
        if architecture.startswith("sm"):
            threads = 32 * kernel["launch"]["num_warps"]
            assert kernel["registers"] * threads <= REGISTERS, where


@pytest.mark.skipif(
    tuple(map(int, version("triton").split(".")[:2])) < (3, 9),
    reason="tiles were chosen with Triton 3.9; with 3.6 one of sm_100 spills",
)
def test_nothing_spills(compiled):
    _, kernels = compiled
    assert [where for where, kernel in kernels.items() if kernel["local"]] == []


def test_products_of_16_bits_are_on_tensor_cores(compiled):
    architecture, kernels = compiled
    for (stage, dtype, *where), kernel in kernels.items():
        if dtype == "fp32" or stage == "merge":
            continue
        found = kernel["instructions"]
        assert any(found.get(op) for op in ("HMMA", "HGMMA", "UTCHMMA", "MFMA")), (stage, where)
        if architecture.startswith("sm") and stage in PIPELINED and where[-1] == "even":
            assert found.get("LDGSTS"), (stage, where)


def test_float32_is_not_rounded_for_tensor_cores(compiled):
    """Unless PyTorch is told so; a compiler may take TF32 where it was asked not to."""
    _, kernels = compiled
    for (stage, dtype, *where), kernel in kernels.items():
        if dtype == "fp32":
            found = kernel["instructions"]
            assert not any(found.get(op) for op in ("HMMA", "HGMMA", "UTCHMMA")), (stage, where)


def test_the_base_products_use_what_the_chip_has(compiled):
    architecture, kernels = compiled
    expected = {
        "sm_80": {"HMMA", "LDGSTS"},
        "sm_90": {"HGMMA", "UTMALDG"},
        "sm_100": {"UTCHMMA", "UTMALDG"},
        "gfx942": {"MFMA"},
    }[architecture]
    for stage in ("expand_fused", "grad_input_fused"):
        found = kernels[stage, "bf16", 16, "even"]["instructions"]
        assert expected <= {op for op, count in found.items() if count}, stage


def test_two_programs_of_a_pass_fit_on_an_sm(compiled):
    """One loads while the other multiplies: what a pass over memory lives on, on newer chips."""
    architecture, kernels = compiled
    if architecture not in SHARED:
        pytest.skip("not held there")
    for (stage, dtype, r, shape), kernel in kernels.items():
        if stage in STREAMING and "bf16" in dtype and shape in ("even", "grouped"):
            threads = 32 * kernel["launch"]["num_warps"]
            where = (stage, dtype, r, shape)
            assert 2 * kernel["registers"] * threads <= REGISTERS, where
            assert 2 * (kernel["shared"] + 1024) <= SHARED[architecture], where


def test_dropout_costs_few_instructions_an_element(compiled):
    architecture, kernels = compiled
    if architecture != "sm_90":
        pytest.skip("counted on sm_90")
    found = [kernels[stage, "bf16", 16, "even"] for stage in ("shrink", "shrink, p=0")]
    launch = found[0]["launch"]
    elements = launch["BLOCK_M"] * launch["BLOCK_K"] / (32 * launch["num_warps"])
    drawn, plain = (kernel["instructions"]["all"] for kernel in found)
    # Philox alone takes 7 rounds of 6 for 8 elements; then a compare, a bit, a select
    assert (drawn - plain) / elements <= 20
