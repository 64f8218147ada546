"""The kernels on CUTLASS without a GPU: compiled for one, and what of them runs on the host."""

import re
import resource
from collections import Counter
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import pytest

from . import emulated
from .emulated import CXX, ROOT, run, toolkit
from .test_cuda import REGISTERS, SANITIZERS, compile_source

SOURCES = sorted(ROOT.glob("csrc/cutlass/*.cu"))
# of a block: warps that copy, and warps that multiply
THREADS = 384
BRANCH = re.compile("BRA|BRX|BSSY|BSYNC|CALL|RET|EXIT|WARPSYNC")
# of a core, for both products in both dtypes
SECONDS = 120


@pytest.fixture(scope="module")
def headers():
    """The folder of CUTLASS's headers."""
    found = find_spec("cutlass_library")
    if not found:
        pytest.skip("needs the package nvidia-cutlass")
    return Path(found.submodule_search_locations[0]) / "source/include"


def compiled(source, headers, folder):
    options = ("-isystem", headers, "--expt-relaxed-constexpr", "-DNDEBUG")
    return compile_source(source, "sm_90a", folder, *options)


def assert_lean(kernels):
    """As many registers as a block has, no local memory, tensor cores, copies of tiles."""
    for kernel in kernels:
        counts = kernel.counts()
        assert kernel.registers * THREADS <= REGISTERS, kernel.name
        assert not kernel.local and not {"LDL", "STL"} & counts.keys()
        # four for a tile of 64 columns, for each place in the source that multiplies
        assert counts["HGMMA"] and not counts["HGMMA"] % 4
        assert not {"HMMA", "LDGSTS"} & counts.keys()
        operands = [operands for _, name, operands in kernel.code if name == "UTMALDG.3D.MULTICAST"]
        assert operands and counts["UTMALDG"] > len(operands)
        # registers go from warps that copy to those that multiply
        assert counts["USETMAXREG"] == 2
        # a whole tile is written, 16 vectors a thread, without a branch
        runs = [
            Counter(name for _, name, _ in run)
            for is_branch, run in groupby(kernel.code, lambda step: bool(BRANCH.match(step[1])))
            if not is_branch
        ]
        assert any(run["STG.E.128"] == 16 for run in runs)
        # what a mask keeps is selected by predicates, of which an instruction makes several
        assert counts["FSEL"] <= 3 * counts["R2P"]


def test_both_products_from_one_source(headers, tmp_path, request):
    """What they compile to, in what time, and that the driver gets the descriptions it wants."""
    if not request.config.getoption("full", False):
        pytest.skip("compiles for long: --full")
    toolkit()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    kernels = compiled(ROOT / "tests/csrc/test_product.cu", headers, tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert [kernel.name for kernel in kernels] == 4 * ["hopper"]
    assert_lean(kernels)
    assert after.ru_utime - before.ru_utime < SECONDS
    program = tmp_path / "test_product"
    linked = run("nvcc", tmp_path / "test_product.o", "-o", program)
    assert linked.returncode == 0, linked.stderr
    result = run(program)
    assert result.returncode == 0, result.stderr


def test_tiles_and_places(headers, tmp_path):
    """Which tiles there are, which elements a thread has, and its bits of the mask."""
    program = tmp_path / "test_tile"
    includes = ("-isystem", headers, "-isystem", toolkit() / "include/cccl")
    options = ("-std=c++17", *SANITIZERS, *emulated.flags(), *includes)
    source = ROOT / "tests/csrc/test_tile.cpp"
    result = run(*CXX.split(), *options, source, "-o", program)
    assert result.returncode == 0, result.stderr
    result = run(program)
    assert result.returncode == 0, result.stderr


def test_every_source_alone(headers, tmp_path, request):
    """As an installation compiles them."""
    if not request.config.getoption("full", False):
        pytest.skip("compiles for long: --full")
    toolkit()
    products = 0
    for source in SOURCES:
        kernels = compiled(source, headers, tmp_path)
        assert_lean(kernels)
        products += len(kernels)
    assert products == 4
