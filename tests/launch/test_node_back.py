"""launchers/torchrun.sh as on two machines, of which one dies with its launcher and is started again."""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack

import pytest

from tests.conftest import free_port, start_command
from tests.support.jobs import Job, World, clean, last_step, status

pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.soak]
TIMEOUT = 20  # ddp_timeout: ranks that do not see one another's signs of life end the job after it


@pytest.mark.parametrize("nodes", ["2", "1:2"])
def test_a_machine_that_comes_back_is_taken_in(world: World, nodes: str) -> None:
    """With `2` the other machine waits for it; with `1:2` that one goes on alone until it is there."""
    port = free_port()
    variables = {
        "NUM_NODES": nodes,
        "RANKS_PER_NODE": "1",
        "RENDEZVOUS": f"localhost:{port}",
        "MAX_RESTARTS": "3",
        "GLOBAL_BATCH": "8",
    }
    name = f"back-{nodes.replace(':', '-')}"
    arguments = world.arguments(
        name, ddp_timeout=TIMEOUT, num_train_epochs=10_000, eval_strategy="no", save_steps=5
    )
    command, run = ["bash", "launchers/torchrun.sh", *arguments], world.folder / name
    with ExitStack() as jobs:

        def machine() -> Job:
            return jobs.enter_context(clean(Job(command, run, variables, start=start_command)))

        stays = machine()
        stays.until(lambda: answers(port))  # the rendezvous is on this one
        dies = machine()
        dies.until_step(7)
        dies.kill()
        if nodes == "1:2":
            stays.until(lambda: "now on 1: gradient_accumulation_steps becomes 2" in stays.output)
            alone = last_step(run)
            stays.until(lambda: last_step(run) > alone + 2)
        returns = machine()
        returns.until(returns.ranks)
        back = last_step(run)
        returns.until(lambda: last_step(run) > back)
        enough = time.monotonic() + TIMEOUT + 5
        returns.until(lambda: time.monotonic() > enough)
        back = last_step(run)
        returns.until(lambda: last_step(run) > back)
        for job in (stays, returns):
            assert job.process.poll() is None, job.output
            job.process.terminate()
        for job in (stays, returns):
            job.end()
    assert status(run)["state"] == "interrupted"
    manifest = run / f"checkpoint-{status(run)['step']}" / "manifest.json"
    assert json.loads(manifest.read_text())["world_size"] == 2


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0
