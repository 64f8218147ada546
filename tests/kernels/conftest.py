"""Tests of kernels use what the benchmarks have."""

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"


def _find_benchmarks():
    """Makes the folder importable without the root on the path, where kernels/ would shadow."""
    spec = importlib.util.spec_from_file_location(
        "benchmarks", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)


if "benchmarks" not in sys.modules:
    _find_benchmarks()
