"""The watchdog among three bare processes: one is stopped, killed, hangs, or leaves; or their store is gone."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore

from pemt.engine.process import this_process
from pemt.engine.watchdog import Heartbeat, Watchdog
from tests.support.ranks import Forked

# On the worker that has the process from which ranks are forked.
pytestmark = pytest.mark.xdist_group("launch")
RANKS, TIMEOUT = 3, 4.0
HERE = (socket.gethostname(),) * RANKS


def new_store(port: int = 0) -> TCPStore:
    return TCPStore(
        "127.0.0.1", port, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False
    )


class Watched:
    """A process that takes lines, and what it has printed."""

    def __init__(self, folder: Path, rank: int, host: str, environment: dict[str, str]) -> None:
        self._told, self._out = folder / f"told-{rank}", folder / f"out-{rank}"
        os.mkfifo(self._told)
        self._lines = os.open(self._told, os.O_RDWR)
        command = ["-m", "tests.engine.watched", str(rank), str(RANKS), str(TIMEOUT), host]
        self.process = Forked(command, self._out, environment, stdin=self._told)
        self.pid = self.process.pid

    def tell(self, line: str) -> None:
        os.write(self._lines, f"{line}\n".encode())

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def has_started(self) -> bool:
        return self._out.exists() and "started\n" in self._out.read_text()

    def end(self) -> tuple[int, str]:
        """Exit status, and what it printed after `started`."""
        status = self.process.wait(timeout=60)
        return status, self._out.read_text().removeprefix("started\n")

    def close(self) -> None:
        if self.process.poll() is None:
            self.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self._lines)


Ranks = list[Watched]
Store = list[TCPStore]  # the launcher's; without a reference to it, it is gone
Play = Callable[[Ranks, Store], None]
PLAYS: dict[str, tuple[Play, tuple[str, ...]]] = {}


def together(*hosts: str) -> Callable[[Play], Callable[..., None]]:
    """A test of processes on these hosts that is played while the file's others are: most of each is waiting."""

    def registered(play: Play) -> Callable[..., None]:
        def test(plays: dict[str, Future[None]]) -> None:
            plays[play.__name__].result()

        PLAYS[play.__name__] = play, hosts or HERE
        test.__doc__ = play.__doc__
        return test

    return registered


