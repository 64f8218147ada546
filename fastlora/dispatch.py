"""Which backend is the fastest for a layer: measured, as data, in one table a device.

The package's tables lie in ``tables/<device>.json``; those of ``fastlora tune`` in the user's
cache, and their rows go before the package's. Nothing is read before the first choice.
"""

import json
import math
import platform
import re
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from os import getpid
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.environment import variable
from fastlora.version import __version__

SHIPPED = Path(__file__).parent / "tables"
# of the files; another one is not read
FORMAT = 1
# a row says something about sizes up to so many times its own, or as many times smaller
FACTOR = 2.0
FACTOR_OF_M = 4.0
# as much faster a backend has to be to take the place of the safe choice
MARGIN = 0.03

_NAMED = ("float32", "bfloat16", "float16", "float64")
DTYPES = {name: getattr(torch, name) for name in _NAMED}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Case(NamedTuple):
    """What a choice depends on, besides the device.

    Args:
        M: Tokens; None: any number of them.
        K: Input features.
        N: Output features, of all blocks together.
        r: Rank.
        dtype: That of x.
        factors: That of A and B.
        dropout: Whether it is active.
    """

    M: int | None
    K: int
    N: int
    r: int
    dtype: torch.dtype
    factors: torch.dtype
    dropout: bool

    @classmethod
    def of(cls, X: Tensor, W: Tensor, B: Tensor, dropout: bool) -> "Case | None":
        """That of a call.

        While it is compiled, for any M, as a choice by M would be a guard on it; None where the
        graph is for layers of any size, too.
        """
        N, K = W.shape
        r = B.shape[1]
        if not torch.compiler.is_compiling():
            return cls(X.shape[0], K, N, r, X.dtype, B.dtype, dropout)
        from torch.fx.experimental.symbolic_shapes import has_static_value

        known = has_static_value(K) and has_static_value(N) and has_static_value(r)
        return cls(None, K, N, r, X.dtype, B.dtype, dropout) if known else None

    def __str__(self) -> str:
        return f"{self.sizes}, {self.dtypes}, {'' if self.dropout else 'no '}dropout"

    @property
    def sizes(self) -> str:
        """In words: ``(M, K, N), r``."""
        M = "any" if self.M is None else self.M
        return f"({M}, {self.K}, {self.N}), r={self.r}"

    @property
    def dtypes(self) -> str:
        """In words: that of x and, where it is another, ``/`` that of the factors."""
        return "/".join(dict.fromkeys(_NAMES[of] for of in (self.dtype, self.factors)))


@dataclass(frozen=True)
class Row:
    """What was measured for one case.

    Args:
        case: For which sizes and dtypes.
        ms: Median milliseconds of forward and backward of each backend whose results were right.
        failed: Backends whose results were not, with what was wrong.
        absent: Backends that were not usable, with the reason.
        threads: Of torch, on a CPU.
        date: The day, as in 2026-01-31.
    """

    case: Case
    ms: Mapping[str, float]
    failed: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None
    date: str = ""

    def ranking(self) -> list[str]:
        """The backends that were right, the fastest first."""
        return sorted(self.ms, key=self.ms.__getitem__)

    def better(self, safe: str) -> list[str]:
        """The backends to be taken before the safe choice, the best first.

        All that were right where that one was not; none where it was not measured.
        """
        if safe in self.failed:
            return self.ranking()
        limit = (1 - MARGIN) * self.ms.get(safe, 0.0)
        return [name for name in self.ranking() if self.ms[name] <= limit]

    def __str__(self) -> str:
        times = [f"{name} {self.ms[name]:.3g} ms" for name in self.ranking()]
        return ", ".join([*times, *(f"{name} failed" for name in self.failed)])

    @classmethod
    def parse(cls, found: Any) -> "Row":
        """A row from its JSON value; raises ValueError, KeyError or TypeError where it is none."""
        M, K, N, r = sizes = [found[name] for name in "MKNr"]
        if not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"sizes {sizes}, expected positive integers")
        ms = {str(name): float(ms) for name, ms in found["ms"].items()}
        if not all(0 < value < math.inf for value in ms.values()):
            raise ValueError(f"times {ms}, expected positive numbers")
        dtype, factors = (DTYPES[found[name]] for name in ("dtype", "factors"))
        failed, absent = (
            {str(name): str(reason) for name, reason in found[notes].items()}
            for notes in ("failed", "absent")
        )
        case = Case(M, K, N, r, dtype, factors, bool(found["dropout"]))
        return cls(case, ms, failed, absent, found["threads"], str(found["date"]))

    def as_json(self) -> dict[str, Any]:
        """The row as plain data."""
        case = self.case._asdict()
        dtypes = {name: _NAMES[case[name]] for name in ("dtype", "factors")}
        fields = ("ms", "failed", "absent", "threads", "date")
        return {**case, **dtypes, **{name: getattr(self, name) for name in fields}}


@dataclass(frozen=True)
class Table:
    """The rows of one file.

    Args:
        device: Name of the device they were measured on.
        versions: Of the packages they were measured with.
        rows: By case.
    """

    device: str
    versions: Mapping[str, str | None]
    rows: Mapping[Case, Row]

    @classmethod
    def parse(cls, text: str) -> "Table":
        """A table from its JSON text; raises ValueError, KeyError or TypeError where it is none."""
        found = json.loads(text)
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}, expected {FORMAT}")
        rows = [Row.parse(row) for row in found["rows"]]
        return cls(found["device"], dict(found["versions"]), {row.case: row for row in rows})

    def __str__(self) -> str:
        dates = [row.date for row in self.rows.values()]
        return (
            f"{len(self.rows)} rows, measured on {self.device}, {max(dates, default='never')}, "
            f"{_listed(self.versions)}"
        )

    def as_text(self) -> str:
        """The file: a row a line."""
        head = {"format": FORMAT, "device": self.device, "versions": self.versions}
        fields = ",\n ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in head.items())
        rows = ",\n  ".join(json.dumps(row.as_json()) for row in self.rows.values())
        return f'{{\n {fields},\n "rows": [\n  {rows}\n ]\n}}\n'


