"""``fastlora tune``: checks and times the backends here, for the choice that ``auto`` makes.

A backend is timed only at shapes where its output and gradients pass the rule of
:mod:`fastlora.testing`. All take turns, so that what slows the machine down slows all of them. The
rows go to the user's table of the device, each as soon as it is measured.

The sizes of Triton's tiles are another thing: ``python -m benchmarks.tune`` measures those.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path

import torch

from fastlora import backends, checks, dispatch, testing
from fastlora.dispatch import DTYPES, Case, Row
from fastlora.functional import block_lora_linear
from fastlora.testing import Inputs

Step = Callable[[], object]
Dtypes = tuple[torch.dtype, torch.dtype]


@dataclass(frozen=True)
class Plan:
    """The cases to measure: all combinations.

    Args:
        shapes: M, K and N.
        ranks: Those of the factors.
        dtypes: Of x and of the factors.
        dropout: Its probabilities; a row tells only 0 from the rest.
    """

    shapes: Sequence[tuple[int, int, int]]
    ranks: Sequence[int]
    dtypes: Sequence[Dtypes]
    dropout: Sequence[float] = (0.0, 0.1)


_F32, _BF16 = torch.float32, torch.bfloat16
# the reach of a row considered, few shapes say something about most layers
DEFAULTS = {
    "cpu": Plan(
        shapes=[
            (M, *layer) for layer in ((768, 768), (768, 3072), (3072, 768)) for M in (32, 512, 4096)
        ],
        ranks=[8],
        dtypes=[(_F32, _F32)],
    ),
    "cuda": Plan(
        shapes=[
            (M, *layer)
            for layer in ((2048, 2048), (4096, 4096), (4096, 14336), (14336, 4096))
            for M in (2048, 8192)
        ],
        ranks=[16, 64],
        dtypes=[(_BF16, _BF16), (_BF16, _F32)],
    ),
}


@dataclass(frozen=True)
class Effort:
    """How long a backend is timed at one shape.

    Args:
        rounds: At least so many.
        seconds: Rounds go on until this is over for all backends together.
        most: At most so many rounds.
        sample: Seconds that one sample takes at least; a short step is repeated.
    """

    rounds: int
    seconds: float
    most: int = 100
    sample: float = 0.002


NORMAL = Effort(rounds=9, seconds=1.0)
QUICK = Effort(rounds=5, seconds=0.2)


def tune(
    device: str | None = None,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    ranks: Sequence[int] | None = None,
    dtypes: Sequence[Dtypes] | None = None,
    dropout: Sequence[float] | None = None,
    *,
    quick: bool = False,
    output: Path | None = None,
    each: Callable[[Row], object] = lambda row: None,
    progress: Callable[[str], object] = lambda text: None,
) -> list[Row]:
    """Checks, then times forward and backward of every usable backend, and stores the rows.

    Every row is in the file as soon as it is measured, also where an exception ends this early.

    Args:
        device: "cpu" or "cuda"; None: "cuda" where torch finds a GPU.
        shapes: M, K and N of each layer; None, as below: what is usual on such a device.
        ranks: Ranks of the factors.
        dtypes: Pairs: that of x and the weight, and that of the factors.
        dropout: Probabilities; a row tells only 0 from the rest.
        quick: Few rounds.
        output: The file; None: that of this device in the user's cache.
        each: Called with each row.
        progress: Called with what is done now, in words.

    Returns:
        The rows, one for each combination that fits the device's memory.

    Raises:
        ValueError: no such device here, or sizes, dtypes or probabilities that are none.
        OSError: the file cannot be written.
        RuntimeError: it is not known where the user's files are.
    """
    device = device or usual_device()
    plan = make_plan(device, shapes, ranks, dtypes, dropout)
    path = output or dispatch.user_file(device)
    combinations = list(product(plan.shapes, plan.ranks, plan.dtypes, plan.dropout))
    # before anything is measured in vain
    dispatch.store(path, device, [])
    rows = []
    for index, ((M, K, N), r, (dtype, factors), p) in enumerate(combinations):
        case = Case(M, K, N, r, dtype, factors, p > 0)
        progress(f"{index + 1} of {len(combinations)}: {case}")
        try:
            row = measure(case, device, p, QUICK if quick else NORMAL)
        except torch.OutOfMemoryError:
            progress(f"left out, as it does not fit the memory: {case}")
            continue
        dispatch.store(path, device, [row])
        rows.append(row)
        each(row)
    return rows


def usual_device() -> str:
    """The type of device that is measured where none is given."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_plan(
    device: str,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    ranks: Sequence[int] | None = None,
    dtypes: Sequence[Dtypes] | None = None,
    dropout: Sequence[float] | None = None,
) -> Plan:
    """What :func:`tune` measures; raises ValueError for what cannot be."""
    if device not in DEFAULTS or dispatch.device_name(device) is None:
        raise ValueError(f"device: got {device!r}, expected cpu, or cuda where torch finds a GPU")
    usual = DEFAULTS[device]
    plan = Plan(
        usual.shapes if shapes is None else shapes,
        usual.ranks if ranks is None else ranks,
        usual.dtypes if dtypes is None else dtypes,
        usual.dropout if dropout is None else dropout,
    )
    for shape in plan.shapes:
        if len(shape) != 3 or not all(type(size) is int and size > 0 for size in shape):
            raise ValueError(f"shapes: got {shape!r}, expected positive M, K and N")
    for r in plan.ranks:
        if type(r) is not int or r < 1:
            raise ValueError(f"ranks: got {r!r}, expected positive integers")
    for dtype, factors in plan.dtypes:
        if dtype not in testing.DTYPES or factors not in (dtype, torch.float32):
            raise ValueError(
                f"dtypes: got {dtype} with factors of {factors}, expected one of "
                f"{', '.join(map(str, testing.DTYPES))} with factors of the same or torch.float32"
            )
    for p in plan.dropout:
        checks.probability("dropout", p)
    return plan


