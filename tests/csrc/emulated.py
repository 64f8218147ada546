"""The operators for CUDA tensors on an emulated device, as a backend of CPU tensors."""

import ctypes
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch.utils import cpp_extension

from fastlora.backends import cutlass
from fastlora.backends.operators import FLOATS, Operators, define

ROOT = Path(__file__).parents[2]
CXX = os.environ.get("CXX", "c++")
# what the runtime of the emulated device stands in for
RUNTIME = ROOT / "csrc/cuda/runtime.cu"
# and of csrc/cutlass, plain loops for its products
KERNELS = (
    *sorted(set(ROOT.glob("csrc/cuda/*.cu")) - {RUNTIME}),
    ROOT / "csrc/cutlass/fused.cu",
    ROOT / "tests/csrc/hopper.cpp",
    ROOT / "tests/csrc/runtime.cpp",
)
BINDINGS = (
    *sorted(ROOT.glob("csrc/bindings/cuda_*.cpp")),
    *sorted(ROOT.glob("csrc/bindings/cutlass_*.cpp")),
)

name = "emulated"
dtypes = {"cpu": FLOATS}
operators = Operators("fastlora_emulated")
forward, backward = operators.forward, operators.backward
multi_forward, multi_backward = operators.multi_forward, operators.multi_backward
shrink, expand, delta = operators.shrink, operators.expand, operators.delta
grad_expand = operators.grad_expand
grad_shrink, grad_input = operators.grad_shrink, operators.grad_input


def why_not():
    return None


def description():
    return "CUDA kernels, emulated"


def run(*command, **options):
    options = {"capture_output": True, "text": True, "cwd": ROOT, **options}
    return subprocess.run([str(word) for word in command], **options)


def toolkit():
    """The folder of the CUDA toolkit, which nvcc names."""
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("needs nvcc, and the headers of CUDA with it")
    said = run(nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null", "-o", "/dev/null").stderr
    return Path(re.search(r"^#\$ TOP=(.*)$", said, re.M)[1])


def flags():
    """Of a C++ compiler for the emulated device; skips the test where there is none."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the emulated device switches stacks in x86-64 assembly")
    if not shutil.which(CXX.split()[0]):
        pytest.skip(f"no C++ compiler: {CXX}")
    includes = ("-Itests/csrc", "-Icsrc/include", "-isystem", toolkit() / "include")
    warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
    return ("-O1", "-DFASTLORA_EMULATED", *includes, *warnings)


def compile_all(sources, folder, *options):
    """The objects of these sources, in ``folder``."""

    def build(source):
        out = folder / f"{source.name}.o"
        result = run(*CXX.split(), *flags(), *options, "-x", "c++", "-c", source, "-o", out)
        assert result.returncode == 0, result.stderr
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(build, sources))


def once(folder, name, make):
    """What ``make`` makes in a folder of this name, once for all processes that name ``folder``."""
    place = folder / name
    with FileLock(f"{place}.lock"):
        made = place / "made"
        if not made.exists():
            place.mkdir(exist_ok=True)
            made.write_bytes(pickle.dumps(make(place)))
        return pickle.loads(made.read_bytes())


@cache
def load(folder):
    """Builds the operators, once for all processes that name the same folder, and loads them."""
    library = folder / "emulated.so"
    with FileLock(folder / "emulated.lock"):
        if not library.exists():
            options = ["-std=c++20", "-fPIC"]
            options += [f"-isystem{path}" for path in cpp_extension.include_paths()]
            objects = compile_all(KERNELS, folder, *options)
            # two functions of one name in the extension would be one
            options += ["-Icsrc", "-Icsrc/cpu", "-include", "csrc/bindings/cpu.h"]
            objects += compile_all(BINDINGS, folder, *options)
            libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
            libraries += ["-ltorch", "-ltorch_cpu", "-lc10"]
            linked = run(*CXX.split(), "-shared", *objects, *libraries, "-o", library)
            assert linked.returncode == 0, linked.stderr
    global _libraries, multiprocessors
    _libraries = [define("fastlora_emulated"), define("fastlora_emulated_cutlass", cutlass.STAGES)]
    torch.ops.load_library(library)
    multiprocessors = ctypes.c_int.in_dll(ctypes.CDLL(library), "fastlora_multiprocessors")
    return sys.modules[__name__]
