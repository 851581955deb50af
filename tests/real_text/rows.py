"""Stage 1 on every source, then the rows of the table on every few-shot target."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pemt.config import AdaptConfig, SourceConfig, make_config
from pemt.demo.evidence import train_tuned
from pemt.sweep import Run, Sweep
from tests.real_text.texts import SOURCES, TARGETS

SEEDS = (0, 1, 2, 3, 4)
LEARNING_RATES = (3e-3, 1e-2)
SHARED: dict[str, Any] = {"max_source_length": 128, "bf16": False, "report_to": []}
SOURCE_EPOCHS = {"sst2": 2}  # of 20,000 sentences; the others have 4 of 4,400 to 8,000
SOURCE = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 100,
    "learning_rate": 3e-3,
    "warmup_steps": 100,
    "eval_strategy": "epoch",
    "expert.rank": 64,
}
ADAPT = {
    "few_shot": 16,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 100,
    "num_train_epochs": 20,
    "eval_strategy": "steps",
    "eval_steps": 10,
    "max_eval_samples": 400,
}
ROWS: dict[str, dict[str, Any]] = {
    "pemt": {},
    "adapter": {"method": "adapter"},
    "uniform-gates": {"mixture.gate": "uniform"},
    "lora": {"method": "lora"},
}


def source_config(name: str, folder: Path) -> SourceConfig:
    """Stage 1 on a source."""
    given = {
        **_given(name, folder),
        **SOURCE,
        "num_train_epochs": SOURCE_EPOCHS.get(name, 4),
        "output_dir": str(folder / "source" / name),
    }
    return make_config(SourceConfig, given, recipe="source", prog="tests.real_text")


def train(row: str, folder: Path) -> list[Run]:
    """All runs of a row."""
    targets = [each.name for each in TARGETS]
    run_of, sweep_of = partial(_run, folder, row), partial(_sweep, folder, row)
    return train_tuned(targets, LEARNING_RATES, SEEDS, run_of, sweep_of)


def _run(folder: Path, row: str, target: str, rate: float, seed: int) -> Run:
    own = folder / row / target / f"lr-{rate:g}" / f"seed-{seed}"
    given = {
        **_given(target, folder),
        **ADAPT,
        **ROWS[row],
        "learning_rate": rate,
        "seed": seed,
        "data_seed": seed,
        "output_dir": str(own),
    }
    config = make_config(AdaptConfig, given, recipe="adapt", prog="tests.real_text")
    return Run(method=f"lr-{rate:g}", task=target, seed=seed, config=config)


def _sweep(folder: Path, row: str, runs: list[Run]) -> Sweep:
    return Sweep(
        output_dir=folder / row,
        methods=[f"lr-{rate:g}" for rate in LEARNING_RATES],
        tasks=[each.name for each in TARGETS],
        seeds=list(SEEDS),
        runs=runs,
        sources=[source_config(each.name, folder) for each in SOURCES],
    )


def _given(name: str, folder: Path) -> dict[str, Any]:
    return {
        **SHARED,
        "model_name_or_path": str(folder / "base"),
        "task_name": f"real-{name}",
        "data_dir": str(folder / "data" / name),
        "bank_dir": str(folder / "bank"),
    }
