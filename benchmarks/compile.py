"""Compiles every Triton kernel without a GPU, and says what each asks of one.

``python -m benchmarks.compile [--full] [--out FILE]``: registers, spills, shared memory and the
instructions that matter, for each architecture, dtype, rank and stage.
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
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
# the most shared memory a program can have, from each vendor's manual: the compiler does not ask
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
    "bf16 under fp32": (torch.bfloat16, torch.float32),
    "fp16 under fp32": (torch.float16, torch.float32),
}
RANKS = (8, 16, 64, 256)
COUNTED = ("HGMMA", "HMMA", "UTCHMMA", "UTMALDG", "LDGSTS", "LDL", "STL")
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Case:
    """One launch to compile: a stage at a shape."""

    stage: str
    architecture: str
    dtype: str
    r: int
    layout: str = "single"
    aligned: bool = True


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel asks for; registers are a thread's."""

    kernel: str
    shared: int
    registers: int
    spilled: int
    scratch: int
    instructions: dict[str, int]


def cases(full: bool) -> Iterator[Case]:
    """What is compiled: all of it, or what CI has the time for."""
    for architecture in ARCHITECTURES:
        for dtype in DTYPES if full or architecture == "sm_90" else ("bf16", "fp32"):
            for stage in STAGES:
                for r in RANKS if full else (16, 64):
                    yield Case(stage, architecture, dtype, r)
                if full:
                    yield Case(stage, architecture, dtype, 3, aligned=False)
                    yield Case(stage, architecture, dtype, 16, layout="grouped")


def compile_all(wanted: list[Case], jobs: int) -> Iterator[tuple[Case, list[Resources] | str]]:
    """The kernels of each case, or why they do not compile."""
    with ProcessPoolExecutor(jobs) as pool:
        yield from zip(wanted, pool.map(compile_case, wanted), strict=True)


def compile_case(case: Case) -> list[Resources] | str:
    """The kernels of one case, or why they do not compile."""
    compiled: list[Any] = []

    def compile_instead(
        kernel: Any, grid: object, device: object, args: tuple[Any, ...], meta: dict[str, Any]
    ) -> None:
        compiled.append(kernel.warmup(*args, grid=grid, **meta, enable_fp_fusion=True))

    from fastlora.kernels import launch

    _pretend(case.architecture)
    launch.architecture.cache_clear()
    output = StringIO()
    try:
        with (
            mock.patch.object(launch, "_start", compile_instead),
            mock.patch.object(launch, "_architecture", lambda device: case.architecture),
            mock.patch.object(
                torch.version, "hip", "1" if case.architecture.startswith("gfx") else None
            ),
            # a failing assembler prints its whole input
            redirect_stdout(output),
        ):
            STAGES[case.stage](Operands(case))
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    # the sum of parts is a kernel of its own, and the same for every stage
    return [_resources(kernel, case.architecture) for kernel in compiled]


class Operands:
    """Tensors without memory of the shapes of one case."""

    def __init__(self, case: Case) -> None:
        from fastlora.kernels.layout import Layout

        dtype, of_factors = DTYPES[case.dtype]
        self.M, self.K, self.N = (8192, 4096, 4096) if case.aligned else (8191, 4093, 4095)
        third = self.N // 3 // 16 * 16
        grouped = ((0, third, 0, 0), (third, third, -1, -1), (2 * third, third, third, 1))
        if case.layout == "grouped":
            self.N = 3 * third
        self.layout = (
            Layout(grouped, self.N)
            if case.layout == "grouped"
            else Layout(((0, self.N, 0, 0),), self.N)
        )
        G = len(self.layout.adapted.spans)
        self.r = case.r

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        self.X = empty(self.M, self.K, dtype=dtype)
        self.W = empty(self.N, self.K, dtype=dtype)
        self.dY = empty(self.M, self.N, dtype=dtype)
        self.bias = empty(self.N, dtype=dtype)
        self.A = empty(G * self.r, self.K, dtype=of_factors)
        self.B = empty(sum(s[1] for s in self.layout.adapted.spans), self.r, dtype=of_factors)
        self.S = empty(self.M, G * self.r, dtype=torch.float32)
        self.mask = empty(self.M, 4 * -(-self.K // 32), dtype=torch.uint8)
        self.seed = empty(1, dtype=torch.int64)


def _shrink(o: Operands) -> None:
    from fastlora.kernels.shrink import shrink

    shrink(o.X, o.A, 1.0, None, 6554, o.seed)


def _shrink_all(o: Operands) -> None:
    from fastlora.kernels.shrink import shrink

    shrink(o.X, o.A, 1.0, None, 0, None)


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


STAGES: dict[str, Callable[[Operands], None]] = {
    "shrink": _shrink,
    "shrink, p=0": _shrink_all,
    "expand": _expand,
    "grad_expand": _grad_expand,
    "grad_shrink": _grad_shrink,
    "grad_input": _grad_input,
    "delta": _delta,
    "expand_fused": _expand_fused,
    "grad_input_fused": _grad_input_fused,
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
            return ARCHITECTURES.index(architecture)

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(Absent())


def _resources(kernel: Any, architecture: str) -> Resources:
    name, shared = kernel.metadata.name, kernel.metadata.shared
    scratch = getattr(kernel.metadata, "global_scratch_size", 0)
    if architecture.startswith("gfx"):
        registers = _number(r"\.vgpr_count:\s*(\d+)", kernel.asm["amdgcn"])
        spilled = _number(r"\.vgpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"])
        matrix = len(re.findall(r"^\s*v_mfma", kernel.asm["amdgcn"], re.M))
        return Resources(name, shared, registers, spilled, scratch, {"MFMA": matrix})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "--print-code", file.name)
    found = Counter(
        match.partition(".")[0]
        for match in re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z0-9.]+)", code, re.M)
    )
    counts = {op: found[op] for op in COUNTED if found[op]} | {"all": found.total()}
    return Resources(
        name, shared, _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage), scratch, counts
    )


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
    parser.add_argument("--full", action="store_true", help="every dtype and rank everywhere")
    parser.add_argument("--only", default="", help="cases whose description has this in it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    wanted = [case for case in cases(options.full) if options.only in str(case)]
    records = []
    failed = 0
    for case, result in compile_all(wanted, options.jobs):
        failed += isinstance(result, str)
        described = f"{case.architecture:7} {case.stage:17} {case.dtype:16} r={case.r:<4}"
        if case.layout != "single" or not case.aligned:
            described += f"{case.layout}{'' if case.aligned else ', odd'} "
        if isinstance(result, str):
            print(f"{described} {result}", flush=True)
        else:
            main_kernel = result[0]
            print(
                f"{described} {main_kernel.registers:4} registers, {main_kernel.spilled} spilled, "
                f"{main_kernel.shared:7,} B shared, {main_kernel.instructions}",
                flush=True,
            )
        of_case = result if isinstance(result, str) else [asdict(k) for k in result]
        records.append({**asdict(case), "result": of_case})
    if options.out:
        options.out.write_text(json.dumps(records, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
