"""The C++ kernels without Python: under sanitizers, and what they leave for the linker."""

import ast
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CXX = os.environ.get("CXX", "c++")
SANITIZERS = "-fsanitize=address,undefined"

pytestmark = pytest.mark.skipif(not shutil.which(CXX.split()[0]), reason=f"no C++ compiler: {CXX}")


def run(*command, **options):
    # not as a part of the make that runs the tests
    env = {name: value for name, value in os.environ.items() if not re.match("MAKE|MFLAGS", name)}
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": env, **options}
    return subprocess.run(command, **options)


def test_the_kernels_under_sanitizers(tmp_path):
    """On every build that this machine runs; ``make sanitize`` does the same."""
    if not shutil.which("make"):
        pytest.skip("needs make")
    probe = [*CXX.split(), SANITIZERS, "-x", "c++", "-", "-o", str(tmp_path / "probe")]
    if (found := run(*probe, input="int main() {}")).returncode:
        pytest.skip(f"{CXX} has no sanitizers: {found.stderr.strip().splitlines()[-1]}")
    result = run("make", "--silent", "-j3", "sanitize", f"CXX={CXX}")
    assert result.returncode == 0, result.stderr
    builds = ["baseline", "avx2", "avx512"]
    capability = torch.backends.cpu.get_cpu_capability().lower()
    last = builds.index(capability) if capability in builds else 0
    assert result.stdout.split() == builds[: last + 1]


def compile_args():
    """The flags that setup.py compiles with."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (value,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "COMPILE_ARGS"
    )
    return ast.literal_eval(value)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="one instruction set on this machine"
)
def test_no_function_for_one_instruction_set_can_run_on_another_machine(tmp_path):
    """The linker keeps one copy of an inline function, be it the one with AVX-512 in it."""
    if not shutil.which("nm"):
        pytest.skip("needs nm")

    def for_the_linker(name):
        source, out = f"csrc/cpu/{name}.cpp", str(tmp_path / f"{name}.o")
        result = run(*CXX.split(), "-std=c++17", *compile_args(), "-c", source, "-o", out)
        assert result.returncode == 0, result.stderr
        listed = run("nm", "--demangle", "--defined-only", out, check=True).stdout.splitlines()
        symbols = [line.split(" ", 2)[1:] for line in listed]
        return {symbol for kind, symbol in symbols if kind.isupper() or kind in "uvw"}

    names = ("avx2", "avx512")
    with ThreadPoolExecutor() as pool:
        for name, symbols in zip(names, pool.map(for_the_linker, names), strict=True):
            own = {symbol for symbol in symbols if f"fastlora::cpu::isa_{name}::" in symbol}
            assert own
            assert symbols - own == {f"fastlora::cpu::{name}"}
