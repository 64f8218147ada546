"""Compiles every Triton kernel without a GPU, and says what each asks of one.

``python -m benchmarks.compile [--full] [--out FILE]``: registers, local and shared memory and the
instructions that matter, for each architecture, stage, dtype, rank and shape. Without ``--full``,
one case for each row of each table, and more of what is most used.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import torch

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
    # these take the tables of others
    "sm_86": ("cuda", 86, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx90a": ("hip", "gfx90a", 64),
    "gfx950": ("hip", "gfx950", 64),
}
# the most shared memory a program can have, from each vendor's manual: the compiler does not ask
SHARED_LIMIT = {
    "sm_80": 166_912,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "gfx942": 65_536,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_120": 101_376,
    "gfx90a": 65_536,
    "gfx950": 163_840,
}
# columns of the memory that sm_100 keeps accumulators in
TENSOR_LIMIT = 512
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
    "fp32 as tf32": (torch.float32, torch.float32),
    "bf16 under fp32": (torch.bfloat16, torch.float32),
    "fp16 under fp32": (torch.float16, torch.float32),
}
KINDS = {"16": "bf16", "mixed": "bf16 under fp32", "32": "fp32"}
# each way a kernel is specialised: for 1, for multiples of 16 and for others, on each tile of ranks
RANKS = (1, 8, 16, 24, 32, 40, 64, 100, 256)
SHAPES = ("even", "odd", "grouped", "interleaved", "few rows", "some rows")
COUNTED = ("HGMMA", "HMMA", "UTCHMMA", "UTMALDG", "LDGSTS", "LDL", "STL")


@dataclass(frozen=True)
class Case:
    """One launch to compile: a stage at a rank, dtype and shape."""

    stage: str
    architecture: str
    dtype: str
    r: int
    shape: str = "even"

    def __str__(self) -> str:
        shape = "" if self.shape == "even" else self.shape
        return f"{self.architecture:7} {self.stage:21} {self.dtype:16} r={self.r:<4}{shape:12}"


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel asks for; registers and local memory (bytes) are a thread's."""

    kernel: str
    launch: dict[str, int]
    registers: int
    local: int
    shared: int
    tensor: int
    scratch: int
    instructions: dict[str, int]

    def __str__(self) -> str:
        return (
            f"{self.registers:4} registers, {self.local:4} B local, {self.shared:7,} B shared, "
            + ", ".join(f"{count} {name}" for name, count in self.instructions.items())
        )


def cases(full: bool) -> Iterator[Case]:
    """What is compiled: all of it, or what CI has the time for."""
    from fastlora.kernels import configs

    if full:
        for architecture in TARGETS:
            for dtype in DTYPES:
                for stage in STAGES:
                    for shape in SHAPES:
                        for r in RANKS if shape == "even" else (1, 8, 64):
                            if _differs(stage, shape):
                                yield Case(stage, architecture, dtype, r, shape)
        return
    # an ordered set
    chosen: dict[Case, None] = {}
    for architecture in TARGETS:
        for stage, rows in configs.table(architecture).rows.items():
            for kind, most, best in rows:
                r = min(most or best.most_ranks, best.most_ranks)
                chosen[Case(stage, architecture, KINDS[kind], r)] = None
        for dtype in KINDS.values():
            if "under" not in dtype:
                chosen[Case("merge", architecture, dtype, 16)] = None
    for stage in STAGES:
        chosen[Case(stage, "sm_90", "bf16", 16)] = None
        if "p=0" not in stage:
            for shape in SHAPES[1:]:
                if _differs(stage, shape):
                    chosen[Case(stage, "sm_90", "bf16", 8, shape)] = None
        if stage.endswith("fused"):
            chosen[Case(stage, "sm_90", "fp16", 16)] = None
    yield from chosen


def _differs(stage: str, shape: str) -> bool:
    """Whether a kernel can be another there than at an even shape."""
    if "rows" in shape:
        return stage.startswith("shrink")
    # a fused product is taken only where it was measured
    if "fused" in stage:
        return shape == "even" or (stage, shape) == ("expand_fused", "grouped")
    if shape in ("grouped", "interleaved"):
        return stage in ("expand", "grad_expand", "delta")
    return True


def compile_all(wanted: list[Case], jobs: int) -> Iterator[tuple[Case, list[Resources] | str]]:
    """The kernels of each case, or why they do not compile."""
    with ProcessPoolExecutor(jobs) as pool:
        yield from zip(wanted, pool.map(compile_case, wanted), strict=True)


