"""Kernels compiled for GPUs that are not here: what they ask of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_fused_products_compile_without_spills(tmp_path):
    """On tensor cores, and through TMA where there is one; ``--full`` compiles all the rest."""
    out = tmp_path / "compiled.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile", "--jobs", "1", "--only", "expand_fused"]
    result = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(out.read_text())
    kernels = {
        (case["architecture"], case["dtype"]): kernel
        for case in found
        for kernel in case["result"]
        if "sum_parts" not in kernel["kernel"]
    }
    assert {architecture for architecture, _ in kernels} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for case, kernel in kernels.items():
        assert kernel["local"] == 0, case
        assert kernel["scratch"] == 0, case
    hopper = kernels["sm_90", "bf16"]["instructions"]
    assert hopper["HGMMA"] and hopper["UTMALDG"]
