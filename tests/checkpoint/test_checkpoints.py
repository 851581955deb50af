"""Damaged and foreign checkpoints: reported, quarantined, the previous one is used; never a silent fresh start."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pemt.checkpoint.checkpoint import CheckpointError, Checkpoints
from pemt.checkpoint.names import checkpoint_folders, step_of
from pemt.config.schema import ExpertConfig, SourceConfig
from pemt.run.train import run_source
from pemt.storage.manifest import MANIFEST, read_manifest, with_checksum
from tests.support.damages import (
    DAMAGES,
    Damage,
    cut,
    flip,
    flip_weights,
    foreign,
    miss,
    miss_all,
    miss_manifest,
)
from tests.support.tiny import losses, make_base, source_config, tiny_task, write_task_files

TASK = "tiny-damaged"
STEPS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with a checkpoint at 2, 4, 6, and one of another seed."""
    folder = tmp_path_factory.mktemp("damaged")
    make_base(folder / "base")
    tiny_task(TASK)
    write_task_files(folder / "data", seed=0, rows=40)
    run_source(config_of(folder, "run"))
    run_source(replace(config_of(folder, "other"), data_seed=7))
    return folder


def config_of(world: Path, run: str, **fields: object) -> SourceConfig:
    return source_config(
        world / "base",
        world / "data",
        world / run,
        world / f"bank-{run}",
        TASK,
        **{
            "expert": ExpertConfig(rank=2),
            "max_steps": STEPS,
            "eval_strategy": "no",
            "save_steps": 2,
            "save_total_limit": 3,
            "num_train_epochs": 9,
            **fields,
        },
    )


def resumed(world: Path, run: Path) -> SourceConfig:
    return replace(config_of(world, "run"), output_dir=str(run), resume_from_checkpoint=True)