def compile_case(case: Case) -> list[Resources] | str:
    """The kernels of one case, or why they do not compile."""
    compiled: list[Resources] = []

    def compile_instead(
        kernel: Any, grid: object, device: object, args: tuple[Any, ...], meta: dict[str, Any]
    ) -> None:
        made = kernel.warmup(*args, grid=grid, **{"enable_fp_fusion": True, **meta})
        compiled.append(_resources(made, meta, case.architecture))

    from fastlora.kernels import launch, products

    precision = "tf32" if "tf32" in case.dtype else "ieee"
    _pretend(case.architecture)
    launch.architecture.cache_clear()
    output = StringIO()
    try:
        with (
            mock.patch.object(launch, "_start", compile_instead),
            mock.patch.object(launch, "_architecture", lambda device: case.architecture),
            mock.patch.object(torch.version, "hip", case.architecture[:3] == "gfx" or None),
            mock.patch.object(products, "base_precision", lambda: precision),
            # a failing assembler prints its whole input
            redirect_stdout(output),
        ):
            STAGES[case.stage](Operands(case))
    except Exception as error:
        lines = f"{type(error).__name__}: {error}".strip().splitlines()
        return " ... ".join(lines[:1] + lines[1:][-1:])
    return compiled


class Operands:
    """Tensors without memory of the shapes of one case."""

    def __init__(self, case: Case) -> None:
        from fastlora.kernels.layout import Layout

        dtype, of_factors = DTYPES[case.dtype]
        self.M, self.K, self.N = 65536, 4096, 4096
        spans: tuple[tuple[int, int, int, int], ...] = ((0, 4096, 0, 0),)
        repeats = 1
        if case.shape == "odd":
            self.M, self.K, self.N = 65535, 4093, 4095
            spans = ((0, 4095, 0, 0),)
        elif case.shape == "grouped":
            spans = ((0, 2048, 0, 0), (2048, 1024, 2048, 1), (3072, 1024, 3072, 2))
        elif case.shape == "interleaved":
            spans, repeats = ((0, 1, 0, 0), (1, 1, 1365, 1), (2, 1, 2730, 2)), 1365
            self.N = 3 * 1365
        elif "rows" in case.shape:
            self.M = {"few rows": 1, "some rows": 8192}[case.shape]
        if repeats * len(spans) > 1 and case.stage != "expand_fused":
            # one block is not adapted, which is another path
            spans = (*spans[:1], (*spans[1][:2], -1, -1), (*spans[2][:2], spans[1][2], 1))
        self.layout = Layout(spans, self.N // repeats, repeats)
        G = len(self.layout.adapted.spans)
        self.r = case.r

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        self.X = empty(self.M, self.K, dtype=dtype)
        self.W = empty(self.N, self.K, dtype=dtype)
        self.dY = empty(self.M, self.N, dtype=dtype)
        self.bias = empty(self.N, dtype=dtype)
        self.A = empty(G * self.r, self.K, dtype=of_factors)
        features = repeats * sum(s[1] for s in self.layout.adapted.spans)
        self.B = empty(features, self.r, dtype=of_factors)
        self.S = empty(self.M, G * self.r, dtype=torch.float32)
        self.mask = None
        if "p=0" not in case.stage:
            self.mask = empty(self.M, 4 * -(-self.K // 32), dtype=torch.uint8)
        self.seed = empty(1, dtype=torch.int64)


def _shrink(o: Operands) -> None:
    from fastlora.kernels.shrink import shrink

    shrink(o.X, o.A, 1.0, None, 0 if o.mask is None else 6554, o.seed)


def _expand(o: Operands) -> None:
    from fastlora.kernels.expand import expand_start

    expand_start(o.X, o.N, o.bias, o.S, o.B, o.layout)


def _expand_fused(o: Operands) -> None:
    from fastlora.kernels.expand import expand_fused

    expand_fused(o.X, o.W, o.bias, o.S, o.B, o.layout)


def _grad_expand(o: Operands) -> None:
    from fastlora.kernels.grad_expand import grad_expand

    grad_expand(o.dY, o.S, o.B, 1.0, None, o.layout, True, True)


def _grad_shrink(o: Operands) -> None:
    from fastlora.kernels.grad_shrink import grad_shrink

    grad_shrink(o.S, o.X, o.mask, o.A)


def _grad_input(o: Operands) -> None:
    from fastlora.kernels.grad_input import grad_input_start

    grad_input_start(o.dY, o.S, o.A, o.mask)


def _grad_input_fused(o: Operands) -> None:
    from fastlora.kernels.grad_input import grad_input_fused

    grad_input_fused(o.dY, o.W, o.S, o.A, o.mask)


def _delta(o: Operands) -> None:
    from fastlora.kernels.delta import delta

    delta(o.A, o.B, 1.0, None, o.layout)


def _merge(o: Operands) -> None:
    from fastlora.kernels.merge import add_low_rank

    left, right, rows, columns = (
        torch.empty(shape, dtype=torch.float64, device="meta")
        for shape in ((o.N, o.r), (o.r, o.K), (o.N, 1), (1, o.K))
    )
    add_low_rank(o.W, left, right, rows, columns)


STAGES: dict[str, Callable[[Operands], None]] = {
    "shrink": _shrink,
    "shrink, p=0": _shrink,
    "expand": _expand,
    "grad_expand": _grad_expand,
    "grad_shrink": _grad_shrink,
    "grad_shrink, p=0": _grad_shrink,
    "grad_input": _grad_input,
    "grad_input, p=0": _grad_input,
    "delta": _delta,
    "merge": _merge,
    "expand_fused": _expand_fused,
    "grad_input_fused": _grad_input_fused,
    "grad_input_fused, p=0": _grad_input_fused,
}


def _pretend(architecture: str) -> None:
    """Lets Triton compile for an architecture that is not here."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Absent:
        def get_current_target(self) -> Any:
            return GPUTarget(*TARGETS[architecture])

        def get_current_device(self) -> int:
            # kernels are kept by device
            return list(TARGETS).index(architecture)

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(Absent())


def _resources(made: Any, meta: dict[str, Any], architecture: str) -> Resources:
    about = made.metadata
    assembly = made.asm["amdgcn"] if architecture[:3] == "gfx" else made.asm["cubin"]
    registers, local, counts = (_of_amd if architecture[:3] == "gfx" else _of_nvidia)(assembly)
    return Resources(
        about.name,
        {key: n for key, n in meta.items() if key.startswith(("BLOCK", "num"))},
        registers,
        local,
        about.shared,
        getattr(about, "tmem_size", 0),
        getattr(about, "global_scratch_size", 0),
        counts,
    )


@lru_cache
def _of_amd(code: str) -> tuple[int, int, dict[str, int]]:
    """Registers, local memory and instructions."""
    registers = _number(r"\.vgpr_count:\s*(\d+)", code)
    # scalar registers are spilled to vector registers
    local = _number(r"\.private_segment_fixed_size:\s*(\d+)", code)
    found = Counter(re.findall(r"^\t([a-z]+)_\w+", code, re.M))
    matrix = len(re.findall(r"^\tv_mfma", code, re.M))
    return registers, local, {"MFMA": matrix, "all": found.total()}


@lru_cache
def _of_nvidia(cubin: bytes) -> tuple[int, int, dict[str, int]]:
    """The same."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "--print-code", "--no-dataflow", file.name)
    found = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z0-9]+)", code, re.M))
    # between programs
    del found["NOP"]
    counts = {op: found[op] for op in COUNTED if found[op]} | {"all": found.total()}
    local = sum(_number(rf"{kind}:(\d+)", usage) for kind in ("STACK", "LOCAL"))
    return _number(r"REG:(\d+)", usage), local, counts


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"no {pattern} in the compiler's report")
    return int(found[1])


def _tool(name: str, *args: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], check=True, capture_output=True, text=True).stdout


def main() -> int:
    """Prints a line for each kernel, and writes all of it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="every dtype, rank and shape")
    parser.add_argument("--only", default="", help="cases whose description has this in it")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    wanted = [case for case in cases(options.full) if options.only in str(case)]
    records = []
    failed = 0
    for case, result in compile_all(wanted, options.jobs):
        failed += isinstance(result, str)
        # the sum of parts is a kernel of its own, and the same for every stage
        print(case, result if isinstance(result, str) else result[0], flush=True)
        of_case = result if isinstance(result, str) else [asdict(k) for k in result]
        records.append({**asdict(case), "result": of_case})
    if options.out:
        options.out.write_text(json.dumps(records, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
