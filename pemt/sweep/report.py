"""What a sweep found: a table (sweep.md, sweep.csv) and a bar chart (sweep.png)."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pemt.storage import replacing, write_text
from pemt.sweep.plan import Sweep

TABLE, CSV, CHART = "sweep.md", "sweep.csv", "sweep.png"
SCORE = "test_average_metrics"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A method on a task.

    Args:
        scores: seed -> the mean of the task's metrics on its test set, in percent; finished runs alone.
        expected: how many seeds there are to be.
        trained: number of trained parameters; None where it is not known.
        published: somebody else's number, in percent; None where none is at hand.
    """

    method: str
    task: str
    scores: dict[int, float]
    expected: int
    trained: int | None
    published: float | None = None

    @property
    def mean(self) -> float | None:
        """Over the finished seeds; None where there is none."""
        return mean(self.scores.values()) if self.scores else None

    @property
    def std(self) -> float | None:
        """Of a sample: divided by the number of seeds less one."""
        return stdev(self.scores.values()) if len(self.scores) > 1 else None

    def __str__(self) -> str:
        if self.mean is None:
            return "–"
        text = f"{self.mean:.1f}" + ("" if self.std is None else f" ± {self.std:.1f}")
        missing = len(self.scores) < self.expected
        return f"{text} ({len(self.scores)} of {self.expected})" if missing else text


def write_report(sweep: Sweep) -> str:
    """Write table and chart into the sweep's folder (rank 0 calls).

    Returns:
        The table, and where the files lie.
    """
    cells = cells_of(sweep)
    table = markdown(sweep, cells)
    folder = sweep.output_dir
    write_text(folder / TABLE, table + "\n")
    write_text(folder / CSV, comma_separated(cells))
    draw(sweep, cells, folder / CHART)
    return f"{table}\n{folder / TABLE}, {folder / CSV}, {folder / CHART}"


def cells_of(sweep: Sweep) -> list[Cell]:
    """Every method on every task, in the sweep's order."""
    cells = []
    for task, method in product(sweep.tasks, sweep.methods):
        runs = [run for run in sweep.runs if (run.task, run.method) == (task, method)]
        finished = [run for run in runs if run.finished]
        cells.append(
            Cell(
                method=method,
                task=task,
                scores={run.seed: float(run.results[SCORE]) for run in finished},
                expected=len(runs),
                trained=finished[0].trained if finished else None,
                published=sweep.published.get(method, {}).get(task),
            )
        )
    return cells


def markdown(sweep: Sweep, cells: list[Cell]) -> str:
    """A row a method: trained parameters, each task's mean ± standard deviation, the mean over tasks."""
    lines = [
        f"| method | trained | {' | '.join(sweep.tasks)} | mean |",
        f"|---|---:|{'---:|' * (len(sweep.tasks) + 1)}",
    ]
    for method in sweep.methods:
        ours = [cell for cell in cells if cell.method == method]
        means = [cell.mean for cell in ours if cell.mean is not None]
        over_tasks = f"{mean(means):.1f}" if len(means) == len(ours) else "–"
        trained = max((cell.trained or 0 for cell in ours), default=0)
        shown = f"{trained:,}" if trained else ""
        lines.append(f"| {method} | {shown} | {' | '.join(map(str, ours))} | {over_tasks} |")
    seeds = ", ".join(map(str, sweep.seeds))
    note = f"Mean of each task's test metrics in percent, ± standard deviation over seeds {seeds}."
    return "\n".join([*lines, "", note, *beside_published(sweep, cells)])


def beside_published(sweep: Sweep, cells: list[Cell]) -> list[str]:
    """A row a task of every method that has published numbers: ours, theirs, the difference."""
    if not sweep.published:
        return []
    lines = ["", "| task | method | ours | published | difference |", "|---|---|---:|---:|---:|"]
    for cell in (cell for cell in cells if cell.method in sweep.published):
        theirs = gap = "–"
        if cell.published is not None:
            theirs = f"{cell.published:.2f}"
            gap = gap if cell.mean is None else f"{cell.mean - cell.published:+.2f}"
        lines.append(f"| {cell.task} | {cell.method} | {cell} | {theirs} | {gap} |")
    return [*lines, "", f"Published: {sweep.published_by}. –: no source at hand."]


def comma_separated(cells: list[Cell]) -> str:
    """A line a method and task; `scores` has those of single seeds, as `seed=score`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "method", "trained", "seeds", "mean", "std", "scores", "published"])
    for cell in cells:
        scores = " ".join(f"{seed}={score}" for seed, score in cell.scores.items())
        writer.writerow(
            [
                *(cell.task, cell.method, cell.trained, len(cell.scores)),
                *(cell.mean, cell.std, scores, cell.published),
            ]
        )
    return text.getvalue()


def draw(sweep: Sweep, cells: list[Cell], path: Path) -> None:
    """Bars grouped by task, a colour a method, whiskers of one standard deviation."""
    width = 0.8 / len(sweep.methods)
    size = (2 + len(sweep.tasks) * max(1.2, 0.45 * len(sweep.methods)), 4)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, method in enumerate(sweep.methods):
        ours = [cell for cell in cells if cell.method == method]
        axes.bar(
            [place + (number + 0.5) * width - 0.4 for place in range(len(ours))],
            [cell.mean or 0.0 for cell in ours],
            width,
            yerr=[cell.std or 0.0 for cell in ours],
            capsize=3,
            label=method,
        )
    axes.set_xticks(range(len(sweep.tasks)), sweep.tasks)
    lowest = min((cell.mean or 0.0) - (cell.std or 0.0) for cell in cells)
    axes.set_ylim(min(0.0, lowest), 100)
    axes.set_ylabel("mean of the test metrics, %")
    figure.legend(loc="outside upper center", ncols=min(len(sweep.methods), 4))
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