def measure(case: Case, device: str, p: float, effort: Effort = NORMAL) -> Row:
    """The row of one case: which backends are right, and the time of these.

    Args:
        case: Sizes and dtypes.
        device: Type of the device.
        p: Dropout probability.
        effort: How long it may take.
    """
    M, K, N, r, dtype, factors, _ = case
    if M is None:
        raise ValueError("case.M: got None, expected a number of tokens")
    absent = _absent(device)
    draws = testing.make_draws(M, K, N, r, p=p, dtype=dtype, factor_dtype=factors, device=device)
    usable = [name for name in backends.NAMES if name not in absent]
    failed = wrong(usable, draws)
    steps = {name: _step(draws[0], name) for name in usable if name not in failed}
    return Row(
        case,
        time_steps(steps, device, effort),
        failed,
        absent,
        threads=torch.get_num_threads() if device == "cpu" else None,
        date=date.today().isoformat(),
    )


def _absent(device: str) -> dict[str, str]:
    """The backends that cannot be measured, and why."""
    reasons = backends.available(device)
    if device == "cpu":
        reasons["triton"] = reasons["triton"] or "Triton's interpreter is for tests"
    return {name: reason for name, reason in reasons.items() if reason is not None}


def wrong(names: Sequence[str], draws: Sequence[Inputs]) -> dict[str, str]:
    """The backends whose output or gradients break the rule of :mod:`fastlora.testing`, and how.

    Args:
        names: Of the backends.
        draws: Inputs to be judged together.
    """
    plain = testing.stacked(map(testing.composition, draws))
    exact = testing.stacked(map(testing.truth, draws))
    found = {}
    for name in names:
        try:
            got = testing.stacked(testing.fused(inputs, name) for inputs in draws)
            testing.assert_no_worse(got, plain, exact)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever it is, such a backend is not to be taken
            found[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return found


def _step(inputs: Inputs, backend: str) -> Step:
    """A layer's forward and backward in training."""
    x, A, B = (t.detach().requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B))

    def step() -> object:
        y = block_lora_linear(
            x,
            inputs.weight,
            A,
            B,
            scaling=inputs.scaling,
            blocks=inputs.blocks,
            bias=inputs.bias,
            p=inputs.p,
            seed=inputs.seed,
            backend=backend,
        )
        return torch.autograd.grad(y, (x, A, B), inputs.grad)

    return step


def time_steps(steps: Mapping[str, Step], device: str, effort: Effort) -> dict[str, float]:
    """Median milliseconds of each step; in every round each has its turn.

    Args:
        steps: By name.
        device: Type of the device.
        effort: How long it may take.
    """
    names = list(steps)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with _no_gc():
        repeats = {name: _repeats(step, device, effort) for name, step in steps.items()}
        end = time.perf_counter() + effort.seconds
        for index in range(effort.most if names else 0):
            if index >= effort.rounds and time.perf_counter() > end:
                break
            for name in names if index % 2 else reversed(names):
                samples[name].append(_seconds(steps[name], device, repeats[name]))
    # no clock tells more digits
    return {name: float(f"{1e3 * statistics.median(s):.4g}") for name, s in samples.items()}


def _repeats(step: Step, device: str, effort: Effort) -> int:
    """How often a step is run for one sample; it is warm then."""
    for _ in range(2):
        _seconds(step, device, 1)
    return max(1, round(effort.sample / _seconds(step, device, 1)))


