"""SLURM's warning to the batch script of a real run over two "nodes": saved, queued again, finished."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, free_port, kill_session
from tests.launch.test_slurm import fake_slurm
from tests.support.jobs import World, assert_same_end, last_step, status

pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.soak]


def test_a_warned_job_goes_back_into_the_queue_and_ends_with_the_same_bits(
    world: World, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "adapt-colours"
    environment = {
        **fake_slurm(tmp_path),
        "TARGET_TASK": "colours",
        "BANK_DIR": str(tmp_path / "bank"),
        "OUTPUT_DIR": str(tmp_path / "runs"),
        "RANKS_PER_NODE": "1",
        "GLOBAL_BATCH": "8",  # as in the other run
        "MASTER_PORT": str(free_port()),
    }
    fields = world.arguments(run)[1:]
    out = tmp_path / "out"
    with out.open("w") as file:
        job = subprocess.Popen(
            ["sbatch", "--nodes=2", "launchers/slurm_adapt.sbatch", *fields],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while last_step(run) < 5:
            assert job.poll() is None, out.read_text()
            assert time.monotonic() < deadline, out.read_text()
            time.sleep(0.01)
        os.kill(int((tmp_path / "pid.1000").read_text()), signal.SIGUSR1)
        assert job.wait(timeout=180) == 0, out.read_text()
    finally:
        if job.poll() is None:
            kill_session(job)
    told = out.read_text()
    assert told.count("interrupted, back into the queue") == 1, told
    assert "resuming from step" in told
    assert status(run)["state"] == "finished"
    assert_same_end(run, undisturbed)
