"""Fair timing: every method is measured in every round, in a rotating order."""

import gc
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

Step = Callable[[], object]
# a step's seconds, and whether the device had to wait for the host
Timer = Callable[[Step], tuple[float, bool]]

# more than any L2 cache, so that no method finds its operands left there by the one before
L2_FLUSH_BYTES = 256 * 2**20
# about a millisecond of queued work: the host is ahead by then, and events time kernels only
BACKLOG_CYCLES = 2_000_000
# where the host is not ahead yet it gets more, up to this: a step that waits itself never is
MOST_BACKLOG_CYCLES = 8 * BACKLOG_CYCLES


class DeviceLost(RuntimeError):
    """A kernel left the device unusable: this process can measure nothing more on it."""


class Samples(dict[str, list[float]]):
    """Seconds of each method in each round.

    Attributes:
        host_bound: Methods whose launches the device had to wait for, even behind the largest
            backlog: their seconds include the host's.
    """

    def __init__(self, *args: Any, **names: Any) -> None:
        super().__init__(*args, **names)
        self.host_bound: set[str] = set()


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
    timer: Timer = _cuda_timer(device) if device.type == "cuda" else _wall_clock
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
                    seconds, late = timer(step)
                    of_step = samples.setdefault(what, Samples())
                    of_step.setdefault(name, []).append(seconds)
                    if late:
                        of_step.host_bound.add(name)
    return samples


def in_processes(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], seconds: float | None = None
) -> list[Any]:
    """Results of ``function`` on each of ``calls``, or the exception that came instead.

    Kernels compiled there need not be compiled again here: compilers keep what they made on disk. A
    process that ends, or whose device is lost, costs the call that it ran, and a new one goes on.

    Args:
        function: To be found by its name in a module.
        calls: Arguments of each call; the first begin first.
        seconds: What is not done by then is ended, and its result is a ``TimeoutError``.
    """
    end = None if seconds is None else time.perf_counter() + seconds
    jobs = max(1, min(12, (os.cpu_count() or 1) - 1))
    results: list[Any] = [TimeoutError("not done in time") for _ in calls]
    todo = deque(range(len(calls)))
    started: list[Any] = []
    free: list[tuple[Any, Any]] = []
    # by its pipe, a process and the call that it is at
    busy: dict[Any, tuple[Any, int]] = {}
    try:
        while todo or busy:
            while todo and len(busy) < jobs:
                if not free:
                    free.append(_worker(function))
                    started.append(free[-1][1])
                pipe, process = free.pop()
                index = todo.popleft()
                busy[pipe] = process, index
                # that nobody is there any more is seen below
                with suppress(OSError):
                    pipe.send(calls[index])
            left = None if end is None else max(0.0, end - time.perf_counter())
            ready = wait(list(busy), left)
            if not ready:
                break
            for pipe in ready:
                process, index = busy.pop(pipe)
                results[index], goes_on = _answer(pipe, process)
                if goes_on:
                    free.append((pipe, process))
    finally:
        for process in started:
            process.kill()
            # one that the device does not let go of is not waited for
            process.join(5)
    return results


def _worker(function: Callable[..., Any]) -> tuple[Any, Any]:
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, function))
    process.start()
    # or the end of the process would not be seen
    there.close()
    return here, process


def _serve(pipe: Connection, function: Callable[..., Any]) -> None:
    goes_on = True
    while goes_on:
        try:
            args = pipe.recv()
        except EOFError:
            # nobody asks any more
            return
        try:
            result = function(*args)
        except Exception as error:
            result = error
        if torch.cuda.is_initialized():
            try:
                check_device(torch.device("cuda"))
            except DeviceLost as error:
                # whatever came after it would fail as well
                result, goes_on = error, False
        pipe.send((result, goes_on))
    # a lost device may not let go of the process
    os._exit(1)


def _answer(pipe: Connection, process: Any) -> tuple[Any, bool]:
    """A call's result, and whether its process takes another."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        process.join()
        return RuntimeError(f"its process ended with exit code {process.exitcode}"), False
    except Exception as error:
        # an exception that cannot be made anew from its arguments
        return error, True


def synchronize(device: torch.device) -> None:
    """Wait for queued work; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_device(device: torch.device) -> None:
    """Wait for queued work, and see whether the device can still do more.

    Raises:
        DeviceLost: It cannot.
    """
    try:
        synchronize(device)
        torch.ones(1, device=device).item()
    except torch.OutOfMemoryError:
        pass
    except Exception as error:
        raise DeviceLost(f"the device is lost: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What went wrong, without a traceback."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _wall_clock(step: Step) -> tuple[float, bool]:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start, False


def _cuda_timer(device: torch.device) -> Timer:
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device)
    backlog: dict[Step, int] = {}

    def timer(step: Step) -> tuple[float, bool]:
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
                return begin.elapsed_time(end) / 1e3, late
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
