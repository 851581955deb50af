"""The same command resumes, from every step; a finished run is not trained again."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pemt.checkpoint.folder import start_run_folder
from pemt.checkpoint.resume import Finished, Fresh, Resume, WorldSizeError, resolve_run
from pemt.checkpoint.status import write_status
from pemt.config import AdaptConfig, PemtError
from pemt.run import train
from pemt.run.train import run_adapt
from tests.support.jobs import World, assert_same_end, logged, results, status
from tests.support.stopped import stopped_at_every_step

SHORT = {"num_train_epochs": "2", "gradient_accumulation_steps": "2"}  # two epochs of five steps


def config_of(world: World, run: Path, **fields: object) -> AdaptConfig:
    return world.config(run, **{**SHORT, **fields})


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    run_adapt(config_of(world, run))
    return run


def test_a_run_stopped_in_every_step_and_validation_ends_with_the_same_bits(
    world: World, whole: Path, tmp_path: Path
) -> None:
    stops = stopped_at_every_step(config_of(world, tmp_path / "run"))
    assert stops == 2 * [*["step"] * 5, "validation"]
    assert_same_end(tmp_path / "run", whole)
    assert status(tmp_path / "run")["state"] == "finished"


def test_a_finished_run_says_so_and_trains_no_more(
    world: World, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr("pemt.run.train.set_up", never)
    assert run_adapt(config_of(world, whole)) == results(whole)
    assert "this run is finished" in capsys.readouterr().out


def test_another_configuration_is_refused_and_told(world: World, whole: Path) -> None:
    other = config_of(world, whole, learning_rate="0.02", **{"mixture.prompt_dropout": "0.3"})
    with pytest.raises(
        PemtError,
        match=r"learning_rate 0.01, not 0.02; mixture.prompt_dropout 0.1, not 0.3; give .*=True",
    ):
        run_adapt(other)
    with pytest.raises(PemtError, match="already holds a run; give"):
        run_adapt(config_of(world, whole, resume_from_checkpoint="false"))


def test_how_often_to_log_and_save_may_change_on_the_way(
    world: World, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = shutil.copytree(whole, tmp_path / "run")
    (unfinished / "all_results.json").unlink()
    shutil.rmtree(unfinished / "checkpoint-10")
    run_adapt(config_of(world, unfinished, save_steps="3", save_total_limit="9"))
    assert "resuming from step 5/10" in capsys.readouterr().out
    assert (unfinished / "checkpoint-9").is_dir()
    assert_same_end(unfinished, whole)


def test_a_restart_by_the_launcher_does_not_overwrite(
    world: World, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(unfinished / "checkpoint-10")
    begun = (unfinished / "log.jsonl").read_text().splitlines()[0]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run_adapt(config_of(world, unfinished, overwrite_output_dir="true"))
    assert (unfinished / "log.jsonl").read_text().splitlines()[0] == begun
    assert_same_end(unfinished, whole)


def test_a_restart_overwrites_where_the_first_start_had_not_begun_to(
    world: World, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is then older than the launcher: the run that was to be overwritten."""
    old = shutil.copytree(whole, tmp_path / "run")
    config = config_of(world, old, overwrite_output_dir="true")
    for path in (*old.rglob("*"), old):
        os.utime(path, (1e9, 1e9))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    start = resolve_run(config, world_size=1)
    assert isinstance(start, Fresh)
    assert start.config.overwrite_output_dir
    for sign in ("config.yaml", "log.jsonl", "checkpoint-10"):
        os.utime(old / sign)
        assert isinstance(resolve_run(config, world_size=1), Resume), sign
        os.utime(old / sign, (1e9, 1e9))
    monkeypatch.setattr("pemt.checkpoint.resume.launcher_began", lambda _: None)
    assert isinstance(resolve_run(config, world_size=1), Resume), "nothing is lost on a guess"


