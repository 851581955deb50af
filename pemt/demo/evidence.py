"""`pemt demo --evidence`: PEMT beside controls and baselines, in worlds in which nothing was tuned.

Every row tries the same learning rates with the first seed on each target, keeps the one with the best validation, and
is then trained with all seeds: the same number of runs for each row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from pemt.checkpoint import RESULTS
from pemt.config import SourceConfig
from pemt.demo.evidence_report import Outcome, write_evidence
from pemt.demo.run import Demo
from pemt.demo.tasks import RELATED, SOURCES, TARGETS
from pemt.run import check_method
from pemt.sweep import Run, Sweep, run_sweep

SEEDS = (0, 1, 2, 3, 4)
LEARNING_RATES = (3e-4, 3e-3, 1e-2, 3e-2, 3e-1)
BATCH_SIZE = 16  # over all ranks, as in the demo
# A row's fields beside those of the demo's stage 2; PEMT's own row comes first.
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
    """Train all rows in all worlds and write the table (all ranks call); the same call resumes.

    Args:
        output_dir: receives a folder a world, and the table.
        cache_dir: keeps the worlds' base models.
        worlds: their seeds.
    """
    check_baselines(output_dir)
    outcomes: list[Outcome] = []
    for number, world in enumerate(worlds, start=1):
        evidence = Evidence(Demo(output_dir / f"world-{world}", cache_dir, world))
        evidence.demo.say(f"world {world}, {number} of {len(worlds)}: its texts and its base model")
        evidence.demo.prepare()
        for place, row in enumerate(ROWS, start=1):
            evidence.demo.say(f"world {world}, {row}, {place} of {len(ROWS)} rows")
            outcomes += [Outcome.of(row, world, run) for run in evidence.train(row)]
    evidence.demo.engine.on_rank0(
        lambda: write_evidence(outcomes, output_dir), "writing the table of the evidence"
    )


def check_baselines(output_dir: Path) -> None:
    """Find out, before hours are spent, whether a baseline lacks its library.

    Raises:
        PeftError: peft is not installed.
    """
    demo = Demo(output_dir, output_dir, world_seed=0)
    for row, fields in ROWS.items():
        if fields.get("method", "pemt") != "pemt":  # whose bank is not there yet
            check_method(demo.adapt(TARGETS[0], row, **fields))


class Evidence:
    """The runs of a world.

    Args:
        demo: the world's files, base model and banks.
    """

    def __init__(self, demo: Demo) -> None:
        self.demo = demo

    def train(self, row: str) -> list[Run]:
        """The runs of all seeds, each target's with the learning rate of its best trial (all ranks call)."""
        trials = [
            self._run(row, target, rate, SEEDS[0]) for target in TARGETS for rate in LEARNING_RATES
        ]
        run_sweep(self._sweep(row, trials))
        chosen = [
            best_of([run for run in trials if run.task == target]).config.learning_rate
            for target in TARGETS
        ]
        runs = [
            self._run(row, target, rate, seed)
            for seed, (target, rate) in product(SEEDS, zip(TARGETS, chosen, strict=True))
        ]
        run_sweep(self._sweep(row, [*trials, *(run for run in runs if run not in trials)]))
        return runs

    def _sweep(self, row: str, runs: list[Run]) -> Sweep:
        return Sweep(
            output_dir=self.demo.output_dir / row,
            methods=[_name(rate) for rate in LEARNING_RATES],
            tasks=list(TARGETS),
            seeds=list(SEEDS),
            runs=runs,
            sources=[self._source(row, number) for number in range(len(SOURCES))],
        )

    def _source(self, row: str, number: int) -> SourceConfig:
        """Stage 1; `untrained-experts` are what it begins with, another draw for each source."""
        config = self.demo.source(SOURCES[number])
        if row != "untrained-experts":
            return config
        return replace(
            config,
            output_dir=f"{config.output_dir}-untrained",
            bank_dir=f"{config.bank_dir}-untrained",
            max_steps=1,
            learning_rate=0.0,
            seed=number,
        )

    def _run(self, row: str, target: str, rate: float, seed: int) -> Run:
        folder = self.demo.output_dir / row / target / _name(rate) / f"seed-{seed}"
        fields = dict(ROWS[row])
        if row == "without-related":
            fields["source_tasks"] = [each for each in SOURCES if each != RELATED[target]]
        if row == "untrained-experts":
            fields["bank_dir"] = f"{self.demo.output_dir / 'bank'}-untrained"
        config = self.demo.adapt(
            target,
            str(folder.relative_to(self.demo.output_dir)),
            learning_rate=rate,
            seed=seed,
            data_seed=seed,
            per_device_train_batch_size=BATCH_SIZE // self.demo.engine.world_size,
            **fields,
        )
        return Run(method=_name(rate), task=target, seed=seed, config=config)


def best_of(runs: Sequence[Run]) -> Run:
    """The run with the best validation; of equal ones that with the lower loss."""

    def merit(run: Run) -> tuple[float, float]:
        results = json.loads((run.folder / RESULTS).read_text(encoding="utf-8"))
        return results["best_validation_average_metrics"], -results["best_validation_loss"]

    return max(runs, key=merit)


def _name(rate: float) -> str:
    return f"lr-{rate:g}"
