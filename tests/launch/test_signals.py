"""SIGTERM and SIGUSR1 to a real launcher and to one of its ranks: saved, and resumed by the same command."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pemt.engine.signals import INTERRUPTED_STATUS
from tests.support.jobs import Job, World, assert_same_end, clean, last_step, status

pytestmark = [pytest.mark.launch, pytest.mark.slow]


def stopped(job: Job, told: str, number: signal.Signals) -> int:
    """Send a signal after a few more steps; the step at which all ranks stopped."""
    with clean(job):
        begun = last_step(job.run)
        job.until_step(begun + 3)
        ranks = job.ranks()
        os.kill(job.process.pid if told == "launcher" else ranks[1].pid, number)
        job.end()
        # SIGUSR1 kills the launcher and leaves the ranks, who find out.
        for rank in ranks:
            rank.wait(timeout=60)
    found = status(job.run)
    assert found["state"] == "interrupted", job.output
    step = found["step"]
    assert (job.run / f"checkpoint-{step}").is_dir()
    assert last_step(job.run) == step, "the step was finished, logged, and no further one taken"
    assert "a checkpoint is saved" in job.output
    assert not (job.run / "run.lock").exists()
    return step


WAYS = [("launcher", signal.SIGTERM), ("rank 1", signal.SIGUSR1)]


@pytest.mark.parametrize(
    "ways",
    [
        pytest.param(WAYS, id="two"),
        pytest.param([("launcher", signal.SIGUSR1)], id="third", marks=pytest.mark.soak),
    ],
)
def test_told_to_stop_in_every_way_and_gone_on_by_itself(
    world: World, undisturbed: Path, ways: list[tuple[str, signal.Signals]]
) -> None:
    steps, run = [], f"stopped-{len(ways)}"
    for told, number in ways:
        # SIGUSR1 kills the launcher: a real one, so that nothing of the forked one's beginnings counts.
        job = world.start(run, forked=(told, number) != ("launcher", signal.SIGUSR1))
        steps.append(stopped(job, told, number))
        if told == "rank 1":
            assert f"exitcode  : {INTERRUPTED_STATUS}" in job.output, job.output
    assert steps == sorted(set(steps)), "no progress from one to the next"
    job = world.start(run).finish()
    assert f"resuming from step {steps[-1]}/" in job.output
    assert_same_end(job.run, undisturbed)
    assert status(job.run)["state"] == "finished"
