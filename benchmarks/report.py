"""Tables, files and colours that all benchmarks share."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import environment, machine_slug
from benchmarks.harness import Spread
from benchmarks.terminal import Console

RESULTS = Path(__file__).parent / "results"
# Okabe and Ito's palette, safe for colour-blind readers; one colour a method in all figures
COLOURS = {
    "loralib": "#E69F00",
    "PEFT": "#56B4E9",
    "PEFT compiled": "#CC79A7",
    "fastlora": "#D55E00",
    "fastlora (reference)": "#0072B2",
    "fastlora (native)": "#F0A07A",
    "fastlora (triton)": "#B8860B",
    "fastlora (cutlass)": "#6A3D9A",
    "fastlora (fused)": "#8F2F00",
    "PyTorch chain": "#555555",
    "PyTorch chain, compiled": "#AA4499",
    "addmm order": "#009E73",
    "LoRAFusion's dataflow": "#332288",
    "full fine-tuning": "#009E73",
    "head only": "#8C8C8C",
    "frozen linear": "#8C8C8C",
}
MARKERS = {
    "loralib": "s",
    "PEFT": "^",
    "PEFT compiled": "v",
    "PyTorch chain": "P",
    "PyTorch chain, compiled": "X",
    "addmm order": "<",
    "LoRAFusion's dataflow": "h",
    "fastlora (reference)": "D",
    "fastlora (native)": "p",
    "fastlora (triton)": ">",
    "fastlora (cutlass)": "H",
    "fastlora (fused)": "d",
    "fastlora": "o",
}


@dataclass(frozen=True)
class Table:
    """One table, for the terminal and for Markdown.

    Attributes:
        title: Shown above.
        header: Column names; the first column is text, the others are numbers.
        rows: Cells, formatted; an empty row separates groups.
        note: Shown below.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def show(self, console: Console) -> None:
        """Print it."""
        console.table(self.title, self.header, self.rows)
        if self.note:
            console.print(self.note)

    def markdown(self) -> str:
        """As a GitHub table under a heading."""
        lines = [
            "| " + " | ".join(self.header) + " |",
            "|:--" + "|--:" * (len(self.header) - 1) + "|",
        ]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows if row]
        note = f"\n{self.note}\n" if self.note else ""
        return f"## {self.title}\n\n" + "\n".join(lines) + "\n" + note


def starred(text: str, host_bound: bool) -> str:
    """A time, marked where it includes the host's."""
    return text + "*" * host_bound


def host_note(rows: Sequence[Any]) -> str:
    """What the mark says, where one of ``rows`` has it."""
    if not any(row.host_bound for row in rows):
        return ""
    return "With an asterisk: the device had to wait for the host, whose time is included."


def ratio(spread: Spread | None) -> str:
    """Median and quartiles of a ratio; the baseline itself is 1."""
    if spread is None:
        return "–"
    if spread.low == spread.median == spread.high == 1:
        return "1"
    return f"{spread.median:.2f} [{spread.low:.2f}–{spread.high:.2f}]"


def mib(count: float) -> str:
    """Bytes in MiB."""
    value = count / 2**20
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}" if value else "0"


def environment_markdown(env: dict[str, Any]) -> str:
    """Two lines on machine and software."""
    versions = ", ".join(f"{k} {v}" for k, v in env["packages"].items() if v)
    return (
        f"{env['device']}, {env['cores']} cores, {env['threads']} threads, {env['platform']}. "
        f"Python {env['python']}, {versions}; fastlora's path: {env['path']}; "
        f"commit {env['commit']}; {env['date']}.\n"
    )


def skipped_markdown(skipped: dict[str, str], title: str = "Skipped") -> str:
    """What is missing from the report, and why."""
    if not skipped:
        return ""
    return f"## {title}\n\n" + "".join(f"- {k}: {v}\n" for k, v in skipped.items())


def folder_for(device: Any, out: Path | None) -> Path:
    """Where results go: ``out``, or the folder of this machine."""
    folder = out or RESULTS / machine_slug(device)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(folder: Path, stem: str, record: dict[str, Any], markdown: str) -> None:
    """The raw record as JSON and the report as Markdown."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^][{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text)
    write_whole(folder / f"{stem}.json", text + "\n")
    write_whole(folder / f"{stem}.md", markdown)


def write_whole(path: Path, text: str) -> None:
    """Write a file such that whoever is killed meanwhile leaves the one that was there."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def record_head(device: Any) -> dict[str, Any]:
    """How every record starts."""
    return {"environment": environment(device)}


def paper_style() -> Any:
    """Matplotlib's pyplot, with plain axes and readable type.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "figure.dpi": 100,
            "savefig.dpi": 200,
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#E4E4E4",
            "grid.linewidth": 0.8,
            "legend.frameon": False,
        }
    )
    return pyplot
