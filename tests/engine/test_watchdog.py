"""The watchdog among three bare processes: one is stopped, killed, hangs, or leaves; or their store is gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from tests.conftest import ROOT

RANKS, TIMEOUT = 3, 4.0
HERE = (socket.gethostname(),) * RANKS
# A main thread that comes by every 50 ms, until it is told by a line what to do.
PROGRAM = """
import os, select, socket, sys, time
from pemt.engine.watchdog import Watchdog
rank, ranks, timeout, host = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
socket.gethostname = lambda: host
watchdog = Watchdog(
    rank=rank, world_size=ranks, timeout=timeout, ended=lambda: print("ended", flush=True)
)
def barrier():
    watchdog._store.set(f"here/{rank}", "")
    watchdog._store.wait([f"here/{each}" for each in range(ranks)])
watchdog.start("run", barrier)
print("started", flush=True)
step = 0
while not select.select([sys.stdin], [], [], 0.05)[0]:
    step += 1
    watchdog.heartbeat(step)
line = sys.stdin.readline()
if line == "wait\\n":
    while not select.select([sys.stdin], [], [], 0.05)[0]:
        watchdog.waits()
if line in ("wait\\n", "work\\n"):
    line = sys.stdin.readline()
if line == "leave\\n":
    watchdog.stop(together=True)
    time.sleep(1)
    sys.exit(0)
time.sleep(60)
"""


def new_store(port: int = 0) -> TCPStore:
    return TCPStore(
        "127.0.0.1", port, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False
    )


@pytest.fixture
def store() -> list[TCPStore]:
    """The launcher's store; without a reference to it, it is gone."""
    return [new_store()]


@pytest.fixture
def ranks(
    store: list[TCPStore], request: pytest.FixtureRequest
) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes, each on the host of the fixture's parameter; started anew on some machines and not on others."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store[0].port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(RANKS), str(TIMEOUT), host],
            cwd=ROOT,
            env={**environment, "TORCHELASTIC_RESTART_COUNT": str(rank % 2)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, host in enumerate(getattr(request, "param", HERE))
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
    time.sleep(1)  # a few beats
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of every process."""
    answers = [process.communicate(timeout=60) for process in processes]
    return [
        (process.returncode, *answer) for process, answer in zip(processes, answers, strict=True)
    ]


@pytest.mark.parametrize("stopped", range(RANKS))
def test_a_stopped_rank_is_named_in_time_and_killed(
    ranks: list[subprocess.Popen[str]], stopped: int
) -> None:
    ranks[stopped].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    teller = 1 if stopped == 0 else 0
    assert ranks[teller].wait(timeout=30) == 1
    assert TIMEOUT / 2 < time.monotonic() - began < 3 * TIMEOUT, "within TIMEOUT on an idle machine"
    answers = ended(ranks)
    assert [status for status, _, _ in answers] == [
        -signal.SIGKILL if rank == stopped else 1 for rank in range(RANKS)
    ]
    told = "".join(error for _, _, error in answers)
    assert told.count("pemt: error: ") == 1
    assert (
        f"rank {stopped} (host {socket.gethostname()}, process {ranks[stopped].pid}, after step "
        in told
    )
    assert "has sent no heartbeat" in told
    assert answers[teller][1] == "ended\n", "the status is told by the one that speaks"


def test_a_dead_rank_is_named(ranks: list[subprocess.Popen[str]]) -> None:
    ranks[2].kill()
    answers = ended(ranks)
    assert [status for status, _, _ in answers] == [1, 1, -signal.SIGKILL]
    assert f"process {ranks[2].pid}, after step " in answers[0][2]
    assert "has died" in answers[0][2]


def test_a_rank_that_hangs_while_its_process_lives_is_named(
    ranks: list[subprocess.Popen[str]],
) -> None:
    """The others come by once more, and then wait for it."""
    for number, rank in enumerate((1, 0, 2)):
        stdin = ranks[rank].stdin
        assert stdin is not None
        stdin.write("hang\n")
        stdin.flush()
        if number == 0:
            time.sleep(0.5)
    answers = ended(ranks)
    assert {status for status, _, _ in answers} <= {1, -signal.SIGKILL}
    told = "".join(error for _, _, error in answers)
    assert f"rank 1 (host {socket.gethostname()}" in told
    assert "hangs: no progress for" in told


@pytest.mark.parametrize("ranks", [("one", "one", "two")], indirect=True)
def test_a_machine_that_dies_with_the_store_is_named(
    ranks: list[subprocess.Popen[str]], store: list[TCPStore]
) -> None:
    store.clear()
    for process in ranks[:2]:
        process.kill()
    began = time.monotonic()
    status, out, error = ended(ranks)[2]
    assert TIMEOUT / 2 < time.monotonic() - began < 3 * TIMEOUT, "within TIMEOUT on an idle machine"
    assert (status, out) == (1, "ended\n")
    assert error.count("pemt: error: ") == 1
    for process in ranks[:2]:
        assert f"(host one, process {process.pid}, after step " in error
    assert "cannot be reached: the rendezvous store on that machine has not answered" in error


def test_ranks_without_their_store_end_though_they_get_on(
    ranks: list[subprocess.Popen[str]], store: list[TCPStore]
) -> None:
    store.clear()
    answers = ended(ranks)
    assert [status for status, _, _ in answers] in ([1] * RANKS, [-signal.SIGKILL, 1, 1])
    told = "".join(error for _, _, error in answers)
    assert told.count("pemt: error: ") == 1
    assert f"rank 0 (host {HERE[0]}, process {ranks[0].pid}" in told
    assert "cannot be reached" in told


def test_a_store_that_comes_back_in_time_is_used_again(
    ranks: list[subprocess.Popen[str]], store: list[TCPStore]
) -> None:
    port = store.pop().port
    time.sleep(0.5)
    store.append(new_store(port))
    time.sleep(TIMEOUT)
    assert [process.poll() for process in ranks] == [None] * RANKS
    ranks[2].send_signal(signal.SIGSTOP)
    assert f"rank 2 (host {HERE[0]}" in ended(ranks)[0][2]


def test_long_work_that_the_others_wait_for_is_no_hang(
    ranks: list[subprocess.Popen[str]],
) -> None:
    def tell(*lines: str) -> None:
        for process, line in zip(ranks, lines, strict=True):
            assert process.stdin is not None
            process.stdin.write(f"{line}\n")
            process.stdin.flush()

    tell("wait", "work", "wait")
    time.sleep(2 * TIMEOUT)
    assert [process.poll() for process in ranks] == [None] * RANKS
    tell(*["leave"] * RANKS)
    assert [(status, error) for status, _, error in ended(ranks)] == [(0, "")] * RANKS


def test_who_leaves_is_not_missed(ranks: list[subprocess.Popen[str]]) -> None:
    for process in ranks:
        assert process.stdin is not None
        process.stdin.write("leave\n")
        process.stdin.flush()
    assert [(status, error) for status, _, error in ended(ranks)] == [(0, "")] * RANKS
