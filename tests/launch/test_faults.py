"""Faults on two real ranks: NaN and Inf on one of them, damaged checkpoints, data that ends unevenly."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pemt.storage.manifest import read_manifest
from tests.conftest import Launch
from tests.launch.launched_faults import BAD_STEP, ENDS, FEW_ENDS, KINDS, SOURCE, STEPS, WITHOUT
from tests.support.damages import DAMAGES, Damage
from tests.support.ranks import deepspeed_json
from tests.support.tiny import losses, make_base, write_task_files

# By launch, which is begun when it is first asked for: the stage, and the parts of launched_faults.py.
LAUNCHES = {
    "zero2": ("zero2", ["numbers", "checkpoints", "disk", "stale", "crowded"]),
    "zero3": ("zero3", ["few ends"]),
    "zero0": ("zero0", ["numbers"]),
    "zero1": ("zero1", ["numbers"]),
    "zero2-more": ("zero2", ["ends", "damages"]),
    "zero3-more": ("zero3", ["numbers", "checkpoints", "ends"]),
}


def soaked(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.soak) for name in names]


NUMBERS = ["zero2", *soaked("zero0", "zero1", "zero3-more")]
CHECKPOINTS = ["zero2", *soaked("zero3-more")]
WITH_ENDS = [
    *(("zero3", end) for end in FEW_ENDS),
    *(
        pytest.param(name, end, marks=pytest.mark.soak)
        for name in ("zero2-more", "zero3-more")
        for end in (*ENDS, *WITHOUT)
    ),
]

pytestmark = [pytest.mark.launch, pytest.mark.slow]


@dataclass(frozen=True)
class Launched:
    """The folder of a launch's runs, what it printed, and its report."""

    folder: Path
    output: str
    report: dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    make_base(folder / "base", num_layers=1)
    write_task_files(folder / SOURCE, seed=0, rows=70)
    row = {"text": "the box is red", "label": 1}
    other = {"text": "the lid is white", "label": 0}
    rows: dict[str, list[dict[str, Any]]] = {
        "one": [row],
        "uneven": [row, other] * 5 + [row],
        # a text of 100,000 letters, one of none, one of a space
        "odd": [
            row,
            {**row, "text": "the box is red " * 6667},
            {**other, "text": ""},
            other,
            {**row, "text": " "},
        ],
    }
    for name in ENDS:
        (folder / name).mkdir()
        text = "".join(json.dumps(each) + "\n" for each in rows[name])
        for split in ("train", "validation", "test"):
            (folder / name / f"{split}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def launched(world: Path, launch: Launch) -> Callable[[str], Launched]:
    @cache
    def of(name: str) -> Launched:
        stage, parts = LAUNCHES[name]
        folder = world / name
        folder.mkdir()
        arguments = ("-m", "tests.launch.launched_faults", str(world), str(folder), *parts)
        output = launch(*arguments, zero=deepspeed_json(world, stage)).output
        return Launched(folder, output, json.loads((folder / "report.json").read_text()))

    return of


def saved(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / f"checkpoint-{step}"
    return load_file(folder / "trained.safetensors") | load_file(folder / "moments.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


Of = Callable[[str], Launched]


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_bad_step_changes_nothing(launched: Of, name: str, kind: str) -> None:
    run = launched(name).folder / kind
    at = {step: saved(run, step) for step in range(1, STEPS + 1)}
    assert equal(at[BAD_STEP], at[BAD_STEP - 1]), "weights or moments have moved"
    assert not equal(at[BAD_STEP + 1], at[BAD_STEP]), "training did not go on"
    assert all(value.isfinite().all() for value in at[STEPS].values())
    assert losses(run, "train/skipped_steps") == {1: 0, 2: 1, 3: 1, 4: 1}
    assert losses(run, "train/grad_norm")[BAD_STEP] is None
    rates = losses(run, "train/learning_rate")
    assert rates == {1: 0.0, 2: 0.005, 3: 0.01, 4: 0.005}, "the schedule goes on"
    assert read_manifest(run / f"checkpoint-{STEPS}")["progress"]["skipped"] == 1
    told = f"step {BAD_STEP}: non-finite loss or gradient: step skipped"
    assert told in launched(name).output


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_resume_behind_a_bad_step_is_bit_for_bit(launched: Of, name: str, kind: str) -> None:
    """Adam has counted a step less than the schedule."""
    folder = launched(name).folder
    assert equal(saved(folder / f"{kind}-resumed", STEPS), saved(folder / kind, STEPS))


@pytest.mark.parametrize("name", NUMBERS)
def test_too_many_in_a_row_end_the_run_on_every_rank(launched: Of, name: str) -> None:
    run = launched(name).folder / "ended"
    guilty = run / "not-finite-step-5-rank-1.jsonl"
    for told in launched(name).report["ended"]:
        assert told.startswith(f"NonFiniteError: {guilty}: holds the batch of step 5")
        assert "the last of 3 skipped steps in a row (max_skipped_steps)" in told
        assert "the loss is inf on rank 1;" in told
        assert "\n" not in told
    lines, others = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (guilty, run / "not-finite-step-5-rank-0.jsonl")
    )
    for rank in (lines, others):  # micro-batches of 4, of the longest texts fewer, half at least
        rows = Counter(line["micro_batch"] for line in rank)
        assert rows.keys() == {0, 1}
        assert set(rows.values()) <= {2, 3, 4}
    assert {(line["micro_batch"], line["loss"] == "inf") for line in lines} == {
        (0, False),
        (1, True),
    }
    assert all(line["source"].startswith("text : the box is") for line in lines)
    assert losses(run, "train/skipped_steps") == {1: 1, 2: 1, 3: 2, 4: 3}


@pytest.mark.parametrize("name", NUMBERS)
def test_ranks_that_disagree_save_nothing(launched: Of, name: str) -> None:
    for told in launched(name).report["apart"]:
        assert told.startswith(f"CheckpointError: checkpoint-{BAD_STEP} was not saved: rank 1 is")
        assert '"skipped": 1' in told
        assert "resume from the previous checkpoint" in told
    left = (launched(name).folder / "apart").glob("checkpoint-*")
    assert [each.name for each in left] == ["checkpoint-1"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_two_ranks_go_back_to_the_checkpoint_before(launched: Of, name: str) -> None:
    damaged = str(launched(name).folder / "damaged")
    lines = [line for line in launched(name).output.splitlines() if damaged in line]
    told = [line for line in lines if "quarantined" in line]
    assert len(told) == 1
    assert f"checkpoint-{STEPS}/moments.safetensors: checksum mismatch" in told[0]
    assert f"resuming from checkpoint-{STEPS - 1}" in told[0]
    for error in launched(name).report["none_left"]:
        assert error.startswith("CheckpointError: ")
        assert "none of 3 checkpoints is intact" in error


@pytest.mark.soak
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_two_ranks_pass_over_every_damage(launched: Of, damage: Damage) -> None:
    """On one rank: tests/checkpoint/test_checkpoints.py."""
    more = launched("zero2-more")
    run, whole = more.folder / damage.__name__, more.folder / "whole"
    told = [line for line in more.output.splitlines() if f"{run}/checkpoint-6" in line]
    (line,) = [line for line in told if "quarantined" in line]
    assert DAMAGES[damage] in line
    assert line.endswith("quarantined as unusable-checkpoint-6, resuming from checkpoint-5")
    assert equal(saved(run, 6), saved(whole, 6))


def test_rank_0_alone_looks_into_the_runs_folder(launched: Of) -> None:
    found = launched("zero2")
    assert found.report["stale"] == [["none", "none"]] * 2
    run = found.folder / "stale"
    assert f"{run}: this run is finished" in found.output
    assert losses(run) == losses(found.folder / "damaged")


def test_a_second_run_on_two_ranks_is_refused(launched: Of) -> None:
    run = launched("zero2").folder / "crowded"
    refused, free = launched("zero2").report["crowded"]
    (told,) = set(refused)
    assert told.startswith(f"LockError: output_dir: a run is under way in {run} (process ")
    assert free == ["none", "none"]
    assert (run / f"checkpoint-{STEPS}").is_dir()


def test_a_disk_that_refuses_on_two_ranks(launched: Of) -> None:
    folder, told = launched("zero2").folder, launched("zero2").report["disk"]
    assert told["warn"] == ["none", "none"]
    full = "checkpoint-1: cannot be written: No space left on device"
    assert all(error.startswith("StorageError: ") and full in error for error in told["stop"])
    assert max(losses(folder / "stop")) < 9, "it was trained on for nothing"
    assert set(losses(folder / "warn")) == set(range(1, 10))
    steps = {int(each.name.split("-")[1]) for each in (folder / "warn").glob("check*")}
    assert steps == set(range(2, 10)), "a later save succeeds"
    assert "tensorboard: No space left on device; training continues" in launched("zero2").output


@pytest.mark.parametrize(("name", "end"), WITH_ENDS)
def test_uneven_ends(launched: Of, name: str, end: str) -> None:
    results, run = launched(name).report["ends"][end], launched(name).folder / end
    assert 0 <= results["test_accuracy"] <= 100
    assert math.isfinite(results["test_loss"])
    assert results["epoch"] == 2
    found = losses(run)
    assert all(value is not None for value in found.values()), "NaN in a loss"
    assert set(losses(run, "train/skipped_steps").values()) == {0}
    assert all(value.isfinite().all() for value in saved(run, max(found)).values())