def written(run: Path) -> dict[Path, int]:
    """All that a run leaves, with its time of change; the status alone says that somebody has tried."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name != "status.json")
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_the_one_before_is_used_and_told_of(
    world: Path, tmp_path: Path, damage: Damage, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(world / "run", tmp_path / "run"))
    damage(run / "checkpoint-6", world / "other")
    run_source(resumed(world, run))
    told = [line for line in capfd.readouterr().out.splitlines() if "quarantined" in line]
    assert len(told) == 1
    assert DAMAGES[damage] in told[0]
    assert told[0].endswith("quarantined as unusable-checkpoint-6, resuming from checkpoint-4")
    assert (run / "unusable-checkpoint-6").is_dir(), "nothing is thrown away"
    assert [step_of(folder) for folder in checkpoint_folders(run)] == [2, 4, 6]
    for name in ("trained.safetensors", "moments.safetensors"):
        again = load_file(run / "checkpoint-6" / name)
        whole = load_file(world / "run" / "checkpoint-6" / name)
        assert all(torch.equal(again[key], whole[key]) for key in whole), name
    assert losses(run) == losses(world / "run")


@pytest.mark.parametrize("damage", [flip, cut, miss, miss_manifest], ids=lambda d: d.__name__)
def test_none_left_is_an_error_and_no_fresh_start(
    world: Path, tmp_path: Path, damage: Damage
) -> None:
    run = Path(shutil.copytree(world / "run", tmp_path / "run"))
    for folder in checkpoint_folders(run):
        damage(folder, world / "other")
    before = written(run)
    with pytest.raises(CheckpointError, match=r"none of 3 checkpoints is intact .*overwrite") as e:
        run_source(resumed(world, run))
    assert "\n" not in str(e.value)
    assert written(run) == before, "touched"


def test_all_gone_is_an_error_and_no_fresh_start(world: Path, tmp_path: Path) -> None:
    """Again and again: the first attempt must not wipe out what the second one knows it by."""
    run = Path(shutil.copytree(world / "run", tmp_path / "run"))
    for folder in checkpoint_folders(run):
        shutil.rmtree(folder)
    before = written(run)
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"had saved checkpoint-6, and no checkpoint is left"
        ):
            run_source(resumed(world, run))
    assert written(run) == before, "touched"
    anew = replace(resumed(world, run), resume_from_checkpoint=None, overwrite_output_dir=True)
    run_source(anew)
    assert losses(run) == losses(world / "run")


def test_a_run_that_had_saved_nothing_says_that_it_begins_anew(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(world / "run", tmp_path / "run"))
    for folder in checkpoint_folders(run):
        shutil.rmtree(folder)
    (run / "status.json").write_text('{"state": "running", "step": 1, "checkpoint": null}')
    run_source(resumed(world, run))
    assert "the run started here has no checkpoint yet" in capsys.readouterr().out
    assert losses(run) == losses(world / "run")


@pytest.mark.parametrize("damage", [flip_weights, miss_all, foreign], ids=lambda d: d.__name__)
def test_a_lost_best_checkpoint_is_told_of_and_the_best_chosen_anew(
    world: Path, tmp_path: Path, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(world / "run", tmp_path / "run"))
    newest = run / "checkpoint-6"
    manifest = read_manifest(newest)
    manifest["progress"] |= {"best_step": 2, "best_metric": 100.0, "validated_step": 6}
    (newest / MANIFEST).write_text(with_checksum(manifest))
    damage(run / "checkpoint-2", world / "other")
    longer = {"eval_strategy": "steps", "eval_steps": 3, "max_steps": STEPS + 3}
    run_source(replace(resumed(world, run), **longer))
    (told,) = [
        line for line in capsys.readouterr().out.splitlines() if "was the best so far" in line
    ]
    assert "] checkpoint-2 was the best so far and is lost: " in told
    assert ("quarantined as unusable-checkpoint-2" in told) == (
        run / "unusable-checkpoint-2"
    ).is_dir()
    assert ("is lost: missing" in told) == (damage is miss_all)
    results = json.loads((run / "all_results.json").read_text())
    assert results["best_checkpoint"] in ("checkpoint-6", "checkpoint-9"), (
        "6 was not validated anew"
    )
    assert set(losses(run, f"eval/{TASK}/loss")) == {6, 9}


def test_a_best_checkpoint_damaged_at_the_end_leaves_a_way_out(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    config = replace(config_of(world, "run"), output_dir=str(run), bank_dir=str(tmp_path / "bank"))
    finish = Checkpoints.finish

    def finish_and_damage(checkpoints: Checkpoints) -> None:
        finish(checkpoints)
        flip_weights(run / "checkpoint-6", run)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "finish", finish_and_damage)
        with pytest.raises(
            CheckpointError, match=r"checkpoint-6/trained.*run the same command again"
        ):
            run_source(config)
    run_source(config)
    assert losses(run) == losses(world / "run")


def test_all_of_another_run_is_an_error_that_names_the_difference(world: Path) -> None:
    other = resumed(world, world / "other")
    with pytest.raises(CheckpointError, match="was saved with data_seed 7, this run has 42"):
        run_source(other)
    assert len(checkpoint_folders(world / "other")) == 3


def test_a_damaged_checkpoint_that_was_named_is_not_replaced_by_another(
    world: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(world / "run", tmp_path / "run"))
    flip(run / "checkpoint-4", run)
    named = replace(resumed(world, run), resume_from_checkpoint=str(run / "checkpoint-4"))
    with pytest.raises(CheckpointError, match=r"checkpoint-4/moments.*damaged"):
        run_source(named)
    assert len(checkpoint_folders(run)) == 3


def test_other_base_weights_are_refused(world: Path, tmp_path: Path) -> None:
    """Same folder name and shape, other weights: what was trained on one base is noise on another."""
    run = Path(shutil.copytree(world / "run", tmp_path / "run"))
    base = Path(shutil.copytree(world / "base", tmp_path / "base"))
    path = base / "model.safetensors"
    weights = {key: value * 1.01 for key, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    config = replace(resumed(world, run), model_name_or_path=str(base))
    for folder in checkpoint_folders(run):  # the name alone must not be what is noticed
        manifest = read_manifest(folder)
        manifest["run"]["model_name_or_path"] = str(base)
        (folder / MANIFEST).write_text(with_checksum(manifest))
    with pytest.raises(CheckpointError, match="was saved with base_sha256"):
        run_source(config)


def test_what_changed_since_is_told(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(world / "run", tmp_path / "run"))
    run_source(replace(resumed(world, run), learning_rate=0.5, max_steps=STEPS + 1))
    told = [line for line in capfd.readouterr().out.splitlines() if "changed since" in line]
    (line,) = told
    assert line.endswith(
        "changed since the checkpoint: learning_rate 0.01 -> 0.5, max_steps 6 -> 7"
    )
