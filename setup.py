"""The optional C++ extension; all else is declared in pyproject.toml.

FASTLORA_BUILD says what to do about it: ``auto`` (default) builds it where that is possible,
``1`` makes it an error not to, ``0`` leaves it out. FASTLORA_CUDA says the same of its CUDA
kernels, which ``auto`` builds for a torch with CUDA, where nvcc is on PATH or in CUDA_HOME.
TORCH_CUDA_ARCH_LIST names the architectures they are compiled for; without it, those of the GPUs
that are visible, or else all that the kernels were tested for.

FASTLORA_CUTLASS=1 adds the products in one kernel with their low-rank term, for GPUs of compute
capability 9.0; they need the headers of the package nvidia-cutlass, and are left out by default.
``auto`` adds them where they can be built.
"""

import os
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import setup

MODE = os.environ.get("FASTLORA_BUILD", "auto")
CUDA_MODE = os.environ.get("FASTLORA_CUDA", "auto")
CUTLASS_MODE = os.environ.get("FASTLORA_CUTLASS", "0")
MODES = {"FASTLORA_BUILD": MODE, "FASTLORA_CUDA": CUDA_MODE, "FASTLORA_CUTLASS": CUTLASS_MODE}
# merging depends on the order of roundings: no contraction but where the source says fma; symbols
# for debugging, which Python would add, take half of the time and four fifths of the file
COMPILE_ARGS = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fopenmp"]
INCLUDES = ("csrc", "csrc/cpu", "csrc/include")
SOURCES = sorted(Path("csrc").rglob("*.cpp"))
CUTLASS_KERNELS = sorted(Path("csrc/cutlass").glob("*.cu"))
CUTLASS_BINDINGS = sorted(Path("csrc/bindings").glob("cutlass_*.cpp"))
KERNELS = sorted(set(Path("csrc").rglob("*.cu")) - set(CUTLASS_KERNELS))
CUDA_BINDINGS = sorted(Path("csrc/bindings").glob("cuda_*.cpp"))
# code for 8.0 runs on 8.6 and 8.9, and what comes after 9.0 is compiled from PTX when it is loaded
ARCHITECTURES = "8.0;9.0+PTX"
# wgmma is there on this one alone
CUTLASS_ARCHITECTURE = "9.0a"


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


def cutlass_obstacle():
    """Why the kernels on CUTLASS cannot be built, or None."""
    if reason := obstacle() or cuda_obstacle():
        return reason
    if not any(name.startswith("9.0") for name in architectures()):
        listed = ";".join(architectures())
        return f"TORCH_CUDA_ARCH_LIST: got {listed!r}, expected 9.0 among them"
    if not cutlass_headers():
        return "the package nvidia-cutlass, which has CUTLASS's headers, is not installed"
    return None


def cutlass_headers():
    """The folder of CUTLASS's headers, or None."""
    found = find_spec("cutlass_library")
    folders = found.submodule_search_locations if found else None
    return Path(folders[0]) / "source/include" if folders else None


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


def compile_kernels(folder, sources, names, *options):
    """Compiles what has changed for these architectures; returns the objects."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = [path for path in Path("csrc/include").rglob("*") if path.is_file()]
    headers += Path("csrc/cutlass").glob("*.cuh")
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Icsrc/include", *options]
    flags += [flag for architecture in names for flag in gencode(architecture)]
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
        return list(pool.map(build, sources))


def add_cuda(module, folder):
    """Adds the CUDA kernels and their bindings to the extension."""
    start, names = time.monotonic(), " ".join(architectures())
    module.extra_objects += compile_kernels(folder, KERNELS, architectures())
    print(f"fastlora: CUDA kernels for {names}, built in {time.monotonic() - start:.0f} s")
    module.sources += map(str, CUDA_BINDINGS)
    module.define_macros.append(("FASTLORA_CUDA", f'"{names}"'))
    library = toolkit()
    module.include_dirs.append(str(library / "include"))
    # torch may have another version of the runtime: this one is ours alone
    module.library_dirs.append(str(library / "lib64"))
    module.libraries += ["cudart_static", "rt", "dl", "pthread"]
    module.extra_link_args.append("-Wl,--exclude-libs,libcudart_static.a")


def add_cutlass(module, folder):
    """Adds the kernels on CUTLASS and their bindings."""
    start, names = time.monotonic(), [CUTLASS_ARCHITECTURE]
    # its assertions in device code cost time in every step of a loop
    options = ("-isystem", str(cutlass_headers()), "--expt-relaxed-constexpr", "-DNDEBUG")
    module.extra_objects += compile_kernels(folder, CUTLASS_KERNELS, names, *options)
    seconds = time.monotonic() - start
    print(f"fastlora: CUTLASS kernels for {CUTLASS_ARCHITECTURE}, built in {seconds:.0f} s")
    module.sources += map(str, CUTLASS_BINDINGS)
    module.define_macros.append(("FASTLORA_CUTLASS", None))


def give_up(reason):
    for name, mode in MODES.items():
        if mode == "1":
            raise SystemExit(f"fastlora: {name}=1, but the extension cannot be built: {reason}")
    print(f"fastlora: installing without the C++ extension: {reason}")


def give_up_cuda(reason):
    if CUDA_MODE == "1":
        raise SystemExit(f"fastlora: FASTLORA_CUDA=1, but the kernels cannot be built: {reason}")
    if CUTLASS_MODE == "1":
        give_up_cutlass(reason)
    print(f"fastlora: building without CUDA kernels: {reason}")


def give_up_cutlass(reason):
    if CUTLASS_MODE == "1":
        raise SystemExit(f"fastlora: FASTLORA_CUTLASS=1, but the kernels cannot be built: {reason}")
    if CUTLASS_MODE == "auto":
        print(f"fastlora: building without the kernels on CUTLASS: {reason}")


def extension():
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    print("fastlora: building the C++ extension")
    # OpenMP is compiled in but not linked: its symbols are those of the runtime that torch has
    # loaded, as a second one would compete with it for the cores
    module = CppExtension(
        "fastlora._C",
        [str(path) for path in SOURCES if path not in (*CUDA_BINDINGS, *CUTLASS_BINDINGS)],
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
            reason = cuda_obstacle()
            if not reason:
                try:
                    add_cuda(module, Path(self.build_temp) / "cuda")
                except (subprocess.CalledProcessError, ValueError) as error:
                    reason = error
            if reason:
                give_up_cuda(reason)
            elif CUTLASS_MODE != "0" and not cutlass_obstacle():
                try:
                    add_cutlass(module, Path(self.build_temp) / "cutlass")
                except subprocess.CalledProcessError as error:
                    give_up_cutlass(error)
            super().build_extensions()

    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


for name, mode in MODES.items():
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"fastlora: {name} must be auto, 0 or 1, got {mode!r}")
if CUTLASS_MODE != "0" and (reason := cutlass_obstacle()):
    give_up_cutlass(reason)
reason = obstacle()
if reason:
    give_up(reason)
setup(**({} if reason else extension()))
