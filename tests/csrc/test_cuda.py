"""The CUDA kernels without a GPU: run on an emulated device, and compiled for real ones."""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CXX = os.environ.get("CXX", "c++")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))
INCLUDES = ("-Itests/csrc", "-Icsrc/include")


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


def test_the_kernels_on_an_emulated_device(tmp_path):
    """Under AddressSanitizer and UndefinedBehaviorSanitizer."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the emulated device switches stacks in x86-64 assembly")
    if not shutil.which(CXX.split()[0]):
        pytest.skip(f"no C++ compiler: {CXX}")
    probe = [*CXX.split(), *SANITIZERS, "-x", "c++", "-", "-o", tmp_path / "probe"]
    if (found := run(*probe, input="int main() {}")).returncode:
        pytest.skip(f"{CXX} has no sanitizers: {found.stderr.strip().splitlines()[-1]}")
    flags = ("-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
    headers = ("-DFASTLORA_EMULATED", *INCLUDES, "-isystem", toolkit() / "include")

    def build(source):
        out = tmp_path / f"{source.name}.o"
        command = (*CXX.split(), *flags, *SANITIZERS, *headers, "-x", "c++", "-c", source)
        result = run(*command, "-o", out)
        assert result.returncode == 0, result.stderr
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(build, [*SOURCES, ROOT / "tests/csrc/test_cuda.cpp"]))
    program = tmp_path / "test_cuda"
    linked = run(*CXX.split(), *SANITIZERS, *objects, "-o", program)
    assert linked.returncode == 0, linked.stderr
    result = run(program)
    assert result.returncode == 0, result.stderr
