"""Fair timing: every method is measured in every round, in a rotating order."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch

Step = Callable[[], object]
Samples = dict[str, list[float]]

# more than any L2 cache, so that no method finds its operands left there by the one before
L2_FLUSH_BYTES = 256 * 2**20
# about a millisecond of queued work: the host is ahead by then, and events time kernels only
BACKLOG_CYCLES = 2_000_000
# where the host is not ahead yet it gets more, up to this: a step that waits itself never is
MOST_BACKLOG_CYCLES = 8 * BACKLOG_CYCLES


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of one quantity over all rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise ``values``; a single value is its own quartiles."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def rotated(names: Sequence[str], round_index: int) -> list[str]:
    """The order of one round: each method leads, and follows each neighbour, equally often."""
    shift = round_index % len(names)
    order = [*names[shift:], *names[:shift]]
    return order if (round_index // len(names)) % 2 == 0 else order[::-1]


def ratios(samples: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Spread]:
    """Time relative to ``baseline``, divided round by round before taking the median.

    Slow drifts of the machine (clock, neighbours) hit both halves of a ratio and cancel.
    """
    base = samples[baseline]
    return {
        name: Spread.of([value / reference for value, reference in zip(values, base, strict=True)])
        for name, values in samples.items()
    }


def time_rounds(
    steps: Mapping[str, Step],
    device: torch.device,
    *,
    budget_s: float = 2.0,
    min_rounds: int = 7,
    max_rounds: int = 60,
) -> Samples:
    """Seconds of each step in each round.

    Args:
        steps: What to time, by name.
        device: On CUDA, the time between two events around the step; on a CPU, wall-clock time.
        budget_s: Rounds go on until this much time is spent, within the two limits below.
        min_rounds: Fewest rounds.
        max_rounds: Most rounds.
    """
    cycles = {name: {"step": step} for name, step in steps.items()}
    return time_cycles(
        cycles, device, budget_s=budget_s, min_rounds=min_rounds, max_rounds=max_rounds
    )["step"]


def time_cycles(
    cycles: Mapping[str, Mapping[str, Step]],
    device: torch.device,
    *,
    budget_s: float,
    min_rounds: int,
    max_rounds: int,
) -> dict[str, Samples]:
    """Like :func:`time_rounds`, for methods of several steps that follow each other in one turn.

    Returns:
        The seconds by step, then by method.
    """
    timer = _cuda_timer(device) if device.type == "cuda" else _wall_clock
    names = list(cycles)
    samples: dict[str, Samples] = {}
    with _no_gc():
        # a step is compiled when it first runs: that is not to be timed, nor waited for
        for cycle in cycles.values():
            for step in cycle.values():
                step()
        synchronize(device)
        for cycle in cycles.values():
            for step in cycle.values():
                timer(step)
        start = time.perf_counter()
        for index in range(max_rounds):
            if index >= min_rounds and time.perf_counter() - start > budget_s:
                break
            for name in rotated(names, index):
                for what, step in cycles[name].items():
                    samples.setdefault(what, {}).setdefault(name, []).append(timer(step))
    return samples


def in_processes(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], seconds: float | None = None
) -> list[Any]:
    """Results of ``function`` on each of ``calls``, or the exception that came instead.

    Kernels compiled there need not be compiled again here: compilers keep what they made on disk.

    Args:
        function: To be found by its name in a module.
        calls: Arguments of each call; the first begin first.
        seconds: What has not begun by then is left out, and its result is a ``TimeoutError``.
    """
    end = None if seconds is None else time.perf_counter() + seconds
    jobs = max(1, min(12, (os.cpu_count() or 1) - 1))
    results: list[Any] = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        try:
            waiting = [pool.submit(function, *call) for call in calls]
        except BrokenProcessPool as error:
            return [error] * len(calls)
        for future in waiting:
            try:
                left = None if end is None else max(0.0, end - time.perf_counter())
                results.append(future.result(left))
            except Exception as error:
                results.append(error)
        pool.shutdown(cancel_futures=True)
    return results


def synchronize(device: torch.device) -> None:
    """Wait for queued work; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _wall_clock(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _cuda_timer(device: torch.device) -> Callable[[Step], float]:
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device)
    backlog: dict[Step, int] = {}

    def timer(step: Step) -> float:
        while True:
            cycles = backlog.get(step, BACKLOG_CYCLES)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(cycles)
            begin.record()
            step()
            end.record()
            late = begin.query()
            end.synchronize()
            if not late or cycles >= MOST_BACKLOG_CYCLES:
                return begin.elapsed_time(end) / 1e3
            backlog[step] = 2 * cycles

    return timer


@contextmanager
def _no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
