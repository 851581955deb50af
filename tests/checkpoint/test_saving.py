"""Saves: killed at every file operation, on a disk that refuses, and what they cost."""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pemt.checkpoint.checkpoint import CheckpointError
from pemt.checkpoint.names import checkpoint_folders
from pemt.config import AdaptConfig, PemtError
from pemt.engine import Engine
from pemt.run.nan_guard import NonFiniteGuard
from pemt.run.train import run_adapt
from pemt.storage import StorageError, folders as storage
from tests.launch.killed import die_at
from tests.support.child import in_a_child
from tests.support.jobs import World, assert_same_end, last_step, status

pytestmark = pytest.mark.slow

SAVES = 2
# A folder, three files of tensors written and synced, the manifest, the folder synced, renamed, its parent synced.
OPERATIONS_OF_A_SAVE = 1 + 3 * 2 + 2 + 1 + 1 + 1
RENAME = OPERATIONS_OF_A_SAVE - 2
# Of the first save all before the rename, when no checkpoint is there; of the second its second and third file.
MIDDLE = (*range(1, RENAME), *range(OPERATIONS_OF_A_SAVE + 3, OPERATIONS_OF_A_SAVE + 7))
REMOVAL = 2  # the second save removes the first one's checkpoint
FIELDS = {
    "max_steps": "4",
    "save_steps": "2",
    "eval_strategy": "no",
    "save_total_limit": "1",
}


def config_of(world: World, run: Path, **fields: object) -> AdaptConfig:
    return world.config(run, **{**FIELDS, **fields})


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    run_adapt(config_of(world, run))
    return run


@pytest.mark.parametrize(
    "operation",
    [
        pytest.param(each, marks=pytest.mark.soak if each in MIDDLE else ())
        for each in range(SAVES * OPERATIONS_OF_A_SAVE + REMOVAL)
    ],
)
def test_killed_at_every_file_operation_of_a_save(
    world: World, whole: Path, tmp_path: Path, operation: int
) -> None:
    config, out = config_of(world, tmp_path / "run"), tmp_path / "out"

    def killed() -> None:
        die_at(operation)
        run_adapt(config)

    ended = in_a_child(out, killed)
    assert os.WIFSIGNALED(ended), out.read_text()
    assert os.WTERMSIG(ended) == signal.SIGKILL
    steps = [int(folder.name.split("-")[1]) for folder in checkpoint_folders(tmp_path / "run")]
    # The rename is the operation but one of a save; from then on the new checkpoint counts.
    published, within = divmod(operation, OPERATIONS_OF_A_SAVE)
    newest = 2 * min(published + (within == OPERATIONS_OF_A_SAVE - 1), SAVES)
    assert max(steps, default=0) == newest
    assert in_a_child(out, lambda: run_adapt(config)) == 0, out.read_text()
    assert (f"resuming from step {newest}/4" in out.read_text()) == (newest > 0)
    assert_same_end(tmp_path / "run", whole)
    assert list((tmp_path / "run").glob(f"{storage.TEMPORARY}*")) == [], "leftovers"


def test_there_is_no_other_file_operation(world: World, tmp_path: Path) -> None:
    """The parameters above are all there are: a run with one more is not killed."""
    out, beyond = tmp_path / "out", SAVES * OPERATIONS_OF_A_SAVE + REMOVAL

    def not_killed() -> None:
        begun = die_at(beyond)
        run_adapt(config_of(world, tmp_path / "run"))
        assert len(begun) == beyond, begun

    assert in_a_child(out, not_killed) == 0, out.read_text()


