"""`pemt demo --evidence`: PEMT beside controls and baselines, in worlds in which nothing was tuned.

Every row tries the same learning rates with the first seed on each target, keeps the one with the best validation, and
is then trained with all seeds: the same number of runs for each row. All in one process; several take a world each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pemt.checkpoint import merit_of
from pemt.config import SourceConfig
from pemt.demo.evidence_report import Outcome, write_evidence
from pemt.demo.run import Demo
from pemt.demo.tasks import RELATED, SOURCES, TARGETS
from pemt.run import check_method
from pemt.sweep import Run, Sweep, SweepError, run_sweep

SEEDS = (0, 1, 2, 3, 4)
LEARNING_RATES = (3e-4, 3e-3, 1e-2, 3e-2, 3e-1)
BATCH_SIZE = 16  # of one process, as on the demo's two ranks
# A row's fields beside those of the demo's stage 2, PEMT's own row first; two have more in `_run`.
ROWS: dict[str, dict[str, Any]] = {
    "pemt": {},
    "adapter": {"method": "adapter"},
    "uniform-gates": {"mixture.gate": "uniform"},
    "without-related": {},
    "untrained-experts": {},
    "lora": {"method": "lora"},
    "full": {"method": "full"},
    "prompt": {"method": "prompt"},
}


def run_evidence(output_dir: Path, cache_dir: Path, *, worlds: Sequence[int]) -> None:
    """Train all rows in all worlds and write the table; the same call resumes.

    Args:
        output_dir: receives a folder a world, and the table.
        cache_dir: keeps the worlds' base models.
        worlds: their seeds.
    """
    check_baselines(output_dir)
    outcomes: list[Outcome] = []
    for number, world in enumerate(worlds, start=1):
        demo = Demo(output_dir / f"world-{world}", cache_dir, world)
        demo.say(f"world {world}, {number} of {len(worlds)}: its texts and its base model")
        demo.prepare()
        for place, row in enumerate(ROWS, start=1):
            demo.say(f"world {world}, {row}, {place} of {len(ROWS)} rows")
            outcomes += [Outcome.of(row, world, run) for run in train(demo, row)]
    write_evidence(outcomes, output_dir)


def check_baselines(output_dir: Path) -> None:
    """Find out, before hours are spent, whether a baseline lacks its library.

    Raises:
        PeftError: peft is not installed.
    """
    demo = Demo(output_dir, output_dir, world_seed=0)
    for row, fields in ROWS.items():
        if fields.get("method", "pemt") != "pemt":  # whose bank is not there yet
            check_method(demo.adapt(TARGETS[0], row, **fields))


def train(demo: Demo, row: str) -> list[Run]:
    """A row's runs of all seeds, each target's with the learning rate of its best trial."""
    return train_tuned(
        TARGETS, LEARNING_RATES, SEEDS, partial(_run, demo, row), partial(_sweep, demo, row)
    )


def _sweep(demo: Demo, row: str, runs: list[Run]) -> Sweep:
    return Sweep(
        output_dir=demo.output_dir / row,
        methods=[_name(rate) for rate in LEARNING_RATES],
        tasks=list(TARGETS),
        seeds=list(SEEDS),
        runs=runs,
        sources=[_source(demo, row, number) for number in range(len(SOURCES))],
    )


def _source(demo: Demo, row: str, number: int) -> SourceConfig:
    """Stage 1; `untrained-experts` are what it begins with, another draw for each source."""
    task = SOURCES[number]
    fields: dict[str, Any] = {"per_device_train_batch_size": BATCH_SIZE, "num_train_epochs": 1}
    if row == "untrained-experts":
        folder = demo.output_dir / f"source-{task}-untrained"
        fields |= {"output_dir": str(folder), "bank_dir": _untrained_bank(demo)}
        fields |= {"max_steps": 1, "learning_rate": 0.0, "seed": number}
    return demo.source(task, **fields)


def _untrained_bank(demo: Demo) -> str:
    return str(demo.output_dir / "bank-untrained")


def _run(demo: Demo, row: str, target: str, rate: float, seed: int) -> Run:
    fields = dict(ROWS[row])
    if row == "without-related":
        fields["source_tasks"] = [each for each in SOURCES if each != RELATED[target]]
    if row == "untrained-experts":
        fields["bank_dir"] = _untrained_bank(demo)
    config = demo.adapt(
        target,
        f"{row}/{target}/{_name(rate)}/seed-{seed}",
        learning_rate=rate,
        seed=seed,
        data_seed=seed,
        per_device_train_batch_size=BATCH_SIZE,
        **fields,
    )
    return Run(method=_name(rate), task=target, seed=seed, config=config)


def train_tuned(
    targets: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    run_of: Callable[[str, float, int], Run],
    sweep_of: Callable[[list[Run]], Sweep],
) -> list[Run]:
    """Try each learning rate with the first seed, target by target; train all seeds with the best one.

    Args:
        run_of: the run of a target, a rate and a seed.
        sweep_of: these runs as a sweep.

    Raises:
        SweepError: a run failed, or every trial of a target: one that diverges is out of the choice.
    """
    trials = [run_of(target, rate, seeds[0]) for target in targets for rate in rates]
    failed = None
    try:
        run_sweep(sweep_of(trials))
    except SweepError as error:
        failed = error
    finished = [run for run in trials if run.finished]
    if failed is not None and {run.task for run in finished} != set(targets):
        raise failed
    runs = []
    for target in targets:
        best = best_of([run for run in finished if run.task == target])
        runs += [run_of(target, best.config.learning_rate, seed) for seed in seeds]
    run_sweep(sweep_of([*finished, *(run for run in runs if run not in finished)]))
    return runs


def best_of(runs: Sequence[Run]) -> Run:
    """The run with the best validation; of equal ones that with the lower loss."""

    def merit(run: Run) -> tuple[float, float]:
        results = run.results
        return merit_of(results["best_validation_average_metrics"], results["best_validation_loss"])

    return max(runs, key=merit)


def _name(rate: float) -> str:
    return f"lr-{rate:g}"
