"""Waiting for other ranks outside of collectives, which have a timeout: honest work can take longer.

Every rank tells the others through a store that rank 0 keeps (the launcher's dies with the launcher, which the ranks
outlive to save) what it is doing and how many barriers it has reached; a thread of its own sends a heartbeat every
second. Who waits polls there: it goes on when the others have come, prints what they do meanwhile, and ends the job
when one has died.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace

import torch
from accelerate.utils import broadcast_object_list
from torch.distributed import TCPStore

from pemt.config import PemtError
from pemt.engine.process import this_process
from pemt.engine.signals import Interrupted, StopSignals
from pemt.engine.status_lines import is_due, print_line
from pemt.engine.watchdog import DEATH_SECONDS, FAILED_STATUS, Heartbeat, connected

BEAT_SECONDS = 1.0
WAITING = "waiting"  # the status of a rank at a barrier
# Of a process on this machine the kernel tells whether it lives. Of another machine's only its thread does, and a
# library may keep that from running for a while.
SILENT_SECONDS = 30.0


class Waiting:
    """One rank's barriers with the others; all call `barrier` and `local_first` equally often, in the same order.

    Args:
        rank, world_size, local_rank: which this is, of how many, and which of its machine.
        port: of the store on rank 0's machine; None where there is one rank.

    `timeout` is the seconds after which a process of this machine that is stopped ends the job; `on_wait`, where
    it is set, is called at every poll, and leaves dead ranks to whoever has set it.
    """

    def __init__(
        self, *, rank: int = 0, world_size: int = 1, local_rank: int = 0, port: int | None = None
    ) -> None:
        self._rank, self._world_size = rank, world_size
        self._local_main = rank - local_rank
        self.timeout = 1800.0
        self.on_wait: Callable[[], None] | None = None
        self.store_server: TCPStore | None = None  # on rank 0
        self._keys = [str(each) for each in range(world_size)]
        self._me = Heartbeat(**vars(this_process()))
        self._status_since = time.monotonic()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._beats = [self._me] * world_size
        self._last_change: dict[int, tuple[int, float]] = {}
        self._port = port
        self._store = None if port is None else connected(port)
        self._publish()
        threading.Thread(target=self._beat_loop, name="waiting", daemon=True).start()

    @contextlib.contextmanager
    def status(self, what: str) -> Iterator[None]:
        """Show the others, and on a terminal, what this rank does within the block."""
        before, since = self._me.status, self._status_since
        self._status_since = time.monotonic()
        self._publish(status=what)
        try:
            yield
        finally:
            self._status_since = since
            self._publish(status=before)

    def barrier(self) -> None:
        """Wait until every rank has come here (all ranks call)."""
        self._publish(progress=self._me.progress + 1)
        self._wait(range(self._world_size), self._me.progress)

    @contextlib.contextmanager
    def local_first(self, what: str) -> Iterator[None]:
        """One rank of a machine runs the block before the machine's others, which find what it made (all ranks call).

        After the block comes a barrier. Of an error for the user the others learn by running the block themselves.
        """
        if self._rank != self._local_main:
            self._wait([self._local_main], self._me.progress + 1)
        try:
            with self.status(what):
                yield
        except PemtError:
            self._publish(progress=self._me.progress + 1)
            raise
        self.barrier()

    def stop(self) -> None:
        """Send nothing any more; the last barrier is passed."""
        self._stopped.set()

    def report_dead_ranks(self) -> None:
        """End the job with the name of a rank that has died; returns where after some seconds all are still there.

        For whoever has seen a collective break.
        """
        until = time.monotonic() + 2 * DEATH_SECONDS
        while self._store is not None and time.monotonic() < until:
            self._read_beats()
            self._check_alive()
            time.sleep(0.1)

    def _publish(self, **changes: object) -> None:
        with self._lock:
            self._me = replace(self._me, **changes)  # type: ignore[arg-type]
            text = json.dumps(asdict(self._me))
            if self._store is not None and not self._stopped.is_set():
                with contextlib.suppress(RuntimeError):  # its end is seen by `_read_beats`
                    self._store.set(self._keys[self._rank], text)

    def _beat_loop(self) -> None:
        last_line = self._status_since
        while not self._stopped.wait(BEAT_SECONDS):
            self._publish(number=self._me.number + 1)
            last_line = max(last_line, self._status_since)
            if (
                self._me.status not in ("", WAITING)
                and self._rank == self._local_main
                and is_due(last_line)
            ):
                last_line = time.monotonic()
                self._read_beats()
                if self._waiting(on_host=True) == [self._rank]:  # else those that wait say so
                    print_line(f"{self._me.status}: {last_line - self._status_since:.0f} s so far")

    def _read_beats(self) -> None:
        """Read the ranks' heartbeats; what was read before stays where the store does not answer."""
        if self._store is None:
            return
        with self._lock:
            try:
                texts = self._store.multi_get(self._keys)
            except RuntimeError:
                # It may be a cable. Of the old connection a late answer could be taken for the next one's.
                with contextlib.suppress(RuntimeError):
                    self._store = connected(self._port, seconds=BEAT_SECONDS)
                return
        self._beats = [Heartbeat(**json.loads(text)) for text in texts]

    def _wait(self, ranks: Iterable[int], progress: int) -> None:
        """Return when these ranks have reached this barrier."""
        if self._store is None:
            return
        self._last_change.clear()
        mine = StopSignals()
        last_line = judged = began = time.monotonic()
        pause, longest = 0.002, max(0.1, self._world_size / 256)
        with mine as signals, self.status(WAITING):
            self._read_beats()
            while late := [rank for rank in ranks if self._beats[rank].progress < progress]:
                time.sleep(pause)
                # at most half as long again as what is waited for
                pause = min(1.5 * pause, longest)
                self._read_beats()
                if self.on_wait is not None:
                    self.on_wait()
                elif time.monotonic() > judged + 2 * longest:
                    judged = time.monotonic()
                    self._check_alive()
                if signals is mine and (reason := signals.reason()):
                    # The launcher ends the others when one has died.
                    self.report_dead_ranks()
                    raise Interrupted(reason)
                if is_due(last_line):
                    last_line = time.monotonic()
                    self._print_waiting(late, last_line - began)

    def _print_waiting(self, late: list[int], seconds: float) -> None:
        if self._rank != min(self._waiting(on_host=True)):
            return
        status = self._beats[late[0]].status or "on its way"
        who = ", ".join(map(str, late[:4])) + (" …" if len(late) > 4 else "")
        print_line(f"rank {self._rank} waits for rank {who}: {status}, {seconds:.0f} s so far")

    def _waiting(self, *, on_host: bool) -> list[int]:
        """The ranks that wait, on this machine or on all; this one among them."""
        return [
            rank
            for rank, beat in enumerate(self._beats)
            if rank == self._rank
            or (beat.status == WAITING and (beat.is_on_this_host() or not on_host))
        ]

    def _check_alive(self) -> None:
        """End the job if a rank has died."""
        now = time.monotonic()
        for rank, beat in enumerate(self._beats):
            if self._last_change.get(rank, (-1, now))[0] != beat.number:
                self._last_change[rank] = (beat.number, now)
            silent = now - self._last_change[rank][1]
            limit = max(self.timeout, SILENT_SECONDS) if beat.is_on_this_host() else SILENT_SECONDS
            if beat.left or (beat.is_on_this_host() and not beat.is_alive()):
                self._end(rank, "has died")
            elif silent > limit and rank != self._rank:
                self._end(rank, f"has shown no sign of life for {silent:.0f} s")

    def _end(self, rank: int, what: str) -> None:
        beat = self._beats[rank]
        with self._lock, contextlib.suppress(RuntimeError):
            if self._store is not None:  # other machines cannot see it
                self._store.set(self._keys[rank], json.dumps(asdict(replace(beat, left=True))))
        if self._rank != min(each for each in self._waiting(on_host=False) if each != rank):
            time.sleep(3)  # one prints for all
            os._exit(FAILED_STATUS)
        status = f" while {beat.status}" if beat.status not in ("", WAITING) else ""
        print(
            f"pemt: error: rank {rank} (host {beat.host}, process {beat.pid}) {what}{status}; the job ends here, and "
            "the same command begins again, with what is finished by now",
            file=sys.stderr,
            flush=True,
        )
        os._exit(FAILED_STATUS)


@functools.cache
def waiting_of_job() -> Waiting:
    """The one of this process (all ranks call, after the process group is open)."""
    if not torch.distributed.is_initialized() or "MASTER_ADDR" not in os.environ:
        return Waiting()
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if world_size == 1:
        return Waiting()
    store_server = None
    if rank == 0:
        store_server = TCPStore(
            os.environ["MASTER_ADDR"], 0, is_master=True, wait_for_workers=False
        )
    made = Waiting(
        rank=rank,
        world_size=world_size,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        port=broadcast_object_list([store_server and store_server.port])[0],
    )
    made.store_server = store_server
    torch.distributed.barrier()  # from now on every rank has a heartbeat to be read
    return made