def refuse(monkeypatch: pytest.MonkeyPatch, number: int, *, times: int) -> None:
    """Let the disk refuse the first so many files of tensors."""
    fs_op, refused = storage.fs_op, []

    def perform_or_refuse(operation: Callable[..., Any], *arguments: Any) -> None:
        if operation.__name__ == "save_tensors" and len(refused) < times:
            refused.append(operation)
            raise OSError(number, os.strerror(number))
        fs_op(operation, *arguments)

    monkeypatch.setattr(storage, "fs_op", perform_or_refuse)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_refuses_ends_the_run_with_the_reason(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse(monkeypatch, number, times=99)
    with pytest.raises(
        StorageError, match=f"checkpoint-2: cannot be written: {os.strerror(number)}"
    ):
        run_adapt(config_of(world, tmp_path / "run", max_steps="150"))
    assert status(tmp_path / "run")["state"] == "failed"
    assert last_step(tmp_path / "run") < 150, "it was trained on for nothing"


def test_with_warn_the_run_goes_on_and_saves_later(
    world: World,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refuse(monkeypatch, errno.ENOSPC, times=1)
    run_adapt(config_of(world, tmp_path / "run", save_errors="warn"))
    assert "checkpoint-2 was not saved" in capsys.readouterr().out
    assert_same_end(tmp_path / "run", whole)


def test_with_warn_the_old_checkpoint_stays_and_the_end_is_an_error(
    world: World, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(
        world, tmp_path / "run", max_steps="8", save_errors="warn", lr_scheduler_type="constant"
    )
    run_adapt(config_of(world, tmp_path / "run", lr_scheduler_type="constant"))
    more = config_of(
        world,
        tmp_path / "run",
        max_steps="8",
        save_errors="warn",
        lr_scheduler_type="constant",
        resume_from_checkpoint="true",
    )
    refuse(monkeypatch, errno.ENOSPC, times=99)
    with pytest.raises(StorageError, match="checkpoint-8: cannot be written: No space left"):
        run_adapt(more)
    assert last_step(tmp_path / "run") == 8, "training went on"
    assert [folder.name for folder in checkpoint_folders(tmp_path / "run")] == ["checkpoint-4"]
    monkeypatch.undo()
    run_adapt(config)
    assert [folder.name for folder in checkpoint_folders(tmp_path / "run")] == ["checkpoint-8"]


def test_the_best_checkpoint_is_not_lost_for_a_save_that_failed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracies are all zero here, so the first validation stays the best; its save is the one that fails."""
    monkeypatch.setattr("pemt.checkpoint.train_state.merit_of", lambda metric, loss: metric)
    refuse(monkeypatch, errno.ENOSPC, times=1)
    fields = {"eval_strategy": "epoch", "max_steps": "-1", "num_train_epochs": "3"}
    results = run_adapt(
        config_of(world, tmp_path / "run", save_errors="warn", save_steps="99", **fields)
    )
    assert results["best_checkpoint"] == "checkpoint-10"
    assert (tmp_path / "run" / "checkpoint-10").is_dir()


def test_an_error_in_the_middle_of_a_save_lets_it_end(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process leaves by `os._exit` then, and what is being written would be gone with it."""
    fs_op, slow = storage.fs_op, threading.Event()

    def perform_slowly(operation: Callable[..., Any], *arguments: Any) -> None:
        if operation.__name__ == "save_tensors":
            slow.set()
            time.sleep(0.2)
        fs_op(operation, *arguments)

    def broken(*_: Any) -> None:
        if slow.is_set():
            raise PemtError("broken while a checkpoint was being written")

    monkeypatch.setattr(storage, "fs_op", perform_slowly)
    monkeypatch.setattr(NonFiniteGuard, "check", lambda *_: broken() or False)
    with pytest.raises(PemtError, match="broken while"):
        run_adapt(config_of(world, tmp_path / "run", max_steps="150"))
    assert [folder.name for folder in checkpoint_folders(tmp_path / "run")] == ["checkpoint-2"]
    assert list((tmp_path / "run").glob(f"{storage.TEMPORARY}*")) == []


def test_weights_that_are_not_finite_are_not_saved(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Engine.step

    def overflow(engine: Engine) -> float:
        norm = step(engine)
        if (
            float(engine.base_optimizer.param_groups[0]["lr"]) < 0.007
        ):  # from the third step of four on
            engine.optimizer_state.parameters[-1][1].data.view(-1)[0] = math.inf
        return norm

    monkeypatch.setattr(Engine, "step", overflow)
    with pytest.raises(CheckpointError, match=r"checkpoint-4 was not saved: `.*` holds NaN or Inf"):
        run_adapt(config_of(world, tmp_path / "run"))
    assert [folder.name for folder in checkpoint_folders(tmp_path / "run")] == ["checkpoint-2"]


def test_overwriting_a_run_clears_its_leftovers_too(world: World, tmp_path: Path) -> None:
    run_adapt(config_of(world, tmp_path / "run"))
    left = tmp_path / "run" / f"{storage.TEMPORARY}checkpoint-3-77"
    left.mkdir()
    run_adapt(config_of(world, tmp_path / "run", overwrite_output_dir="true"))
    assert not left.exists()


def test_steps_are_taken_while_a_checkpoint_is_written(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first file of the first checkpoint, of step 4, is written no sooner than step 6 is done."""
    fs_op, reached = storage.fs_op, []

    def slow(operation: Callable[..., Any], *arguments: Any) -> None:
        deadline = time.monotonic() + 20
        while not reached and last_step(tmp_path / "run") < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        reached.append(last_step(tmp_path / "run"))
        fs_op(operation, *arguments)

    monkeypatch.setattr(storage, "fs_op", slow)
    run_adapt(config_of(world, tmp_path / "run", max_steps="8", save_steps="4"))
    assert reached[0] >= 6, "the training waited for the disk"


def test_a_save_takes_twelve_bytes_a_parameter_and_says_so(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.support.tiny import make_base

    base = make_base(tmp_path / "base", d_model=320)
    config = config_of(
        world,
        tmp_path / "run",
        method="full",
        model_name_or_path=base,
        max_steps="1",
        save_steps="1",
    )
    run_adapt(config)
    told = capsys.readouterr().out
    (line,) = [line for line in told.splitlines() if "] checkpoint-1: " in line]
    trained = int(told.split(" of ")[0].split()[-1].replace(",", ""))
    size = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoint-1").iterdir())
    assert size == pytest.approx(12 * trained, rel=0.05)
    megabytes = f"{size / 1e6:.2f}" if size < 1e7 else f"{size / 1e6:,.0f}"
    assert re.search(rf"\] checkpoint-1: {megabytes} MB in [\d.]+ s, blocked [\d.]+ s$", line), line
    assert len(line) + len("000") <= 80  # a run has thousands of steps
