"""What a benchmark shows while and after it runs: through rich, or in plain lines without it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

try:
    import rich.box
    import rich.console
    import rich.progress
    import rich.table
except ImportError:
    RICH = False
else:
    RICH = True

# a log file has no width of its own: room for whole rows
LOG_WIDTH = 160


class Console:
    """Prints messages, tables and progress."""

    def __init__(self) -> None:
        self._rich: Any = None
        if RICH:
            console = rich.console.Console()
            self._rich = console if console.is_terminal else rich.console.Console(width=LOG_WIDTH)

    def print(self, text: str, style: str | None = None) -> None:
        """One message."""
        if self._rich:
            self._rich.print(text, style=style, markup=False)
        else:
            print(text, flush=True)

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Says what is being waited for."""
        if self._rich:
            with self._rich.status(text):
                yield
        else:
            self.print(f"{text} ...")
            yield

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The first column is text, the others are numbers; an empty row separates groups."""
        if not self._rich:
            lines = [list(row) for row in (header, *rows) if row]
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            self.print(f"\n{title}")
            for first, *others in lines:
                numbers = (f"{cell:>{w}}" for cell, w in zip(others, widths[1:], strict=True))
                self.print("  ".join([f"{first:<{widths[0]}}", *numbers]))
            return
        table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_style="bold")
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left", overflow="fold")
        for row in rows:
            if row:
                table.add_row(*row, style="bold" if row[0].strip() == "fastlora" else None)
            else:
                table.add_section()
        self._rich.print(table)

    @contextmanager
    def progress(self) -> Iterator["Progress"]:
        """Bars, each with a free ``status`` text at its end."""
        if not self._rich:
            yield Progress(self, None)
            return
        status = rich.progress.TextColumn(
            "{task.fields[status]}", table_column=rich.table.Column(no_wrap=True)
        )
        with rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=20),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            status,
            console=self._rich,
        ) as bars:
            yield Progress(self, bars)


class Progress:
    """A group of progress bars; without rich, a line where each begins."""

    def __init__(self, console: Console, bars: Any) -> None:
        self._console, self._bars = console, bars

    def add_task(self, description: str, total: int) -> Any:
        """A new bar."""
        if self._bars is None:
            self._console.print(f"{description} ...")
            return None
        return self._bars.add_task(description, total=total, status="")

    def update(self, task: Any, **changes: Any) -> None:
        """``completed`` or ``advance``, and ``status``."""
        if self._bars is not None:
            self._bars.update(task, **changes)