@pytest.fixture(scope="module")
def plays(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    """What comes of the tests that are asked for; all processes have started before any is played."""
    asked = [name for name in PLAYS if any(name == item.name for item in request.session.items)]
    stores: dict[str, Store] = {name: [new_store()] for name in asked}
    ranks = {
        name: start_ranks(tmp_path_factory.mktemp("watched"), PLAYS[name][1], stores[name][0].port)
        for name in asked
    }
    started = [process for each in ranks.values() for process in each]
    deadline = time.monotonic() + 120
    while not all(process.has_started() for process in started):
        assert time.monotonic() < deadline, [process.end() for process in started]
        time.sleep(0.01)
    time.sleep(1)  # a few beats
    with ThreadPoolExecutor(len(asked)) as pool:
        yield {name: pool.submit(PLAYS[name][0], ranks[name], stores[name]) for name in asked}
    for process in started:
        process.close()


def start_ranks(folder: Path, hosts: tuple[str, ...], port: int) -> Ranks:
    """Started anew on some machines and not on others."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        Watched(folder, rank, host, {**environment, "TORCHELASTIC_RESTART_COUNT": str(rank % 2)})
        for rank, host in enumerate(hosts)
    ]


def ended(processes: Ranks) -> list[tuple[int, str]]:
    """Exit status and what was printed, of every process."""
    return [process.end() for process in processes]


def stop(ranks: Ranks, stopped: int) -> None:
    ranks[stopped].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    teller = 1 if stopped == 0 else 0
    assert ranks[teller].process.wait(timeout=30) == 1
    assert TIMEOUT / 2 < time.monotonic() - began < 3 * TIMEOUT, "within TIMEOUT on an idle machine"
    answers = ended(ranks)
    assert [status for status, _ in answers] == [
        -signal.SIGKILL if rank == stopped else 1 for rank in range(RANKS)
    ]
    told = "".join(text for _, text in answers)
    assert told.count("pemt: error: ") == 1
    assert (
        f"rank {stopped} (host {socket.gethostname()}, process {ranks[stopped].pid}, after step "
        in told
    )
    assert "has sent no heartbeat" in told
    assert answers[teller][1].endswith("ended\n"), "the status is told by the one that speaks"


@together()
def test_a_stopped_rank_is_named_in_time_and_killed(ranks: Ranks, store: Store) -> None:
    stop(ranks, 0)


@pytest.mark.soak
@together()
def test_a_stopped_rank_1_is_named_in_time_and_killed(ranks: Ranks, store: Store) -> None:
    stop(ranks, 1)


@pytest.mark.soak
@together()
def test_a_stopped_rank_2_is_named_in_time_and_killed(ranks: Ranks, store: Store) -> None:
    stop(ranks, 2)


@together()
def test_a_dead_rank_is_named(ranks: Ranks, store: Store) -> None:
    ranks[2].send_signal(signal.SIGKILL)
    answers = ended(ranks)
    assert [status for status, _ in answers] == [1, 1, -signal.SIGKILL]
    assert f"process {ranks[2].pid}, after step " in answers[0][1]
    assert "has died" in answers[0][1]


@together()
def test_a_rank_that_hangs_while_its_process_lives_is_named(ranks: Ranks, store: Store) -> None:
    """The others come by once more, and then wait for it."""
    for number, rank in enumerate((1, 0, 2)):
        ranks[rank].tell("hang")
        if number == 0:
            time.sleep(0.5)
    answers = ended(ranks)
    assert {status for status, _ in answers} <= {1, -signal.SIGKILL}
    told = "".join(text for _, text in answers)
    assert f"rank 1 (host {socket.gethostname()}" in told
    assert "hangs: no progress for" in told


@together("one", "one", "two")
def test_a_machine_that_dies_with_the_store_is_named(ranks: Ranks, store: Store) -> None:
    store.clear()
    for process in ranks[:2]:
        process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    status, error = ranks[2].end()
    assert TIMEOUT / 2 < time.monotonic() - began < 3 * TIMEOUT, "within TIMEOUT on an idle machine"
    assert status == 1
    assert "\nended\n" in error  # PyTorch's store may log its own end behind it
    assert error.count("pemt: error: ") == 1
    for process in ranks[:2]:
        assert f"(host one, process {process.pid}, after step " in error
    assert "cannot be reached: the rendezvous store on that machine has not answered" in error


@pytest.mark.soak  # where the machine with the store dies they have no store either
@together()
def test_ranks_without_their_store_end_though_they_get_on(ranks: Ranks, store: Store) -> None:
    store.clear()
    answers = ended(ranks)
    assert [status for status, _ in answers] in ([1] * RANKS, [-signal.SIGKILL, 1, 1])
    told = "".join(text for _, text in answers)
    assert told.count("pemt: error: ") == 1
    assert f"rank 0 (host {HERE[0]}, process {ranks[0].pid}" in told
    assert "cannot be reached" in told


@together()
def test_a_store_that_comes_back_in_time_is_used_again(ranks: Ranks, store: Store) -> None:
    port = store.pop().port
    time.sleep(0.5)
    store.append(new_store(port))
    time.sleep(TIMEOUT)
    assert [process.process.poll() for process in ranks] == [None] * RANKS
    ranks[2].send_signal(signal.SIGKILL)
    assert f"rank 2 (host {HERE[0]}" in ended(ranks)[0][1]


@pytest.mark.soak  # of real work: test_waiting.py
@together()
def test_long_work_that_the_others_wait_for_is_no_hang(ranks: Ranks, store: Store) -> None:
    for process, line in zip(ranks, ("wait", "work", "wait"), strict=True):
        process.tell(line)
    time.sleep(2 * TIMEOUT)
    assert [process.process.poll() for process in ranks] == [None] * RANKS
    for process in ranks:
        process.tell("leave")
    assert ended(ranks) == [(0, "")] * RANKS


@together()
def test_who_leaves_is_not_missed(ranks: Ranks, store: Store) -> None:
    for process in ranks:
        process.tell("leave")
    assert ended(ranks) == [(0, "")] * RANKS


def test_nobody_is_silent_while_the_store_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 misses a beat, and then its machine dies with the store: rank 1, dead too, would have to tell of it."""
    watchdog = Watchdog(rank=2, world_size=3, timeout=20.0, on_failure=lambda: None)
    clock, ends = [0.0], []

    def wait(seconds: float) -> bool:
        clock[0] += seconds
        if clock[0] < 5:
            here = [replace(this_process(), host=host) for host in ("one", "one", "two")]
            numbers = (min(clock[0], 3), clock[0], clock[0])
            watchdog._beats = {
                rank: Heartbeat(**vars(process), number=int(number), progress=int(number))
                for rank, (process, number) in enumerate(zip(here, numbers, strict=True))
            }
            watchdog._last_exchange = clock[0]
        return bool(ends) or clock[0] > 60

    monkeypatch.setattr("pemt.engine.watchdog.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("socket.gethostname", lambda: "two")
    watchdog._last_exchange = 0.0
    watchdog._stopped = SimpleNamespace(wait=wait)  # type: ignore[assignment]
    watchdog._end = lambda ranks, what: ends.append((ranks, what))  # type: ignore[method-assign]
    watchdog._check_ranks()
    assert [ranks for ranks, _ in ends] == [[0, 1]]
    assert "cannot be reached" in ends[0][1]
