"""A disk that is really full for five steps: training continues, and all but TensorBoard's curves is made up for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pemt.monitor import LOG_FILE, TENSORBOARD_FOLDER
from pemt.run.train import run_adapt
from tests.conftest import ROOT
from tests.support.full_disk import FREE_AFTER
from tests.support.jobs import World, assert_same_end, logged

FIELDS = {"max_steps": 32, "save_steps": 4, "eval_strategy": "no", "save_errors": "warn"}
FIELDS |= {"report_to": "[tensorboard]"}
UNSHARE = ["unshare", "--mount", "--map-root-user"]


def may_mount() -> bool:
    try:
        return subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.skipif(not may_mount(), reason="may not mount a disk of its own (unshare is refused)")
def test_a_disk_that_is_full_for_a_while(world: World, tmp_path: Path) -> None:
    disk, left = tmp_path / "disk", tmp_path / "disk-left"
    disk.mkdir()

    whole = tmp_path / "whole"
    run_adapt(world.config(whole, **FIELDS))
    program = [sys.executable, "-m", "tests.support.full_disk", str(disk), "1"]
    done = subprocess.run(
        [*UNSHARE, *program, *world.arguments(disk / "run", **FIELDS)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    full = "No space left on device"
    for step in range(4, FREE_AFTER, 4):
        assert f"checkpoint-{step} was not saved" in done.stdout
    assert done.stdout.count(f"{LOG_FILE}: {full}; training continues") == 1
    assert done.stdout.count(f"{TENSORBOARD_FOLDER}: {full}; training continues") == 1
    assert_same_end(left / "run", whole)
    assert [step for step, *_ in logged(left / "run")] == list(range(1, 33)), "a line is lost"
