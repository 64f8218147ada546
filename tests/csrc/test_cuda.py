"""The CUDA kernels without a GPU: run on an emulated device, and compiled for real ones."""

import ctypes
import os
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from . import emulated
from .emulated import CXX, ROOT, run, toolkit

SANITIZERS = (
    "-fsanitize=address,undefined",
    # a null pointer faults anyway; without these two, compiling takes two thirds of the time
    "-fno-sanitize=null,pointer-overflow",
    "-fno-sanitize-recover=all",
)
SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))
# of both compilers; loops that only one of them unrolls are none
WARNINGS = "-Wall,-Wextra,-Werror,-Wno-unknown-pragmas"
ARCHITECTURES = ("sm_90a",)
# with --full; the second and third differ from the first in nothing that the kernels use
MORE_ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_100")
REGISTERS = 65536
# of a block of the kernels on tensor cores
THREADS = 256


def test_the_kernels_on_an_emulated_device(tmp_path):
    """Under AddressSanitizer and UndefinedBehaviorSanitizer."""
    emulated.flags()
    probe = [*CXX.split(), *SANITIZERS, "-x", "c++", "-", "-o", tmp_path / "probe"]
    if (found := run(*probe, input="int main() {}")).returncode:
        pytest.skip(f"{CXX} has no sanitizers: {found.stderr.strip().splitlines()[-1]}")
    sources = [*emulated.KERNELS, ROOT / "tests/csrc/test_cuda.cpp"]
    objects = emulated.compile_all(sources, tmp_path, "-std=c++17", "-g1", *SANITIZERS)
    program = tmp_path / "test_cuda"
    linked = run(*CXX.split(), *SANITIZERS, *objects, "-o", program)
    assert linked.returncode == 0, linked.stderr
    result = run(program)
    assert result.returncode == 0, result.stderr


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: its template arguments, and what it asks for.

    Args:
        ranks: Ranks of a tile; 0 for kernels that use no tensor cores.
        layers: That share what it reads.
        flags: Its other template arguments: whether ``shrink`` draws a mask, ``grad_shrink`` writes
            dX, and, the last of the gradients' kernels, whether float32 factors are split; of
            ``low_rank``, that there is no mask, and that rows of float32 are multiplied.
        local: Bytes of local memory, spilled registers among it.
        code: Its instructions, and before each the label there, if any: (label, name, operands).
    """

    name: str
    ranks: int
    layers: int
    flags: tuple[bool, ...]
    registers: int
    local: int
    code: list[tuple[str, str, str]]

    @property
    def blocks(self):
        """How many fit on a multiprocessor, as far as registers go, which come by the eight."""
        return REGISTERS // (THREADS * -(-self.registers // 8) * 8)

    def counts(self):
        return Counter(name.partition(".")[0] for _, name, _ in self.code)

    def main_loop(self):
        """The instructions of the shortest loop that multiplies, and copies if the kernel does."""
        wanted = {"HMMA", "LDGSTS"} & self.counts().keys()
        places = {label: i for i, (label, _, _) in enumerate(self.code) if label}
        loops = []
        for end, (_, name, operands) in enumerate(self.code):
            target = re.search(r"\((\.L_\w+)\)", operands)
            begin = places.get(target[1], end) if name.startswith("BRA") and target else end
            names = {name.partition(".")[0] for _, name, _ in self.code[begin : end + 1]}
            if wanted <= names:
                loops.append(self.code[begin : end + 1])
        return min(loops, key=len)


def disassembler():
    """nvdisasm, of the toolkit or of Triton."""
    if path := shutil.which("nvdisasm"):
        return path
    if triton := find_spec("triton"):
        path = Path(triton.origin).parent / "backends/nvidia/bin/nvdisasm"
        if path.exists():
            return path
    pytest.skip("needs nvdisasm, from the toolkit or with Triton")


def listing(cubin):
    """The instructions of each kernel of a cubin."""
    result = run(disassembler(), "--print-code", "--no-dataflow", cubin)
    assert result.returncode == 0, result.stderr
    kernels, code, label = {}, [], ""
    for line in result.stdout.splitlines():
        if found := re.match(r"\.text\.(\w+):", line):
            code = kernels.setdefault(found[1], [])
        elif found := re.match(r"(\.L_\w+):", line):
            label = found[1]
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            code.append((label, found[1], found[2]))
            label = ""
    return kernels


def compile_source(source, architecture, folder, *more):
    """The kernels of one source."""
    target = f"arch={architecture.replace('sm', 'compute')},code={architecture}"
    options = ("-std=c++17", "-O3", "-gencode", target, "-Icsrc/include", "-Werror", "all-warnings")
    options += ("-Xcompiler", f"-fPIC,{WARNINGS}", "-Xptxas", "-v")
    options += more
    kept = ("--keep", "--keep-dir", folder)
    result = run("nvcc", *options, *kept, "-c", source, "-o", folder / f"{source.stem}.o")
    assert result.returncode == 0, result.stderr
    # ptxas says so where products wait for each other
    assert "Potential Performance Loss" not in result.stderr, result.stderr
    report = r"entry function '(\w+)'.*?(\d+) bytes stack frame.*?Used (\d+) registers"
    used = re.findall(report, result.stderr, re.S)
    code = listing(folder / f"{source.stem}.cubin") if used else {}
    kernels = []
    for symbol, local, registers in used:
        name = re.search(r"\d([a-z_]+)_kernel", symbol)[1]
        template = re.search(r"_kernelI\w+?Li(\d+)E(?:Li(\d+)E)?((?:Lb[01]E)*)E", symbol)
        ranks, layers, flags = 0, 1, ""
        if template and name not in ("product", "split"):
            ranks, layers, flags = int(template[1]), int(template[2] or 1), template[3]
        flags = tuple(flag == "1" for flag in re.findall("Lb(.)E", flags))
        kernels.append(Kernel(name, ranks, layers, flags, int(registers), int(local), code[symbol]))
    return kernels


@dataclass(frozen=True)
class Build:
    """The kernels, and the folder with the objects they are in."""

    architecture: str
    kernels: list[Kernel]
    folder: Path


def pytest_generate_tests(metafunc):
    if "build" in metafunc.fixturenames:
        more = MORE_ARCHITECTURES if metafunc.config.getoption("full", False) else ()
        metafunc.parametrize("build", ARCHITECTURES + more, indirect=True, scope="module")


@pytest.fixture(scope="module")
def build(request, workers_folder):
    """Everything, compiled for an architecture; no warning is let pass."""
    toolkit()

    def make(folder):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            each = pool.map(lambda source: compile_source(source, request.param, folder), SOURCES)
            return Build(
                request.param, [kernel for of_source in each for kernel in of_source], folder
            )

    return emulated.once(workers_folder, request.param, make)


@pytest.fixture
def kernels(build):
    return build.kernels


def test_the_objects_link_and_load_without_a_gpu(build):
    library = build.folder / "kernels.so"
    linked = run("nvcc", "-shared", *build.folder.glob("*.o"), "-o", library)
    assert linked.returncode == 0, linked.stderr
    # every symbol there, at once
    loaded = ctypes.CDLL(str(library), os.RTLD_NOW)
    if not torch.cuda.is_available():
        launch = loaded._ZN8fastlora4cuda9draw_maskElljPKlPhP11CUstream_st
        launch.argtypes = [ctypes.c_int64] * 2 + [ctypes.c_uint32] + [ctypes.c_void_p] * 3
        # cudaErrorInsufficientDriver where no driver is installed, cudaErrorNoDevice
        assert launch(1, 1, 1, None, None, None) in (35, 100)


def test_nothing_is_kept_in_local_memory(build):
    """But a few registers of two kernels on one architecture, where they are not tuned."""
    few = {("shrink", 64, 1): 48, ("shrink", 16, 3): 40} if build.architecture == "sm_100" else {}
    for kernel in build.kernels:
        allowed = few.get((kernel.name, kernel.ranks, kernel.layers), 0)
        assert kernel.local <= allowed, kernel.name
        if allowed:
            continue
        assert not {"LDL", "STL"} & kernel.counts().keys(), kernel.name


def test_16_bit_kernels_use_tensor_cores_and_asynchronous_copies(kernels):
    found = {kernel.name for kernel in kernels if kernel.ranks}
    assert found == {"shrink", "low_rank", "grad_expand", "grad_shrink"}
    for kernel in kernels:
        counts = kernel.counts()
        assert bool(counts["HMMA"]) == bool(kernel.ranks), kernel.name
        assert bool(counts["LDGSTS"]) == (kernel.ranks and kernel.name != "low_rank"), kernel.name


def test_two_blocks_fit_on_a_multiprocessor(kernels):
    """As far as registers go; one of many ranks, of all layers together."""
    for kernel in kernels:
        for_two = {
            "low_rank": 32 if kernel.flags[1:] == (True,) else 16,
            "grad_shrink": 16 if any(kernel.flags) else 32,
            "grad_expand": 16 if kernel.flags == (True,) else 32,
        }
        if kernel.ranks:
            ranks = kernel.ranks * kernel.layers
            wanted = 2 if ranks <= for_two.get(kernel.name, 64) else 1
            assert kernel.blocks >= wanted, kernel


# of the gradients' kernels and those that write Y and dX, by (ranks, layers)
MOST_INSTRUCTIONS = {
    ("low_rank", True, True): {(16, 1): 200, (32, 1): 265, (64, 1): 390},
    ("low_rank", False, True): {(16, 1): 390, (32, 1): 460, (64, 1): 585},
    ("grad_expand", False): {(16, 1): 400, (32, 1): 485},
    ("grad_expand", True): {(16, 1): 400, (32, 1): 625},
    ("grad_shrink", False, False): {(16, 1): 270, (32, 1): 350, (64, 1): 465},
    ("grad_shrink", False, True): {(16, 1): 335, (32, 1): 460, (64, 1): 670},
    ("grad_shrink", True, False): {
        (16, 1): 660,
        (16, 2): 990,
        (16, 3): 1260,
        (32, 1): 750,
        (64, 1): 930,
    },
    ("grad_shrink", True, True): {(16, 1): 745, (16, 2): 1130, (16, 3): 1450, (32, 1): 905},
}


def test_main_loops_are_short(build):
    """All instructions for a tile of 32 rows and 32 columns, of which each warp has its own."""
    if build.architecture != "sm_90a":
        pytest.skip("counted for sm_90a")
    found = set()
    for kernel in build.kernels:
        of = (kernel.name, *kernel.flags)
        if of in MOST_INSTRUCTIONS:
            most = MOST_INSTRUCTIONS[of][kernel.ranks, kernel.layers]
            assert len(kernel.main_loop()) <= most, (of, kernel.ranks, kernel.layers)
            found.add(of)
    assert found == MOST_INSTRUCTIONS.keys()


def test_a_mask_costs_ten_instructions_an_element(kernels):
    """At most: drawing it, applying it and writing it; of each layer.

    Counted are all instructions of the main loop, also those of its fourth round alone, which
    writes the mask; a thread has 32 elements a round.
    """
    loops = {}
    for kernel in kernels:
        if kernel.name == "shrink":
            loop, ranks = kernel.main_loop(), kernel.ranks * kernel.layers
            assert sum(name.startswith("HMMA") for _, name, _ in loop) == ranks // 2
            loops.setdefault((kernel.ranks, kernel.layers, *kernel.flags), []).append(len(loop))
    assert len(loops) == 10
    for of, drawing in loops.items():
        ranks, layers, draws = of
        if draws:
            for with_mask, without in zip(drawing, loops[ranks, layers, False], strict=True):
                assert with_mask - without <= 10 * 32 * layers, of
