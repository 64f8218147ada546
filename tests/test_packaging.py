"""What is built from this tree: a complete sdist, a complete wheel from it, one version."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastlora

ROOT = Path(__file__).parents[1]
# the folders of the packages, as wheels name them
FOLDERS = {"fastlora": ROOT / "fastlora", "fastlora/kernels": ROOT / "kernels"}
PATHS = "import fastlora, fastlora.kernels as k; print(fastlora.__file__); print(k.__file__)"
NATIVE = """
from fastlora import doctor
print(fastlora.backends.native._C.__file__)
print("native on cpu:", doctor.self_check("native", "cpu"))
"""
EXTENSION = """
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C"};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
"""


needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")


def copy_of_the_tree(folder):
    made = shutil.ignore_patterns(".git", ".*_cache", "__pycache__", "build", "dist", "*.egg-info")

    def ignore(path, names):
        venvs = {name for name in names if Path(path, name, "pyvenv.cfg").exists()}
        return made(path, names) | venvs

    return Path(shutil.copytree(ROOT, folder / "tree", ignore=ignore))


def run(code, cwd, **env):
    command = [sys.executable, "-c", code]
    env = {**os.environ, **env}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def build(tree, kind, mode="0", check=True, block_torch=False, **env):
    """Run the build backend in ``tree`` as a frontend would; the result lies beside it."""
    block = "import sys; sys.modules['torch'] = None\n" if block_torch else ""
    code = f"from setuptools import build_meta\nbuild_meta.build_{kind}({str(tree.parent)!r})"
    env = {"FASTLORA_BUILD": mode, "FASTLORA_CUDA": "0", "FASTLORA_CUTLASS": "0", **env}
    result = run(block + code, tree, **env)
    assert result.returncode == 0 or not check, result.stdout + result.stderr
    return result


def wheel_names(folder):
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist of this tree, and the wheel that was built from that sdist."""
    folder = tmp_path_factory.mktemp("built")
    build(copy_of_the_tree(folder), "sdist", block_torch=True)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    build(folder / sdist.name.removesuffix(".tar.gz"), "wheel", block_torch=True)
    return folder


def test_declared_packages_are_the_folders_on_disk():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = set(project["tool"]["setuptools"]["packages"])
    on_disk = {
        ".".join([*package.split("/"), *path.parent.relative_to(folder).parts])
        for package, folder in FOLDERS.items()
        for path in folder.rglob("*.py")
    }
    assert declared == on_disk
    inits = {path.parent for folder in FOLDERS.values() for path in folder.rglob("__init__.py")}
    assert len(inits) == len(on_disk), "a package has no __init__.py"


def test_wheel_holds_every_module_and_nothing_else(built):
    modules = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for path in folder.rglob("*.py")
    }
    tables = {f"fastlora/kernels/tables/{path.name}" for path in ROOT.glob("kernels/tables/*.json")}
    choices = {f"fastlora/tables/{path.name}" for path in ROOT.glob("fastlora/tables/*.json")}
    packed = {name for name in wheel_names(built) if ".dist-info/" not in name}
    assert tables and packed == modules | tables | choices | {"fastlora/py.typed"}


