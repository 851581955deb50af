"""Faults on two real ranks: NaN and Inf on one of them, damaged checkpoints, data that ends unevenly."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pemt.storage.manifest import read_manifest
from tests.conftest import Launch
from tests.launch.launched_faults import BAD_STEP, ENDS, KINDS, SOURCE, STEPS
from tests.support.damages import DAMAGES, Damage
from tests.support.ranks import deepspeed_json
from tests.support.tiny import losses, make_base, write_task_files

STAGES = {
    "zero2": ["numbers", "checkpoints", "ends", "disk", "stale", "crowded", "damages"],
    "zero3": ["numbers", "checkpoints", "ends"],
    "zero0": ["numbers"],
    "zero1": ["numbers"],
}
FULL = [stage for stage, parts in STAGES.items() if "ends" in parts]

pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.xdist_group("launch")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    make_base(folder / "base")
    write_task_files(folder / SOURCE, seed=0, rows=70)
    row = {"text": "the box is red", "label": 1}
    other = {"text": "the lid is white", "label": 0}
    rows: dict[str, list[dict[str, Any]]] = {
        "one": [row],
        "three": [row, other, row],
        "uneven": [row, other] * 5 + [row],
        "long": [row, {"text": "the box is red " * 6667, "label": 1}, other],
        "empty": [row, {"text": "", "label": 0}, other, {"text": " ", "label": 1}],
    }
    assert len(rows["long"][1]["text"]) > 100_000
    for name in ENDS:
        (folder / name).mkdir()
        text = "".join(json.dumps(each) + "\n" for each in rows[name])
        for split in ("train", "validation", "test"):
            (folder / name / f"{split}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def launched(world: Path, launch: Launch) -> dict[str, str]:
    """What each stage's launch printed."""
    outputs = {}
    for stage, parts in STAGES.items():
        (world / stage).mkdir()
        arguments = ("-m", "tests.launch.launched_faults", str(world), str(world / stage), *parts)
        outputs[stage] = launch(*arguments, zero=deepspeed_json(world, stage)).output
    return outputs


def report(world: Path, stage: str) -> dict[str, Any]:
    return json.loads((world / stage / "report.json").read_text())


def saved(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / f"checkpoint-{step}"
    return load_file(folder / "trained.safetensors") | load_file(folder / "moments.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS])
@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_step_changes_nothing(
    world: Path, launched: dict[str, str], stage: str, kind: str
) -> None:
    run = world / stage / kind
    at = {step: saved(run, step) for step in range(1, STEPS + 1)}
    assert equal(at[BAD_STEP], at[BAD_STEP - 1]), "weights or moments have moved"
    assert not equal(at[BAD_STEP + 1], at[BAD_STEP]), "training did not go on"
    assert all(value.isfinite().all() for value in at[STEPS].values())
    assert losses(run, "train/skipped_steps") == {1: 0, 2: 1, 3: 1, 4: 1}
    assert losses(run, "train/grad_norm")[BAD_STEP] is None
    rates = losses(run, "train/learning_rate")
    assert rates == {1: 0.0, 2: 0.005, 3: 0.01, 4: 0.005}, "the schedule goes on"
    assert read_manifest(run / f"checkpoint-{STEPS}")["progress"]["skipped"] == 1
    assert f"step {BAD_STEP}: non-finite loss or gradient: step skipped" in launched[stage]


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS])
@pytest.mark.parametrize("stage", STAGES)
def test_a_resume_behind_a_bad_step_is_bit_for_bit(
    world: Path, launched: dict[str, str], stage: str, kind: str
) -> None:
    """Adam has counted a step less than the schedule."""
    again, whole = world / stage / f"{kind}-resumed", world / stage / kind
    assert equal(saved(again, STEPS), saved(whole, STEPS))


