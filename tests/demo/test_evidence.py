"""`pemt demo --evidence`: which runs there are, and what its table says of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pemt.bank import read_entry
from pemt.config import read_yaml_mapping
from pemt.demo import evidence, pretraining, tasks
from pemt.demo.evidence_report import OUTCOMES, TABLE, Outcome, table
from pemt.run import run_adapt
from pemt.sweep.plan import SweepError


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world of minutes: few steps, two rows, one target, two learning rates, two seeds."""
    monkeypatch.setattr(pretraining, "STEPS", 3)
    monkeypatch.setattr(tasks, "SIZES", {"source": (32, 8, 8), "target": (40, 8, 8)})
    monkeypatch.setattr(evidence, "TARGETS", tasks.TARGETS[:1])
    monkeypatch.setattr(evidence, "LEARNING_RATES", (1e-3, 1e-2))
    monkeypatch.setattr(evidence, "SEEDS", (0, 1))
    rows = {row: evidence.ROWS[row] for row in ("without-related", "untrained-experts")}
    monkeypatch.setattr(evidence, "ROWS", rows)
    adapt = evidence.Demo.adapt

    def short(self: Any, *names: str, **fields: Any) -> Any:
        fields |= {"few_shot": 4, "max_steps": 2, "eval_steps": 1, "report_to": []}
        return adapt(self, *names, **fields)

    monkeypatch.setattr(evidence.Demo, "adapt", short)
    monkeypatch.setattr("pemt.sweep.report.draw", lambda *_: None)


@pytest.mark.soak
@pytest.mark.usefixtures("small")
def test_every_row_is_tried_and_trained_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []

    def counted(config: Any) -> Any:
        trained.append(config.output_dir)
        return run_adapt(config)

    monkeypatch.setattr("pemt.sweep.run.run_adapt", counted)
    evidence.run_evidence(tmp_path / "out", tmp_path / "cache", worlds=[1])
    # two rates with the first seed, then the better one with the second
    assert len(trained) == len(set(trained)) == 2 * 3
    outcomes = [Outcome(**each) for each in json.loads((tmp_path / "out" / OUTCOMES).read_text())]
    assert [(each.row, each.seed) for each in outcomes] == [
        (row, seed) for row in evidence.ROWS for seed in (0, 1)
    ]
    assert (tmp_path / "out" / TABLE).read_text() in capsys.readouterr().out + "\n"

    world = tmp_path / "out" / "world-1"
    config = {
        row: read_yaml_mapping(next((world / row).glob("stable/*/seed-1")) / "config.yaml")
        for row in evidence.ROWS
    }
    assert config["without-related"]["source_tasks"] == ["size", "taste", "weather"]
    assert config["untrained-experts"]["source_tasks"] is None
    assert config["untrained-experts"]["data_seed"] == 1, (
        "another draw of the few examples for each seed"
    )
    bank = {
        name: read_entry(world / name)[1]
        for name in ("bank/diet", "bank-untrained/diet", "bank-untrained/size")
    }
    expert, untrained, another = bank.values()
    assert expert.weights.keys() == untrained.weights.keys() == another.weights.keys()
    for name, weight in untrained.weights.items():
        assert weight.shape == expert.weights[name].shape
        # as LoRA's factors begin: uniform, of variance 1 / (3 x input width)
        assert weight.var().item() == pytest.approx(1 / (3 * weight.shape[-1]), rel=0.2), name
        assert not weight.equal(expert.weights[name])
        assert not weight.equal(another.weights[name]), "each source is another draw"

    trained.clear()
    evidence.run_evidence(tmp_path / "out", tmp_path / "cache", worlds=[1])
    assert trained == [], "what is finished is kept"


@pytest.mark.usefixtures("small")
def test_a_trial_that_diverges_is_out_of_the_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging = {1e-3}

    def adapt(config: Any) -> None:
        if config.learning_rate in diverging:
            raise RuntimeError("losses are not finite")
        figures = (
            "best_validation_average_metrics",
            "best_validation_loss",
            "test_average_metrics",
        )
        results = {**dict.fromkeys(figures, 50.0), "best_checkpoint": "checkpoint-2"}
        Path(config.output_dir).mkdir(parents=True)
        Path(config.output_dir, "all_results.json").write_text(json.dumps(results))

    monkeypatch.setattr("pemt.sweep.run.run_adapt", adapt)
    monkeypatch.setattr("pemt.sweep.run.run_source", lambda config: None)
    runs = evidence.train(evidence.Demo(tmp_path, tmp_path, 1), "without-related")
    assert [(run.config.learning_rate, run.seed) for run in runs] == [(1e-2, 0), (1e-2, 1)]
    diverging.add(1e-2)
    with pytest.raises(SweepError, match="2 of 2 runs failed"):
        evidence.train(evidence.Demo(tmp_path / "b", tmp_path, 1), "without-related")


def outcome(row: str, seed: int, accuracy: float, **fields: Any) -> Outcome:
    known = {"world": 2, "target": "stable", "learning_rate": 1e-3, "trained": 1200, "seconds": 4.0}
    return Outcome(**{"row": row, "seed": seed, "accuracy": accuracy, **known, **fields})


def test_the_table_tells_gaps_and_seeds_won() -> None:
    found = [
        *(outcome("pemt", seed, accuracy) for seed, accuracy in enumerate([90.0, 80.0, 100.0])),
        *(outcome("full", seed, accuracy) for seed, accuracy in enumerate([80.0, 80.0, 101.0])),
    ]
    found.append(outcome("pemt", 0, 50.0, target="journey"))
    found.append(outcome("full", 0, 60.0, target="journey", learning_rate=0.03))
    found += [replace(each, row="equal", trained=None) for each in found if each.row == "pemt"]
    first, second, equal = table(found).splitlines()[2:5]
    assert first == ("| pemt | 90.0 ± 10.0 | 50.0 | 80.0 |  |  | 0.001 × 2 | 1,200 | 4.0 |")
    assert second == (
        "| full | 87.0 ± 12.1 | 60.0 | 80.2 | -0.2 | 1, 1, 2 | 0.001 × 1, 0.03 × 1 | 1,200 | 4.0 |"
    )
    assert "| +0.0 | 0, 4, 0 | 0.001 × 2 |  | 4.0 |" in equal


def test_the_better_trial_is_taken_by_validation_alone() -> None:
    def trial(metric: float, loss: float, test: float) -> Any:
        results = {"best_validation_average_metrics": metric, "best_validation_loss": loss}
        return SimpleNamespace(results={**results, "test_accuracy": test})

    trials = [trial(80, 0.2, 99.0), trial(90, 0.5, 1.0), trial(90, 0.4, 0.0)]
    assert evidence.best_of(trials) is trials[2]
    assert evidence.best_of([trial(90, float("nan"), 99.0), *trials]) is trials[2]
