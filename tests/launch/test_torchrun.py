"""launchers/torchrun.sh for real, as on two machines: a rank of one dies, both start anew and meet at once."""

from __future__ import annotations

import signal
from contextlib import ExitStack

import pytest

from tests.conftest import free_port, start_command
from tests.support.jobs import Job, World, clean, last_step, status

pytestmark = [pytest.mark.launch, pytest.mark.soak]


def test_machines_that_count_restarts_differently_meet(world: World) -> None:
    variables = {
        "NUM_NODES": "2",
        "RANKS_PER_NODE": "1",
        "RENDEZVOUS": f"localhost:{free_port()}",
        "MAX_RESTARTS": "1",
        "GLOBAL_BATCH": "8",
    }
    run = world.folder / "torchrun"
    command = ["bash", "launchers/torchrun.sh", *world.arguments("torchrun", num_train_epochs=10)]
    with ExitStack() as both:
        dying, other = (
            both.enter_context(clean(Job(command, run, variables, start=start_command)))
            for _ in range(2)
        )
        dying.until_step(7)
        # The other machine must only hear of the new start, and not lose a rank of its own too.
        (waiting,) = other.ranks()
        waiting.send_signal(signal.SIGSTOP)
        dying.ranks()[0].send_signal(signal.SIGKILL)
        other.until(lambda: "closing signal SIGTERM" in other.output)
        waiting.send_signal(signal.SIGCONT)
        other.until(lambda: restarts_of(dying) == ["1"] and len(other.ranks()) == 1)
        assert restarts_of(other) == ["0"], "both counted, so that nothing is shown"
        dying.finish()
        other.finish()
    assert "resuming from step" in dying.output + other.output
    assert (status(run)["state"], last_step(run)) == ("finished", 50)


def restarts_of(job: Job) -> list[str]:
    return [rank.environ()["TORCHELASTIC_RESTART_COUNT"] for rank in job.ranks()]
