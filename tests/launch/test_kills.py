"""kill -9 at a random step, and again by the launcher or the same command: the bits of a run undisturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.support.jobs import Job, World, assert_same_end, clean, last_step

pytestmark = [pytest.mark.launch, pytest.mark.slow]
SEEDS = 20


def kill(job: Job, seed: int) -> None:
    """One rank, or all ranks with their launcher, by turns."""
    draw = random.Random(seed)
    job.until_step(draw.randrange(1, 25))
    time.sleep(draw.uniform(0, 0.05))
    if seed % 2:
        job.kill()
    else:
        job.ranks()[draw.randrange(2)].send_signal(signal.SIGKILL)
        assert job.end() != 0


def test_one_rank_killed_the_job_goes_on_by_itself(world: World, undisturbed: Path) -> None:
    job = world.start("restarted", save_steps=3, launcher=("--max_restarts", "1"))
    with clean(job):
        job.until_step(random.Random(0).randrange(1, 25))
        job.ranks()[1].send_signal(signal.SIGKILL)
        job.finish()
    assert "resuming from step" in job.output
    assert bytes_lost(job.run) == 0
    assert_same_end(job.run, undisturbed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(SEEDS))
def test_killed_and_started_again(world: World, undisturbed: Path, seed: int) -> None:
    job = world.start(f"killed-{seed}", save_steps=3)
    with clean(job):
        kill(job, seed)
    killed_at, step = time.time(), last_step(job.run)
    lost = bytes_lost(job.run)
    job = world.start(f"killed-{seed}", save_steps=3)
    with clean(job):
        job.finish()
    first = next(
        line["time"]
        for line in map(json.loads, (job.run / "log.jsonl").read_text().splitlines())
        if line["time"] > killed_at
    )
    print(
        f"killed after step {step}: {first - killed_at:.1f} s to the first new step, {lost} bytes lost"
    )
    assert lost == 0
    assert_same_end(job.run, undisturbed)


@pytest.mark.soak
@pytest.mark.parametrize("operation", range(24, 40))
def test_killed_in_a_save_on_two_ranks(world: World, undisturbed: Path, operation: int) -> None:
    """At every file operation of the third save, the first that removes a checkpoint, and a few more."""
    run = f"saving-{operation}"
    program = ("-m", "tests.launch.killed", str(operation))
    with clean(world.start(run, program=program, save_steps=3)) as job:
        assert job.end() != 0
    before = {path.name for path in job.run.glob("checkpoint-*")}
    assert before, "no checkpoint was left"
    assert bytes_lost(job.run) == 0
    with clean(world.start(run, save_steps=3)) as job:
        job.finish()
    newest = max(before, key=lambda name: int(name.split("-")[1]))
    assert f"{newest}\n" in job.output, "the newest whole one was used"
    assert list(job.run.glob(".writing-*")) == [], "leftovers"
    assert_same_end(job.run, undisturbed)


def bytes_lost(run: Path) -> int:
    """Of published checkpoints: how many bytes are not as their manifests say."""
    from pemt.storage import open_tensors, read_manifest

    lost = 0
    for folder in run.glob("checkpoint-*"):
        manifest = read_manifest(folder)
        for name, listed in manifest["files"].items():
            open_tensors(folder, name, manifest)  # raises where a checksum differs
            lost += abs(os.path.getsize(folder / name) - listed["bytes"])
    return lost
