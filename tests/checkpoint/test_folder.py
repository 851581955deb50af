"""What a run may write over, remove and resume from."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pemt.checkpoint.checkpoint import CheckpointError
from pemt.checkpoint.folder import check_run_folder, start_run_folder
from pemt.checkpoint.names import checkpoint_folders
from pemt.config import AdaptConfig, ExpertConfig, PemtError
from pemt.run.train import run_adapt, run_source
from pemt.storage import StorageError
from tests.support.tiny import (
    adapt_config,
    losses,
    make_base,
    source_config,
    tiny_task,
    write_task_files,
)

TASK, OTHER = "tiny-folder", "tiny-other"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a task's files, a bank of two sources, and a run with checkpoints 2, 3 (best or not), 4, 5."""
    folder = tmp_path_factory.mktemp("folders")
    make_base(folder / "base")
    write_task_files(folder / "data", seed=0)
    for name in (TASK, OTHER):
        tiny_task(name)
        paths = (folder / "base", folder / "data", folder / name, folder / "bank")
        run_source(source_config(*paths, name, expert=ExpertConfig(rank=2), max_steps=1))
    return folder


def names(output_dir: Path) -> list[str]:
    return [path.name for path in checkpoint_folders(output_dir)]


@pytest.fixture(scope="module")
def whole(world: Path) -> AdaptConfig:
    """A run that has kept its checkpoints 2, 4, 6, 8 and 10."""
    paths = (world / "base", world / "data", world / "whole", world / "bank")
    config = adapt_config(*paths, TASK, eval_strategy="no", save_steps=2, save_total_limit=9)
    run_adapt(config)
    assert names(world / "whole") == [f"checkpoint-{step}" for step in (2, 4, 6, 8, 10)]
    return config


def from_4(whole: AdaptConfig, tmp_path: Path) -> AdaptConfig:
    """A copy of that run goes on from an earlier step."""
    run = shutil.copytree(whole.output_dir, tmp_path / "run")
    earlier = str(run / "checkpoint-4")
    return replace(whole, output_dir=str(run), resume_from_checkpoint=earlier, save_total_limit=1)


def test_resume_from_an_earlier_step_drops_the_later_ones_and_keeps_its_own(
    whole: AdaptConfig, tmp_path: Path
) -> None:
    run_adapt(from_4(whole, tmp_path))
    assert names(tmp_path / "run") == ["checkpoint-10"]
    assert losses(tmp_path / "run") == losses(Path(whole.output_dir))


def test_no_checkpoint_of_steps_that_were_given_up_stays(
    whole: AdaptConfig, tmp_path: Path
) -> None:
    run_adapt(replace(from_4(whole, tmp_path), max_steps=5))
    assert names(tmp_path / "run") == ["checkpoint-5"]


def test_another_runs_checkpoint_is_refused(world: Path, tmp_path: Path) -> None:
    paths = (world / "base", world / "data", tmp_path / "run", world / "bank")
    config = adapt_config(*paths, TASK, max_steps=1)
    run_adapt(config)
    resumed = replace(config, resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match=r"sources .* make them agree"):
        run_adapt(replace(resumed, source_tasks=[OTHER, TASK]))
    with pytest.raises(CheckpointError, match="global_batch_size 4, this run has 8"):
        run_adapt(replace(resumed, gradient_accumulation_steps=2))
    elsewhere = replace(config, output_dir=str(tmp_path / "other"))
    run_adapt(elsewhere)
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    with pytest.raises(PemtError, match=r"already holds a run, and .* is a checkpoint of another"):
        run_adapt(replace(elsewhere, resume_from_checkpoint=checkpoint))


def test_a_mapping_of_the_users_own_is_compared_whole(tmp_path: Path) -> None:
    """A key that was added, or taken away, makes another run of it."""
    paths = (tmp_path / "base", tmp_path / "data", tmp_path / "run", tmp_path / "bank")
    config = adapt_config(*paths, TASK, method="lora", peft_config={"r": 4})
    start_run_folder(config, fresh=True)
    check_run_folder(config)
    for other in ({"r": 4, "lora_alpha": 9}, {}, None):
        with pytest.raises(PemtError, match=r"peft_config \{'r': 4\}, not"):
            check_run_folder(replace(config, peft_config=other))


def test_a_source_run_is_finished_when_its_expert_is_in_the_bank(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an older entry of that name there, results without the new one would be taken for the end."""
    paths = (world / "base", world / "data", tmp_path / "run", tmp_path / "bank")
    config = source_config(*paths, TASK, expert=ExpertConfig(rank=2), max_steps=1)
    entry = run_source(replace(config, output_dir=str(tmp_path / "older"), seed=7)).entry
    older = (entry / "manifest.json").read_text()

    def full(*_: object, **__: object) -> None:
        raise StorageError("the bank's disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("pemt.run.train.write_entry", full)
        with pytest.raises(StorageError, match="the bank's disk is full"):
            run_source(config)
    assert (entry / "manifest.json").read_text() == older
    run_source(config)
    assert (entry / "manifest.json").read_text() != older


def test_overwriting_removes_the_run_alone(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    paths = (world / "base", world / "data", run, world / "bank")
    config = adapt_config(*paths, TASK, max_steps=2)
    run_adapt(config)
    (run / "bank").mkdir()
    (run / "bank" / "mine.txt").write_text("mine")
    run_adapt(replace(config, max_steps=1, overwrite_output_dir=True))
    assert (run / "bank" / "mine.txt").exists()
    assert names(run) == ["checkpoint-1"]
    assert list(losses(run)) == [1]
