"""A rank that is stopped dead: the job ends in time, names it, and a restart by the launcher resumes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.jobs import World, assert_same_end, clean, last_step

# Each half by itself is in `make test`: test_watchdog.py names and kills a stopped rank, test_kills.py has a restart.
pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.soak]
TIMEOUT = 20


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_stopped_rank_is_named_and_the_job_goes_on_by_itself(
    world: World, undisturbed: Path, frozen: int
) -> None:
    run = f"hang-{frozen}"
    job = world.start(run, ddp_timeout=TIMEOUT, launcher=("--max_restarts", "1"))
    with clean(job):
        job.until_step(7)
        rank = job.ranks()[frozen]
        rank.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        job.until(lambda: "pemt: error: " in job.output, timeout=TIMEOUT + 5)
        named = time.monotonic() - stopped
        assert job.end() == 0, job.output
    (line,) = [each for each in job.output.splitlines() if each.startswith("pemt: error: ")]
    assert f"rank {frozen} (host {os.uname().nodename}, process {rank.pid}, after step " in line
    assert "has sent no heartbeat" in line
    print(f"named after {named:.1f} s of {TIMEOUT}")
    assert named < TIMEOUT
    assert "resuming from step" in job.output
    assert last_step(job.run) == 30
    assert_same_end(job.run, undisturbed)
