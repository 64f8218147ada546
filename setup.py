"""The optional C++ extension; all else is declared in pyproject.toml.

FASTLORA_BUILD says what to do about it: ``auto`` (default) builds it where that is possible,
``1`` makes it an error not to, ``0`` leaves it out.
"""

import os
import shutil
from pathlib import Path

from setuptools import setup

MODE = os.environ.get("FASTLORA_BUILD", "auto")
# merging depends on the order of roundings: no contraction but where the source says fma
COMPILE_ARGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fopenmp"]
SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))


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


def give_up(reason):
    if MODE == "1":
        raise SystemExit(f"fastlora: FASTLORA_BUILD=1, but the extension cannot be built: {reason}")
    print(f"fastlora: installing without the C++ extension: {reason}")


def extension():
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                give_up(error)

    print("fastlora: building the C++ extension")
    include = [str(Path(folder).absolute()) for folder in ("csrc", "csrc/cpu")]
    # OpenMP is compiled in but not linked: its symbols are those of the runtime that torch has
    # loaded, as a second one would compete with it for the cores
    module = CppExtension(
        "fastlora._C", SOURCES, include_dirs=include, extra_compile_args=COMPILE_ARGS
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


if MODE not in ("auto", "0", "1"):
    raise SystemExit(f"fastlora: FASTLORA_BUILD must be auto, 0 or 1, got {MODE!r}")
reason = obstacle()
if reason:
    give_up(reason)
setup(**({} if reason else extension()))
