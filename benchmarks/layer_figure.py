"""The figure of ``bench_layer``: one line a layer, one mark a provider."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import report
from benchmarks.providers import BASELINE

if TYPE_CHECKING:
    from benchmarks.bench_layer import Row


# of a provider that has none of its own
MARKER, COLOUR = "*", "#000000"


def _drawn(rows: Sequence["Row"]) -> list[str]:
    """The providers in the order of their marks; the baseline is a line."""
    found = dict.fromkeys(row.provider for row in rows if row.provider != BASELINE)
    known = [name for name in report.MARKERS if name in found]
    return [*known, *(name for name in found if name not in known)]


def _panel(
    axes: Any,
    rows: Sequence["Row"],
    labels: Sequence[str],
    value: Callable[["Row"], tuple[float, float, float]],
) -> None:
    names = _drawn(rows)
    step = min(0.16, 0.8 / len(names))
    for index, name in enumerate(names):
        mine = [row for row in rows if row.provider == name]
        low, middle, high = zip(*map(value, mine), strict=True)
        # a small offset keeps marks of equal value apart
        at = [labels.index(_label(row)) + step * (index - (len(names) - 1) / 2) for row in mine]
        colour = report.COLOURS.get(name, COLOUR)
        axes.hlines(at, low, high, color=colour, linewidth=2, alpha=0.45)
        axes.plot(
            middle,
            at,
            report.MARKERS.get(name, MARKER),
            color=colour,
            label=name,
            markersize=6 if name == "fastlora" else 5,
            markeredgecolor="white",
            markeredgewidth=0.6,
        )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    for line in range(1, len(labels)):
        axes.axhline(line - 0.5, color="#F0F0F0", linewidth=0.8, zorder=0)


def _label(row: "Row") -> str:
    return f"{row.shape.label}, r={row.shape.r}"


def draw(rows: Sequence["Row"], path: Path) -> None:
    """Save the figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = report.paper_style()
    labels = list(dict.fromkeys(map(_label, rows)))
    dropout = sorted({row.shape.p for row in rows})
    height = 0.36 * max(1, len(_drawn(rows)) / 5)
    figure, panels = pyplot.subplots(
        1,
        len(dropout) + 1,
        figsize=(3.6 * (len(dropout) + 1) + 1, height * len(labels) + 1.7),
        sharey=True,
        layout="constrained",
    )
    for p, axes in zip(dropout, panels[:-1], strict=True):
        here = [row for row in rows if row.shape.p == p]
        spread = [(r.vs_frozen.low, r.vs_frozen.median, r.vs_frozen.high) for r in here]
        values = dict(zip(map(id, here), spread, strict=True))
        _panel(axes, here, labels, lambda row, values=values: values[id(row)])
        axes.axvline(1, color=report.COLOURS[BASELINE], linewidth=1.2, linestyle="--")
        axes.set_title(f"Time, dropout {p:g}")
        axes.set_xlabel("forward + backward, × frozen nn.Linear")
    saving = [row for row in rows if row.shape.p == dropout[-1]]
    _panel(panels[-1], saving, labels, lambda row: (row.saved / 2**20,) * 3)
    panels[-1].set_xscale("log")
    panels[-1].set_title(f"Saved for backward, dropout {dropout[-1]:g}")
    panels[-1].set_xlabel("MiB besides the input (log)")
    handles, names = panels[0].get_legend_handles_labels()
    columns = min(len(names), 2 * len(panels))
    figure.legend(handles, names, loc="outside upper right", ncols=columns)
    figure.savefig(path)
    pyplot.close(figure)