def test_a_refused_start_leaves_a_finished_run_finished(
    world: World, whole: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    before = status(run)
    other = config_of(world, run, max_source_length="20", resume_from_checkpoint="true")
    with pytest.raises(PemtError, match="max_source_length"):
        run_adapt(other)
    assert status(run) == before
    assert before["state"] == "finished"
    (run / "status.json").write_text(json.dumps({**before, "state": "interrupted"}))
    with pytest.raises(PemtError, match="max_source_length"):
        run_adapt(other)
    assert status(run)["state"] == "failed", "nobody is to queue that again"


@pytest.mark.parametrize(
    ("world_size", "batch", "accumulation"),
    [(1, 4, 2), (2, 4, 1), (2, 2, None), (4, 4, WorldSizeError)],
)
def test_another_number_of_ranks_keeps_the_global_batch(
    world: World,
    whole: Path,
    world_size: int,
    batch: int,
    accumulation: object,
) -> None:
    """Begun on one rank that accumulates two micro-batches of four."""
    config = config_of(world, whole, resume_from_checkpoint="true")
    if accumulation is WorldSizeError:
        with pytest.raises(WorldSizeError, match=r"global batch of 8, which 4 rank\(s\)"):
            resolve_run(config, world_size=world_size)
        return
    config = replace(config, per_device_train_batch_size=batch, bf16=False)
    start = resolve_run(config, world_size=world_size)
    assert isinstance(start, Resume)
    if accumulation is None:  # another micro-batch is another run, and the checkpoint says so
        assert start.config == config
    else:
        assert start.config.gradient_accumulation_steps == accumulation
        assert any("global batch stays 8" in note for note in start.notes) == (world_size != 1)


def test_how_a_run_begins(world: World, whole: Path, tmp_path: Path) -> None:
    def start(run: Path, product: Path | None = None, **fields: object) -> object:
        return resolve_run(config_of(world, run, **fields), world_size=1, product=product)

    assert isinstance(start(tmp_path / "none"), Fresh)
    assert isinstance(start(tmp_path / "none", resume_from_checkpoint="true"), Fresh)
    finished = start(whole)
    assert isinstance(finished, Finished)
    assert finished.results == results(whole)
    assert isinstance(start(whole, product=whole / "no entry in the bank"), Resume)
    assert isinstance(start(whole, overwrite_output_dir="true"), Fresh)
    newest = start(whole, resume_from_checkpoint="true")
    assert isinstance(newest, Resume)
    assert newest.checkpoint is None
    chosen = start(tmp_path / "none", resume_from_checkpoint=whole / "checkpoint-10")
    assert isinstance(chosen, Resume)
    assert chosen.checkpoint == str(whole / "checkpoint-10")
    begun = tmp_path / "begun"
    start_run_folder(config_of(world, begun), fresh=True)
    assert isinstance(start(begun), Resume), "it may have died before its first checkpoint"
    (begun / "config.yaml").unlink()
    write_status(begun, "failed", step=3, checkpoint=2)
    assert isinstance(start(begun), Resume), "its checkpoints are gone, which is to be refused"


def test_a_run_that_begins_meanwhile_is_not_written_over(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found the folder empty; the other was done before this one came to lock it."""
    config = config_of(world, tmp_path / "run")

    def meanwhile(*arguments: Any) -> Any:
        if not (tmp_path / "run").exists():
            start_run_folder(config, fresh=True)
        return set_up(*arguments)

    set_up = train.set_up
    monkeypatch.setattr(train, "set_up", meanwhile)
    with pytest.raises(PemtError, match=r"another run has begun in .* meanwhile"):
        run_adapt(config)


@pytest.mark.parametrize(("epochs", "steps"), [("3", 15), ("2.5", 13)])
def test_an_extended_run_is_unfinished_again(
    world: World, whole: Path, tmp_path: Path, epochs: str, steps: int
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    longer = config_of(world, run, num_train_epochs=epochs, resume_from_checkpoint="true")
    run_adapt(longer)
    assert [step for step, loss, _ in logged(run) if loss is not None] == list(range(1, steps + 1))
    assert json.loads((run / "all_results.json").read_text())["epoch"] == steps / 5
