"""The figure of a fine-tuning run: losses on top, time, memory and quality below."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import report
from benchmarks.finetune.checks import TRUTH

if TYPE_CHECKING:
    from benchmarks.finetune.report import Outcome

# equal curves lie on top of each other: a broad, a dashed and a dotted line show all three
LINES: dict[str, dict[str, Any]] = {
    "loralib": {"linewidth": 4.5, "alpha": 0.75},
    "PEFT": {"linewidth": 2.2},
    "fastlora": {"linewidth": 1.5, "linestyle": (0, (4, 2))},
}


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, out = 0.0, []
    for index, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**index))
    return out


def _losses(axes: Any, outcome: "Outcome") -> None:
    for name, result in outcome.results.items():
        colour = report.COLOURS[name]
        axes.plot(result.losses, color=colour, linewidth=0.6, alpha=0.2)
        line = {"linewidth": 1.8} | LINES.get(name, {})
        axes.plot(_smooth(result.losses), color=colour, label=name, **line)
    axes.set_title("Training loss")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy, nats")
    axes.set_xlim(0, outcome.steps - 1)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _parity(axes: Any, outcome: "Outcome") -> None:
    losses = outcome.parity.losses
    truth = losses.get(TRUTH, [])
    for name in (name for name in losses if name != TRUTH and truth):
        gaps = [abs(a - b) for a, b in zip(losses[name], truth, strict=True)]
        line = {"linewidth": 1.8} | LINES.get(name, {})
        axes.plot(gaps, color=report.COLOURS[name], label=name, **line)
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-8)  # equal losses have no place on a logarithmic axis
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("Rounding: distance from float64")
    axes.set_xlabel("step, no LoRA dropout")
    axes.set_ylabel("|loss − float64 loss|, nats")


def _bars(
    axes: Any, outcome: "Outcome", values: list[float], labels: list[str], title: str, unit: str
) -> Any:
    names = list(outcome.results)
    bars = axes.barh(names, values, height=0.66, color=[report.COLOURS[n] for n in names])
    axes.bar_label(bars, labels, padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * (1.15 + 0.02 * max(map(len, labels))))
    axes.set_title(title)
    axes.set_xlabel(unit)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return bars


def draw(outcome: "Outcome", path: Path) -> None:
    """Save the figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = report.paper_style()
    results = list(outcome.results.values())
    figure = pyplot.figure(figsize=(10, 6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    left, right = top.subplots(1, 2, width_ratios=(1.7, 1))
    _losses(left, outcome)
    _parity(right, outcome)

    time, space, quality = bottom.subplots(1, 3, sharey=True)
    seconds = [r.seconds.median * 1e3 for r in results]
    shown = [
        f"{ms:.0f}" + (f"  (×{r.ratio.median:.2f})" if r.ratio else "")
        for ms, r in zip(seconds, results, strict=True)
    ]
    _bars(time, outcome, seconds, shown, "Step time", "ms (× loralib), median")

    peak = [r.memory.peak / 2**20 for r in results]
    saved = [r.memory.saved / 2**20 for r in results]
    both = [f"{s:.0f} / {p:.0f}" for s, p in zip(saved, peak, strict=True)]
    for bar in _bars(
        space,
        outcome,
        peak,
        both,
        "Memory of a step",
        "MiB: saved for backward (dark) / peak (light)",
    ):
        bar.set_alpha(0.45)
    names = list(outcome.results)
    space.barh(names, saved, height=0.66, color=[report.COLOURS[n] for n in names])

    score = [r.quality.score for r in results]
    error = [r.quality.error for r in results]
    loss = [r.quality.loss for r in results]
    text = [
        f"{s:.1f} ± {e:.1f}  (loss {v:.2f})" for s, e, v in zip(score, error, loss, strict=True)
    ]
    _bars(quality, outcome, score, text, "Held-out quality", outcome.task.score_name)

    handles, names = left.get_legend_handles_labels()
    top.legend(handles, names, loc="outside upper center", ncols=len(names))
    figure.savefig(path)
    pyplot.close(figure)