@lru_cache(maxsize=1 << 14)
def better(safe: str, device: str, case: tuple[Any, ...]) -> tuple[str, ...]:
    """The backends to be taken before the safe choice, the best first; often none.

    Args:
        safe: What is taken where nothing near was measured.
        device: Type of the device.
        case: What is to be run: a :class:`Case`, or its fields.
    """
    row = nearest(device, Case(*case))
    return () if row is None else tuple(row.better(safe))


def nearest(device: str, case: Case) -> Row | None:
    """The row to go by, or None where nothing near was measured.

    The nearest one by the logarithms of M, K, N and r together; for any M, that of the largest.

    Args:
        device: Type of the device.
        case: What is to be run.
    """
    found = ((_distance(row.case, case), -(row.case.M or 0), row) for row in rows(device).values())
    near = [entry for entry in found if entry[0] < math.inf]
    return min(near, key=lambda entry: entry[:2])[2] if near else None


def _distance(measured: Case, case: Case) -> float:
    """Infinite where the one says nothing about the other."""
    if measured[4:] != case[4:]:
        return math.inf
    total = 0.0
    for ours, theirs, factor in zip(
        measured[:4], case[:4], (FACTOR_OF_M, FACTOR, FACTOR, FACTOR), strict=True
    ):
        if ours is None or theirs is None:
            continue
        apart = abs(math.log2(ours / theirs)) if theirs else math.inf
        total += apart if apart <= math.log2(factor) else math.inf
    return total


@lru_cache
def rows(device: str) -> Mapping[Case, Row]:
    """All rows for a type of device: the package's, and before them the user's.

    Of several GPUs, those of the one that is current when they are first asked for.
    """
    return {case: row for table in tables(device).values() for case, row in table.rows.items()}


def tables(device: str) -> dict[Path, Table]:
    """The tables in use for a type of device, by file; the user's comes last.

    A file that cannot be used is left out, with a warning.
    """
    name = device_name(device)
    if name is None:
        return {}
    shipped = SHIPPED / file_name(name)
    found = {shipped: read(shipped)}
    try:
        users = cache() / file_name(name)
    except RuntimeError as error:
        warnings.warn(f"fastlora runs without tables of this user: {error}", stacklevel=2)
    else:
        found[users] = read(users, own=True)
    return {path: table for path, table in found.items() if table is not None}


def read(path: Path, own: bool = False) -> Table | None:
    """The table in a file; None, with a warning, where it cannot be used, or where there is none.

    Args:
        path: The file.
        own: It counts only if it was measured with the packages that are installed.
    """
    try:
        table = Table.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        if not own or table.versions == versions():
            return table
        reason = f"measured with {_listed(table.versions)}, this is {_listed(versions())}"
    warnings.warn(
        f"fastlora does not use the table {path} ({reason}); `fastlora tune` makes a new one",
        stacklevel=2,
    )
    return None


def store(path: Path, device: str, rows: Iterable[Row]) -> None:
    """Adds rows to a file, at once and whole, also while other processes do.

    Rows for the same cases are replaced; so is a file that cannot be used any more.

    Args:
        path: The file.
        device: Type of the device that they were measured on.
        rows: What to add.

    Raises:
        OSError: the file cannot be written; it is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent):
        before = read(path, own=True)
        merged = {**(before.rows if before else {}), **{row.case: row for row in rows}}
        table = Table(device_name(device) or device, versions(), merged)
        draft = path.with_name(f".{path.name}.{getpid()}.{threading.get_ident()}")
        try:
            draft.write_text(table.as_text(), encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    forget()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds other processes off; where the system has no such locks, the last to write wins."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def forget() -> None:
    """Reads the tables anew at the next choice."""
    better.cache_clear()
    rows.cache_clear()


def user_file(device: str) -> Path:
    """The user's table of this device.

    Args:
        device: Type of the device.

    Raises:
        ValueError: there is no such device here.
        RuntimeError: it is not known where the user's files are.
    """
    name = device_name(device)
    if name is None:
        raise ValueError(f"device: got {device!r}, expected cpu, or cuda where torch finds a GPU")
    return cache() / file_name(name)


def cache() -> Path:
    """The folder of the user's tables: ``FASTLORA_CACHE``, or the usual one of the system.

    Raises:
        RuntimeError: it is not known where the user's files are.
    """
    if own := variable("FASTLORA_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "win32":
        return Path(variable("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "fastlora"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fastlora"
    return Path(variable("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlora"


def file_name(device_name: str) -> str:
    """That of a device's table."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


def device_name(device: str) -> str | None:
    """The CPU's model, or the name of the current GPU; None where there is none.

    Args:
        device: Type of the device.
    """
    if device == "cpu":
        return _cpu_name()
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Those that a measurement depends on."""
    try:
        triton: str | None = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {"fastlora": __version__, "torch": str(torch.__version__), "triton": triton}


def _listed(versions: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'absent'}" for name, version in versions.items())
