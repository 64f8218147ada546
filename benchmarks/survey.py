"""Shape after shape: what was measured is written at once, and no later failure loses it."""

import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, report
from benchmarks.terminal import Console

# what compilers may have of the time, and the most where it has no limit
COMPILE_SHARE, COMPILE_SECONDS = 0.4, 300.0


@dataclass(frozen=True)
class Found:
    """All measurements, and what was not measured: by name, with the reason.

    Attributes:
        rows: What was measured.
        skipped: Cannot run here, or its turn did not come.
        failed: Ran, and was wrong or broke down; never timed.
    """

    rows: list[Any] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def markdown(self) -> str:
        """What failed and what was skipped."""
        parts = (
            report.skipped_markdown(self.failed, "Failed"),
            report.skipped_markdown(self.skipped),
        )
        return "\n".join(part for part in parts if part)

    def conclude(self, folder: Path, console: Console) -> int:
        """Say what is missing and where the rest is; gives the exit status back."""
        for name, reason in self.skipped.items():
            console.print(f"skipped: {name}: {reason}", style="yellow")
        for name, reason in self.failed.items():
            console.print(f"failed: {name}: {reason}", style="red")
        console.print(f"written to {folder}")
        return 1 if self.failed else 0


@dataclass(frozen=True)
class Clock:
    """When a program has to be done; no ``minutes``, no end."""

    minutes: float | None = None
    begin: float = field(default_factory=time.perf_counter)

    def is_up(self) -> bool:
        """Whether nothing more is to begin."""
        return self.minutes is not None and self._left() <= 0

    def to_compile(self) -> float:
        """Seconds for compiling ahead."""
        if self.minutes is None:
            return COMPILE_SECONDS
        return min(COMPILE_SECONDS, COMPILE_SHARE * max(0.0, self._left()))

    def late(self) -> str:
        """Why something has not begun."""
        return f"its turn had not come after {self.minutes:g} minutes"

    def _left(self) -> float:
        return self.begin + 60 * (self.minutes or 0) - time.perf_counter()


def add_minutes(parser: ArgumentParser) -> None:
    """The option ``--minutes``."""
    said = "what has not begun by then is left out, compiling included"
    parser.add_argument("--minutes", type=float, help=said)


def visit(
    title: str,
    shapes: Mapping[str, Any],
    measure: Callable[[Any], None],
    save: Callable[[], None],
    found: Found,
    device: torch.device,
    clock: Clock,
    console: Console,
) -> bool:
    """Measure each shape in turn and save after it; False where the device was lost on the way.

    Args:
        title: What the shapes are.
        shapes: By what they are called in the report.
        measure: Adds to ``found`` what it finds at a shape; what it raises is reported, too.
        save: Writes what was found until then.
        found: All findings.
        device: What is measured on.
        clock: When no other shape is begun.
        console: Shows where the program is.
    """
    with console.progress() as progress:
        task = progress.add_task(title, total=len(shapes))
        for label, shape in shapes.items():
            if clock.is_up():
                found.skipped[label] = clock.late()
                continue
            progress.update(task, status=label)
            try:
                _report_errors(label, measure, shape, found)
                harness.check_device(device)
            except harness.DeviceLost as error:
                found.failed["the run ended early"] = f"at {label}: {error}"
                save()
                return False
            save()
            progress.update(task, advance=1)
    save()
    return True


def _report_errors(label: str, measure: Callable[[Any], None], shape: Any, found: Found) -> None:
    try:
        measure(shape)
    except harness.DeviceLost:
        raise
    except Exception as error:
        found.failed[label] = harness.first_line(error)