def _seconds(step: Step, device: str, repeats: int) -> float:
    """Of one run, the host's share included: what a training waits for."""
    _synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    _synchronize(device)
    return (time.perf_counter() - begin) / repeats


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def _no_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# ---- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--device", choices=DEFAULTS, help="default: cuda where there is a GPU")
    parser.add_argument(
        "--shape", type=_shape, nargs="+", metavar="MxKxN", help="layers to measure"
    )
    parser.add_argument("--rank", type=int, nargs="+", metavar="R", help="ranks of the factors")
    parser.add_argument(
        "--dtype",
        type=_dtypes,
        nargs="+",
        metavar="X[/FACTORS]",
        help="dtypes of x and, where another, of the factors: bfloat16/float32",
    )
    parser.add_argument("--dropout", type=float, nargs="+", metavar="P", help="default: 0 and 0.1")
    parser.add_argument("--output", type=Path, help="the file, instead of the one in your cache")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--list", action="store_true", help="print the rows in use, and no more")
    parser.add_argument("--clear", action="store_true", help="remove your table, and no more")


def run(options: argparse.Namespace) -> int:
    """The command.

    Returns:
        0; 1 where a backend was wrong or the file cannot be written, 2 for options that do not
        fit, 130 after Ctrl-C.
    """
    device = options.device or usual_device()
    try:
        plan = make_plan(device, options.shape, options.rank, options.dtype, options.dropout)
        path = options.output or dispatch.user_file(device)
    except (ValueError, RuntimeError) as error:
        return _end(2, f"error: {error}")
    try:
        if options.clear:
            return _clear(path)
        if options.list:
            return _list(device)
        return _tune(device, plan, options.quick, path)
    except OSError as error:
        return _end(1, f"error: {error}")
    except KeyboardInterrupt:
        return _end(130, f"interrupted; what was measured is in {path}")


def _tune(device: str, plan: Plan, quick: bool, path: Path) -> int:
    print(_line(_HEAD))
    rows = tune(
        device,
        plan.shapes,
        plan.ranks,
        plan.dtypes,
        plan.dropout,
        quick=quick,
        output=path,
        each=lambda row: print(_line(_cells(row, device)), flush=True),
        progress=_say,
    )
    for name, reason in {k: v for row in rows for k, v in row.absent.items()}.items():
        _say(f"not measured: {name}: {reason}")
    wrong = [f"{name} at {row.case}: {of}" for row in rows for name, of in row.failed.items()]
    for text in wrong:
        _say(f"wrong, and kept out: {text}")
    return _end(1 if wrong else 0, f"{len(rows)} rows in {path}")


def _list(device: str) -> int:
    found = dispatch.tables(device)
    print(_line(_HEAD))
    for row in dispatch.rows(device).values():
        print(_line(_cells(row, device)))
    for path, table in found.items():
        _say(f"{path}: {table}")
    yours = dispatch.user_file(device)
    return 0 if found else _end(0, f"there is no table of this device yet; yours will be {yours}")


def _clear(path: Path) -> int:
    there = path.exists()
    path.unlink(missing_ok=True)
    dispatch.forget()
    return _end(0, f"removed {path}" if there else f"there is no {path}")


_HEAD = (
    "M",
    "K",
    "N",
    "r",
    "dtype",
    "dropout",
    *(f"{name}, ms" for name in backends.NAMES),
    "auto",
)
_WIDTHS = (7, 7, 7, 4, 17, 8, *(len(name) + 6 for name in backends.NAMES), 11)


def _cells(row: Row, device: str) -> list[str]:
    case = row.case
    times = [
        f"{row.ms[name]:.3g}" if name in row.ms else "wrong" if name in row.failed else "-"
        for name in backends.NAMES
    ]
    chosen = backends.select("auto", device, case.dtype, case).name
    sizes = [str(size) for size in case[:4]]
    return [*sizes, case.dtypes, "yes" if case.dropout else "no", *times, chosen]


def _line(cells: Sequence[str]) -> str:
    return "".join(cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=True))


def _say(text: str) -> None:
    print(f"fastlora tune: {text}", file=sys.stderr, flush=True)


def _end(status: int, text: str) -> int:
    _say(text)
    return status


def _shape(text: str) -> tuple[int, int, int]:
    try:
        M, K, N = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected MxKxN") from None
    return M, K, N


def _dtypes(text: str) -> Dtypes:
    dtype, _, factors = text.partition("/")
    try:
        return DTYPES[dtype], DTYPES[factors or dtype]
    except KeyError as error:
        expected = ", ".join(DTYPES)
        raise argparse.ArgumentTypeError(f"got {error.args[0]!r}, expected {expected}") from None
