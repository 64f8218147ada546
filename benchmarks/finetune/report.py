"""The report of a fine-tuning run: tables, Markdown, JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.finetune import methods
from benchmarks.finetune.checks import AdapterCheck, Parity
from benchmarks.finetune.tasks import Quality, Task
from benchmarks.finetune.train import WARMUP, Result
from benchmarks.terminal import Console


@dataclass(frozen=True)
class Outcome:
    """Everything a fine-tuning run found out."""

    task: Task
    steps: int
    seed: int
    before: Quality
    results: Mapping[str, Result]
    parity: Parity
    adapter: AdapterCheck | None
    skipped: dict[str, str]


def _tiny(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def results_table(outcome: Outcome) -> report.Table:
    """One line a method."""
    rows = [
        [
            name,
            f"{r.trainable:,}",
            f"{r.seconds.median * 1e3:.0f}",
            report.ratio(r.ratio),
            report.mib(r.memory.saved),
            report.mib(r.memory.peak),
            report.mib(r.memory.resident),
            f"{r.quality.loss:.3f}",
            f"{r.quality.score:.1f} ± {r.quality.error:.1f}",
        ]
        for name, r in outcome.results.items()
    ]
    header = (
        "method",
        "trained",
        "step ms",
        "× loralib",
        "saved MiB",
        "step peak MiB",
        "resident MiB",
        "held-out loss",
        outcome.task.score_name,
    )
    return report.Table(f"Fine-tuning {outcome.task.model_name}", header, rows)


def parity_table(parity: Parity) -> report.Table:
    """How far the loss curves of the libraries are apart."""
    rows = [
        [name, *(_tiny(value) for value in (d.first, d.largest, d.relative))]
        for name, d in parity.differences().items()
    ]
    steps = max(map(len, parity.losses.values()), default=0)
    header = ("losses", "first step", "largest", "largest, relative")
    return report.Table(f"Without LoRA dropout: difference over {steps} steps", header, rows)


def adapter_table(outcome: Outcome) -> report.Table:
    """The trained fastlora adapter, served three ways."""
    check = outcome.adapter
    named = {"as trained": check.trained, "from its file": check.reloaded, "merged": check.merged}
    rows = [
        [name, f"{q.loss:.7f}", _tiny(q.loss - check.trained.loss), f"{q.score:.4f}"]
        for name, q in named.items()
    ]
    header = ("fastlora adapter", "held-out loss", "difference", outcome.task.score_name)
    return report.Table("The trained adapter", header, rows)


def _adapter_sentence(check: AdapterCheck) -> str:
    state = "bit for bit" if check.restored else "NOT bit for bit"
    return (
        f"The adapter's file has {check.file_bytes:,} bytes. "
        f"After unmerging, the weights are back {state}.\n"
    )


def tables(outcome: Outcome) -> list[report.Table]:
    """All tables of the report."""
    found = [results_table(outcome)]
    if outcome.parity.differences():
        found.append(parity_table(outcome.parity))
    return found + ([adapter_table(outcome)] if outcome.adapter else [])


def _protocol(outcome: Outcome) -> str:
    task = outcome.task
    return (
        f"{task.describe()} {outcome.steps} steps of {task.batch_size}, AdamW, rate going down to "
        f"zero; LoRA r={methods.RANK}, alpha={methods.ALPHA}, dropout {methods.DROPOUT} on "
        f"{', '.join(task.targets)}. Same data, seeds, head and factors in all methods, which take "
        f"turns step by step; the first {WARMUP} steps are not timed. Ratios: median and quartiles "
        f"of the ratio within a step. ±: standard error of the held-out sample. Before training: "
        f"loss {outcome.before.loss:.3f}, {task.score_name}: {outcome.before.score:.1f}.\n"
    )


def _record(outcome: Outcome, device: Any) -> dict[str, Any]:
    task = outcome.task
    return report.record_head(device) | {
        "task": task.name,
        "model": task.model_name,
        "targets": task.targets,
        "rank": methods.RANK,
        "alpha": methods.ALPHA,
        "dropout": methods.DROPOUT,
        "batch_size": task.batch_size,
        "steps": outcome.steps,
        "seed": outcome.seed,
        "score": task.score_name,
        "before": asdict(outcome.before),
        "results": {name: asdict(result) for name, result in outcome.results.items()},
        "parity": {
            "losses": outcome.parity.losses,
            "differences": {k: asdict(d) for k, d in outcome.parity.differences().items()},
        },
        "adapter": asdict(outcome.adapter) if outcome.adapter else None,
        "skipped": outcome.skipped,
    }


def publish(outcome: Outcome, device: Any, folder: Path, console: Console) -> None:
    """Print the tables; write JSON, Markdown and the figure."""
    shown = tables(outcome)
    for table in shown:
        table.show(console)
    stem = f"finetune-{outcome.task.name}"
    picture = ""
    try:
        from benchmarks.finetune.figure import draw

        draw(outcome, folder / f"{stem}.png")
        picture = f"![Loss, time, memory and quality of each method]({stem}.png)\n"
    except ImportError:
        outcome.skipped["figure"] = "matplotlib is not installed"
    record = _record(outcome, device)
    parts = [
        f"# Fine-tuning {outcome.task.model_name}\n",
        _protocol(outcome),
        report.environment_markdown(record["environment"]),
        picture,
        *(table.markdown() for table in shown),
        _adapter_sentence(outcome.adapter) if outcome.adapter else "",
        report.skipped_markdown(outcome.skipped),
    ]
    report.write(folder, stem, record, "\n".join(part for part in parts if part))
    if outcome.adapter:
        console.print(_adapter_sentence(outcome.adapter).strip())
    for name, reason in outcome.skipped.items():
        console.print(f"skipped: {name}: {reason}", style="yellow")
    console.print(f"written to {folder}")