@pytest.mark.parametrize("stage", STAGES)
def test_too_many_in_a_row_end_the_run_on_every_rank(
    world: Path, launched: dict[str, str], stage: str
) -> None:
    run = world / stage / "ended"
    guilty = run / "not-finite-step-5-rank-1.jsonl"
    for told in report(world, stage)["ended"]:
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


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_that_disagree_save_nothing(
    world: Path, launched: dict[str, str], stage: str
) -> None:
    for told in report(world, stage)["apart"]:
        assert told.startswith(f"CheckpointError: checkpoint-{BAD_STEP} was not saved: rank 1 is")
        assert '"skipped": 1' in told
        assert "resume from the previous checkpoint" in told
    assert [each.name for each in (world / stage / "apart").glob("checkpoint-*")] == [
        "checkpoint-1"
    ]


@pytest.mark.parametrize("stage", FULL)
def test_two_ranks_go_back_to_the_checkpoint_before(
    world: Path, launched: dict[str, str], stage: str
) -> None:
    damaged = str(world / stage / "damaged")
    lines = [line for line in launched[stage].splitlines() if damaged in line]
    told = [line for line in lines if "quarantined" in line]
    assert len(told) == 1
    assert f"checkpoint-{STEPS}/moments.safetensors: checksum mismatch" in told[0]
    assert f"resuming from checkpoint-{STEPS - 1}" in told[0]
    for error in report(world, stage)["none_left"]:
        assert error.startswith("CheckpointError: ")
        assert "none of 3 checkpoints is intact" in error


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_two_ranks_pass_over_every_damage(
    world: Path, launched: dict[str, str], damage: Damage
) -> None:
    run, whole = world / "zero2" / damage.__name__, world / "zero2" / "whole"
    told = [line for line in launched["zero2"].splitlines() if f"{run}/checkpoint-6" in line]
    (line,) = [line for line in told if "quarantined" in line]
    assert DAMAGES[damage] in line
    assert line.endswith("quarantined as unusable-checkpoint-6, resuming from checkpoint-5")
    assert equal(saved(run, 6), saved(whole, 6))


def test_rank_0_alone_looks_into_the_runs_folder(world: Path, launched: dict[str, str]) -> None:
    assert report(world, "zero2")["stale"] == [["none", "none"]] * 2
    run = world / "zero2" / "stale"
    assert f"{run}: this run is finished" in launched["zero2"]
    assert losses(run) == losses(world / "zero2" / "damaged")


def test_a_second_run_on_two_ranks_is_refused(world: Path, launched: dict[str, str]) -> None:
    refused, free = report(world, "zero2")["crowded"]
    (told,) = set(refused)
    assert told.startswith(
        f"LockError: output_dir: a run is under way in {world}/zero2/crowded (process "
    )
    assert free == ["none", "none"]
    assert (world / "zero2" / "crowded" / f"checkpoint-{STEPS}").is_dir()


def test_a_disk_that_refuses_on_two_ranks(world: Path, launched: dict[str, str]) -> None:
    told = report(world, "zero2")["disk"]
    assert told["warn"] == ["none", "none"]
    full = "checkpoint-1: cannot be written: No space left on device"
    assert all(error.startswith("StorageError: ") and full in error for error in told["stop"])
    assert max(losses(world / "zero2" / "stop")) < 9, "it was trained on for nothing"
    assert set(losses(world / "zero2" / "warn")) == set(range(1, 10))
    steps = {int(each.name.split("-")[1]) for each in (world / "zero2" / "warn").glob("check*")}
    assert steps == set(range(2, 10)), "a later save succeeds"
    assert "tensorboard: No space left on device; training continues" in launched["zero2"]


@pytest.mark.parametrize("name", [*ENDS, "ignored", "padding"])
@pytest.mark.parametrize("stage", FULL)
def test_uneven_ends(world: Path, launched: dict[str, str], stage: str, name: str) -> None:
    results = report(world, stage)["ends"][name]
    assert 0 <= results["test_accuracy"] <= 100
    assert math.isfinite(results["test_loss"])
    assert results["epoch"] == 2
    run = losses(world / stage / name)
    assert all(value is not None for value in run.values()), "NaN in a loss"
    assert set(losses(world / stage / name, "train/skipped_steps").values()) == {0}
    assert all(value.isfinite().all() for value in saved(world / stage / name, max(run)).values())
