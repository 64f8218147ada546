"""What a layer costs beside its arithmetic, and two real shapes: ``pytest benchmarks/``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks import providers
from benchmarks.harness import synchronize
from benchmarks.shapes import Shape

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("pytest_benchmark")

# so small that the time is the host's: Python, dispatch, autograd
TINY = Shape(M=8, K=64, N=64, r=4, p=0.0)
SHAPES = {
    "tiny": TINY,
    "tiny, dropout": Shape(M=8, K=64, N=64, r=4, p=0.1),
    "512x768-768": Shape(M=512, K=768, N=768, r=8, p=0.1),
    "512x768-3072": Shape(M=512, K=768, N=3072, r=8, p=0.1),
    "512x768-2304 qkv": Shape(512, 768, 2304, r=8, p=0.1, enable_lora=(True, False, True)),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _case(provider: str, shape: Shape) -> providers.Case:
    try:
        return providers.providers()[provider](shape, providers.Inputs.make(shape, DEVICE))
    except providers.Skipped as reason:
        pytest.skip(f"{provider}: {reason}")


def _run(benchmark: BenchmarkFixture, step: Callable[[], object], group: str) -> None:
    def synchronous() -> None:
        step()
        synchronize(DEVICE)

    benchmark.group = group
    benchmark(synchronous)


@pytest.mark.parametrize("provider", list(providers.providers()))
def test_forward(benchmark: BenchmarkFixture, provider: str) -> None:
    case = _case(provider, TINY)
    with torch.no_grad():
        _run(benchmark, case.forward, "forward, tiny")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("provider", list(providers.providers()))
def test_step(benchmark: BenchmarkFixture, provider: str, shape: Shape) -> None:
    case = _case(provider, shape)
    _run(benchmark, case.step, f"forward + backward, {shape.label}, p={shape.p:g}")


TRITON_STAGES = ("shrink", "expand_start", "grad_expand", "grad_shrink", "grad_input_start")


@pytest.mark.parametrize("stage", TRITON_STAGES)
def test_a_triton_stage(
    benchmark: BenchmarkFixture, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's time until Triton is called: no kernel is started."""
    pytest.importorskip("triton")
    from benchmarks import bench_stages
    from fastlora.kernels import launch

    monkeypatch.setattr(launch, "_start", lambda *call: None)
    monkeypatch.setattr(launch, "_architecture", lambda device: "sm_90")
    launch.architecture.cache_clear()
    step = bench_stages.kernels(bench_stages.Operands(TINY, torch.device("cpu")))[stage].step
    benchmark.group = "a Triton stage, before Triton"
    benchmark(step)
    launch.architecture.cache_clear()
