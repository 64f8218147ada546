"""The optional C++ extension; all else is declared in pyproject.toml.

FASTLORA_BUILD says what to do about it: ``auto`` (default) builds it where that is possible,
``1`` makes it an error not to, ``0`` leaves it out. FASTLORA_CUDA says the same of its CUDA
kernels, which ``auto`` builds for a torch with CUDA, where nvcc is on PATH or in CUDA_HOME.
TORCH_CUDA_ARCH_LIST names the architectures they are compiled for; without it, those of the GPUs
that are visible, or else all that the kernels were tested for.
"""

import os
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

MODE = os.environ.get("FASTLORA_BUILD", "auto")
CUDA_MODE = os.environ.get("FASTLORA_CUDA", "auto")
# merging depends on the order of roundings: no contraction but where the source says fma
COMPILE_ARGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fopenmp"]
INCLUDES = ("csrc", "csrc/cpu", "csrc/include")
SOURCES = sorted(Path("csrc").rglob("*.cpp"))
KERNELS = sorted(Path("csrc").rglob("*.cu"))
CUDA_BINDINGS = sorted(Path("csrc/bindings").glob("cuda_*.cpp"))
# code for 8.0 runs on 8.6 and 8.9, and what comes after 9.0 is compiled from PTX when it is loaded
ARCHITECTURES = "8.0;9.0+PTX"


def obstacle():
    """Why the extension cannot be built here, or None."""
    if MODE == "0":
        return "FASTLORA_BUILD=0"
    if not SOURCES:
        return "there are no sources under csrc/"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch cannot be imported (install it first, then use --no-build-isolation)"
    if not shutil.which(os.environ.get("CXX", "c++").split()[0]):
        return "there is no C++ compiler"
    return None


def cuda_obstacle():
    """Why the CUDA kernels cannot be built, or None."""
    import torch

    if CUDA_MODE == "0":
        return "FASTLORA_CUDA=0"
    if not KERNELS:
        return "there are no kernels under csrc/"
    if CUDA_MODE == "auto" and not torch.version.cuda:
        return "this torch has no CUDA (FASTLORA_CUDA=1 builds them all the same)"
    if not nvcc():
        return "nvcc is neither in CUDA_HOME nor on PATH"
    return None


def nvcc():
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def toolkit():
    """The folder with the toolkit's headers and libraries, which nvcc names."""
    command = [nvcc(), "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = next(line for line in said.splitlines() if line.startswith("#$ TOP="))
    return Path(found.partition("=")[2]).resolve()


def architectures():
    """As in TORCH_CUDA_ARCH_LIST: numbers, with +PTX where code for newer ones is to be kept."""
    import torch

    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not listed and torch.cuda.is_available():
        found = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        listed = ";".join(sorted({f"{major}.{minor}" for major, minor in found}))
    return (listed or ARCHITECTURES).replace(" ", ";").split(";")


def gencode(architecture):
    found = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", architecture)
    if not found:
        raise ValueError(
            f"TORCH_CUDA_ARCH_LIST: got {architecture!r}, expected a number such as 9.0 or 9.0+PTX"
        )
    number = found[1] + found[2]
    yield f"-gencode=arch=compute_{number},code=sm_{number}"
    if found[3]:
        yield f"-gencode=arch=compute_{number},code=compute_{number}"


def compile_kernels(folder):
    """Compiles what has changed; returns the objects."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = [path for path in Path("csrc/include").rglob("*") if path.is_file()]
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Icsrc/include"]
    flags += [flag for architecture in architectures() for flag in gencode(architecture)]
    # other flags, other objects
    stamp = folder / "flags"
    if not stamp.exists() or stamp.read_text() != " ".join(flags):
        shutil.rmtree(folder)
        folder.mkdir()
        stamp.write_text(" ".join(flags))
    newest = max(path.stat().st_mtime for path in headers)

    def build(source):
        out = folder / f"{source.stem}.o"
        if not out.exists() or out.stat().st_mtime < max(newest, source.stat().st_mtime):
            subprocess.run([nvcc(), *flags, "-c", str(source), "-o", str(out)], check=True)
        return str(out)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(build, KERNELS))


def add_cuda(module, folder):
    """Adds the CUDA kernels and their bindings to the extension."""
    start, names = time.monotonic(), " ".join(architectures())
    module.extra_objects += compile_kernels(folder)
    print(f"fastlora: CUDA kernels for {names}, built in {time.monotonic() - start:.0f} s")
    module.sources += map(str, CUDA_BINDINGS)
    module.define_macros.append(("FASTLORA_CUDA", f'"{names}"'))
    library = toolkit()
    module.include_dirs.append(str(library / "include"))
    # torch may have another version of the runtime: this one is ours alone
    module.library_dirs.append(str(library / "lib64"))
    module.libraries += ["cudart_static", "rt", "dl", "pthread"]
    module.extra_link_args.append("-Wl,--exclude-libs,libcudart_static.a")


def give_up(reason):
    for name, mode in (("FASTLORA_BUILD", MODE), ("FASTLORA_CUDA", CUDA_MODE)):
        if mode == "1":
            raise SystemExit(f"fastlora: {name}=1, but the extension cannot be built: {reason}")
    print(f"fastlora: installing without the C++ extension: {reason}")


def give_up_cuda(reason):
    if CUDA_MODE == "1":
        raise SystemExit(f"fastlora: FASTLORA_CUDA=1, but the kernels cannot be built: {reason}")
    print(f"fastlora: building without CUDA kernels: {reason}")


def extension():
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    print("fastlora: building the C++ extension")
    # OpenMP is compiled in but not linked: its symbols are those of the runtime that torch has
    # loaded, as a second one would compete with it for the cores
    module = CppExtension(
        "fastlora._C",
        [str(path) for path in SOURCES if path not in CUDA_BINDINGS],
        include_dirs=[str(Path(folder).absolute()) for folder in INCLUDES],
        extra_compile_args=list(COMPILE_ARGS),
    )

    class Build(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                give_up(error)

        def build_extensions(self):
            if reason := cuda_obstacle():
                give_up_cuda(reason)
            else:
                try:
                    add_cuda(module, Path(self.build_temp) / "cuda")
                except (subprocess.CalledProcessError, ValueError) as error:
                    give_up_cuda(error)
            super().build_extensions()

    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


for name, mode in (("FASTLORA_BUILD", MODE), ("FASTLORA_CUDA", CUDA_MODE)):
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"fastlora: {name} must be auto, 0 or 1, got {mode!r}")
reason = obstacle()
if reason:
    give_up(reason)
setup(**({} if reason else extension()))
