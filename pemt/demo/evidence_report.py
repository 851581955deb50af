"""The evidence's table: every row's accuracy beside PEMT's, seed by seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from pemt.monitor import LOG_FILE, read_log
from pemt.storage import write_text
from pemt.sweep import Run

TABLE, OUTCOMES = "evidence.md", "evidence.json"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run's.

    Args:
        row, world, target, seed: which run this is.
        accuracy: on the test set, in percent.
        learning_rate: the one that validation chose for this row, world and target.
        trained: number of trained parameters.
        seconds: of training, with validation.
    """

    row: str
    world: int
    target: str
    seed: int
    accuracy: float
    learning_rate: float
    trained: int | None
    seconds: float

    @classmethod
    def of(cls, row: str, world: int, run: Run) -> Outcome:
        """Of a run that is finished."""
        log = read_log(run.folder / LOG_FILE)
        return cls(
            row=row,
            world=world,
            target=run.task,
            seed=run.seed,
            accuracy=run.results["test_accuracy"],
            learning_rate=run.config.learning_rate,
            trained=run.trained,
            seconds=max((line.get("elapsed", 0.0) for line in log), default=0.0),
        )

    @property
    def place(self) -> tuple[int, str, int]:
        """What runs of different rows have in common."""
        return self.world, self.target, self.seed


def write_evidence(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write evidence.json and the table evidence.md, and print the table (rank 0 calls)."""
    text = table(outcomes)
    write_text(folder / TABLE, text + "\n")
    every = [asdict(each) for each in outcomes]
    write_text(folder / OUTCOMES, json.dumps(every, indent=1) + "\n")
    print(f"{text}\n{folder / TABLE}, {folder / OUTCOMES}", flush=True)


def table(outcomes: Sequence[Outcome]) -> str:
    """A line a row; the first row is the one that the others are held against."""
    rows: dict[str, list[Outcome]] = {}
    for each in outcomes:
        rows.setdefault(each.row, []).append(each)
    first = next(iter(rows))
    best = {each.place: each.accuracy for each in rows[first]}
    targets = list(dict.fromkeys(each.target for each in outcomes))
    lines = [
        f"| | {' | '.join(targets)} | mean | {first} is ahead by | won, equal, lost "
        "| learning rates | trained | seconds |",
        f"|---|{'---:|' * (len(targets) + 2)}---|---|---:|---:|",
    ]
    for row, ours in rows.items():
        means = [
            _spread([each.accuracy for each in ours if each.target == target]) for target in targets
        ]
        beside = ["", ""] if row == first else _beside(ours, best)
        cells = [*means, f"{mean(each.accuracy for each in ours):.1f}", *beside]
        trained = max(each.trained or 0 for each in ours)  # 0: a checkpoint is gone
        lines.append(
            f"| {row} | {' | '.join(cells)} | {_rates(ours)} | {f'{trained:,}' if trained else ''} "
            f"| {mean(each.seconds for each in ours):.1f} |"
        )
    worlds = ", ".join(str(each) for each in dict.fromkeys(each.world for each in outcomes))
    seeds = ", ".join(str(each) for each in dict.fromkeys(each.seed for each in outcomes))
    note = f"Test accuracy in percent, mean ± standard deviation over worlds {worlds} and seeds {seeds}; "
    note += f"{first} is ahead: mean over the same runs of both rows. Learning rates: times chosen on validation."
    return "\n".join([*lines, "", note])


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def _beside(ours: Sequence[Outcome], first: Mapping[tuple[int, str, int], float]) -> list[str]:
    """How far the first row is ahead of this one, and in how many runs it has won, was equal, has lost."""
    gaps = [first[each.place] - each.accuracy for each in ours]
    won, lost = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    return [f"{mean(gaps):+.1f}", f"{won}, {len(gaps) - won - lost}, {lost}"]


def _rates(ours: Sequence[Outcome]) -> str:
    """Each learning rate that was chosen, with the number of targets of worlds it was chosen for."""
    chosen = {(each.world, each.target): each.learning_rate for each in ours}
    rates = sorted(chosen.values())
    return ", ".join(f"{rate:g} × {rates.count(rate)}" for rate in dict.fromkeys(rates))