def test_wheel_imports_from_another_folder(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    result = run(PATHS, tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert result.returncode == 0, result.stderr
    assert all(line.startswith(str(tmp_path)) for line in result.stdout.splitlines())


def test_installed_package_imports_from_another_folder(tmp_path):
    result = run(PATHS, tmp_path, PYTHONPATH="")
    assert result.returncode == 0, result.stderr


def test_sdist_holds_all_sources(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    suffixes = {".py", ".cpp", ".cu", ".cuh", ".h", ".inc", ".md", ".toml", ".yaml"}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in ("fastlora", "kernels", "csrc", "tests", "docs", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and not any(part.startswith(".") for part in path.parts)
    }
    top = {"pyproject.toml", "setup.py", "Makefile", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    assert {
        "csrc/bindings/cuda_stages.cpp",
        "csrc/cuda/shrink.cu",
        "csrc/cutlass/product.cuh",
        "csrc/cpu/kernels.h",
        "csrc/cpu/stages.inc",
    } <= wanted
    assert wanted | top | {"LICENSE", "MANIFEST.in", ".ci/run"} <= packed


@needs_compiler
def test_wheel_with_the_extension_works_from_another_folder(built, tmp_path, request):
    """Built from what the sdist holds."""
    if not request.config.getoption("full", False):
        pytest.skip("compiles for long: --full")
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    # compiled without optimisation: as good for this, and in half the time
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/bash\nexec c++ "${@/#-O?/-O0}"\n')
    compiler.chmod(0o755)
    build(tmp_path / sdist.name.removesuffix(".tar.gz"), "wheel", "1", CXX=str(compiler))
    assert has_extension(tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    result = run(PATHS + NATIVE, tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert result.returncode == 0, result.stderr
    *paths, check = result.stdout.splitlines()
    assert all(path.startswith(str(tmp_path)) for path in paths)
    assert check == "native on cpu: None"


def test_one_version_everywhere(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.name.startswith(f"fastlora-{fastlora.__version__}-")
    headings = [
        line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [")
    ]
    newest = next(line for line in headings if "[Unreleased]" not in line)
    assert newest.startswith(f"## [{fastlora.__version__}]")


@pytest.fixture
def without_sources(tmp_path):
    tree = copy_of_the_tree(tmp_path)
    shutil.rmtree(tree / "csrc", ignore_errors=True)
    return tree


@pytest.fixture
def with_sources(without_sources):
    (without_sources / "csrc").mkdir()
    (without_sources / "csrc" / "probe.cpp").write_text(EXTENSION)
    return without_sources


def has_extension(folder):
    return any(name.startswith("fastlora/_C.") for name in wheel_names(folder))


@pytest.mark.parametrize("mode", ["auto", "0"])
def test_without_sources_the_wheel_is_pure_and_says_so(without_sources, mode):
    result = build(without_sources, "wheel", mode)
    assert "installing without the C++ extension: " in result.stdout
    assert not has_extension(without_sources.parent)


def test_a_demanded_extension_without_sources_fails(without_sources):
    result = build(without_sources, "wheel", "1", check=False)
    assert result.returncode != 0
    assert "FASTLORA_BUILD=1, but the extension cannot be built: there are no" in result.stderr


def test_a_demanded_extension_without_torch_fails(with_sources):
    result = build(with_sources, "wheel", "1", check=False, block_torch=True)
    assert result.returncode != 0
    assert "torch cannot be imported" in result.stderr


@pytest.mark.parametrize("mode", ["auto", "1"])
def test_without_a_compiler(with_sources, mode):
    result = build(with_sources, "wheel", mode, check=mode == "auto", CXX="/nonexistent")
    if mode == "1":
        assert result.returncode != 0
        assert "cannot be built: there is no C++ compiler" in result.stderr
    else:
        assert "installing without the C++ extension: there is no C++ compiler" in result.stdout
        assert not has_extension(with_sources.parent)


def test_demanded_kernels_without_the_extension_fail(without_sources):
    result = build(without_sources, "wheel", "0", check=False, FASTLORA_CUDA="1")
    assert result.returncode != 0
    assert "FASTLORA_CUDA=1, but the extension cannot be built: FASTLORA_BUILD=0" in result.stderr


def test_an_unknown_mode_fails(without_sources):
    result = build(without_sources, "wheel", "yes", check=False)
    assert result.returncode != 0
    assert "must be auto, 0 or 1, got 'yes'" in result.stderr


@pytest.fixture
def with_kernels(with_sources):
    (with_sources / "csrc/include").mkdir()
    for name in ("csrc/probe.cu", "csrc/include/probe.cuh"):
        (with_sources / name).touch()
    return with_sources


@needs_compiler
@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"CUDA_HOME": "/nonexistent"}, "nvcc is neither in CUDA_HOME nor on PATH"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0;Hopper"}, "TORCH_CUDA_ARCH_LIST: got 'Hopper', expected"),
        ({"TORCH_CUDA_ARCH_LIST": "1.0"}, "returned non-zero exit status"),
    ],
)
def test_demanded_kernels_that_cannot_be_built(with_kernels, env, message):
    if "CUDA_HOME" not in env and not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    result = build(with_kernels, "wheel", "1", check=False, FASTLORA_CUDA="1", **env)
    assert result.returncode != 0
    assert "FASTLORA_CUDA=1, but the kernels cannot be built: " in result.stderr
    assert message in result.stderr


@needs_compiler
@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"FASTLORA_CUDA": "0"}, "FASTLORA_CUDA=0"),
        ({"FASTLORA_BUILD": "0"}, "FASTLORA_BUILD=0"),
        ({"CUDA_HOME": "/nonexistent"}, "nvcc is neither in CUDA_HOME nor on PATH"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0;10.0"}, "got '8.0;10.0', expected 9.0 among them"),
        (
            {"TORCH_CUDA_ARCH_LIST": "9.0"},
            "the package nvidia-cutlass, which has CUTLASS's headers, is not installed",
        ),
    ],
)
def test_demanded_kernels_on_cutlass_that_cannot_be_built(with_kernels, env, message):
    if not env.keys() & {"CUDA_HOME", "FASTLORA_CUDA", "FASTLORA_BUILD"} and not shutil.which(
        "nvcc"
    ):
        pytest.skip("needs nvcc")
    # found before the package: no folder of headers is in it
    (with_kernels / "cutlass_library.py").touch()
    env = {"FASTLORA_CUDA": "1", "PYTHONPATH": str(with_kernels), **env}
    result = build(with_kernels, "wheel", "1", check=False, FASTLORA_CUTLASS="1", **env)
    assert result.returncode != 0
    assert "FASTLORA_CUTLASS=1, but the kernels cannot be built: " in result.stderr
    assert message in result.stderr
    assert "built in" not in result.stdout


def test_kernels_on_cutlass_where_they_can_be_built(without_sources):
    result = build(without_sources, "wheel", FASTLORA_CUTLASS="auto")
    assert "building without the kernels on CUTLASS: FASTLORA_BUILD=0" in result.stdout
    result = build(without_sources, "wheel", check=False, FASTLORA_CUTLASS="yes")
    assert result.returncode != 0
    assert "FASTLORA_CUTLASS must be auto, 0 or 1, got 'yes'" in result.stderr


@needs_compiler
def test_without_kernels_the_rest_is_built(with_kernels):
    env = {"FASTLORA_CUDA": "auto", "CUDA_HOME": "/nonexistent"}
    result = build(with_kernels, "wheel", "1", **env)
    assert "fastlora: building without CUDA kernels: " in result.stdout
    assert has_extension(with_kernels.parent)


@needs_compiler
def test_sources_are_built(with_sources):
    build(with_sources, "wheel", "1")
    assert has_extension(with_sources.parent)


@needs_compiler
@pytest.mark.parametrize("mode", ["auto", "1"])
def test_sources_that_do_not_compile(with_sources, mode):
    (with_sources / "csrc" / "probe.cpp").write_text("#error planted")
    result = build(with_sources, "wheel", mode, check=mode == "auto")
    if mode == "1":
        assert result.returncode != 0
        assert "the extension cannot be built" in result.stderr
    else:
        assert "installing without the C++ extension" in result.stdout
        assert not has_extension(with_sources.parent)
