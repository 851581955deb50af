"""Waiting for other ranks outside of collectives, which have a timeout: honest work can take longer.

Every rank tells the others through a store that rank 0 keeps (the launcher's dies with the launcher, which the ranks
outlive to save) what it is doing and how many meetings it has come to; a thread of its own tells every second that
its process lives. Who waits looks there: it goes on when the others have come, says what they do meanwhile, and ends
the job when one has died.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace

import torch
from accelerate.utils import broadcast_object_list
from torch.distributed import TCPStore

from pemt.config import PemtError
from pemt.engine.process import start_ticks
from pemt.engine.sign_of_life import is_due, say
from pemt.engine.signals import Interrupted, StopSignals
from pemt.engine.watchdog import DEATH_SECONDS, FAILED_STATUS, Beat, connected

BEAT_SECONDS = 1.0
WAITING = "waiting"  # what a rank does that waits
# Of a process on this machine the kernel tells whether it lives. Of another machine's only its thread does, and a
# library may keep that from running for a while.
SILENT_SECONDS = 30.0


class Waiting:
    """One rank's place among all of a job; every rank calls `meet` and `local_first` equally often, in the same order.

    Args:
        rank, world_size, local_rank: which this is, of how many, and which of its machine.
        port: of the store on rank 0's machine; None where there is one rank.

    `timeout` is the seconds after which a process of this machine that is stopped ends the job; `while_waiting`,
    where it is set, is called at every look, and leaves deaths to whoever has set it.
    """

    def __init__(
        self, *, rank: int = 0, world_size: int = 1, local_rank: int = 0, port: int | None = None
    ) -> None:
        self._rank, self._world_size = rank, world_size
        self._local_main = rank - local_rank
        self.timeout = 1800.0
        self.while_waiting: Callable[[], None] | None = None
        self.kept: TCPStore | None = None  # by rank 0, for all
        self._keys = [str(each) for each in range(world_size)]
        pid = os.getpid()
        self._me = Beat(
            number=0,
            place=0,
            step=0,
            host=socket.gethostname(),
            pid=pid,
            started=start_ticks(pid) or 0,
        )
        self._doing_since = time.monotonic()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._beats = [self._me] * world_size
        self._moved: dict[int, tuple[int, float]] = {}
        self._port = port
        self._store = None if port is None else connected(port)
        self._tell()
        threading.Thread(target=self._talk, name="waiting", daemon=True).start()

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Tell the others, and whoever looks, what this rank does within the block."""
        before, since = self._me.doing, self._doing_since
        self._doing_since = time.monotonic()
        self._tell(doing=what)
        try:
            yield
        finally:
            self._doing_since = since
            self._tell(doing=before)

    def meet(self) -> None:
        """Wait until every rank has come here (all ranks call)."""
        self._tell(place=self._me.place + 1)
        self._wait(range(self._world_size), self._me.place)

    @contextlib.contextmanager
    def local_first(self, what: str) -> Iterator[None]:
        """One rank of a machine runs the block before the machine's others, which find what it made (all ranks call).

        After the block all ranks meet. Of an error for the user the others learn by running the block themselves.
        """
        if self._rank != self._local_main:
            self._wait([self._local_main], self._me.place + 1)
        try:
            with self.doing(what):
                yield
        except PemtError:
            self._tell(place=self._me.place + 1)
            raise
        self.meet()

    def stop(self) -> None:
        """Tell nothing any more; the others have been met for the last time."""
        self._stopped.set()

    def name_the_dead(self) -> None:
        """End the job with the name of a rank that has died; returns where after some seconds all are still there.

        For whoever has seen a collective break.
        """
        until = time.monotonic() + 2 * DEATH_SECONDS
        while self._store is not None and time.monotonic() < until:
            self._look()
            self._judge()
            time.sleep(0.1)

    def _tell(self, **changes: object) -> None:
        with self._lock:
            self._me = replace(self._me, **changes)  # type: ignore[arg-type]
            text = json.dumps(asdict(self._me))
            if self._store is not None and not self._stopped.is_set():
                with contextlib.suppress(RuntimeError):  # its end is seen by `_look`
                    self._store.set(self._keys[self._rank], text)

    def _talk(self) -> None:
        told = self._doing_since
        while not self._stopped.wait(BEAT_SECONDS):
            self._tell(number=self._me.number + 1)
            told = max(told, self._doing_since)
            if (
                self._me.doing not in ("", WAITING)
                and self._rank == self._local_main
                and is_due(told)
            ):
                told = time.monotonic()
                if not self._is_waited_for():  # who waits says so
                    say(f"{self._me.doing}: {told - self._doing_since:.0f} s so far")

    def _is_waited_for(self) -> bool:
        self._look()
        return any(beat.is_here() and beat.doing == WAITING for beat in self._beats)

    def _look(self) -> None:
        """Read what the ranks tell; what was read before stays where the store does not answer."""
        if self._store is None or self._port is None:
            return
        with self._lock:
            try:
                texts = self._store.multi_get(self._keys)
            except RuntimeError:
                # It may be a cable. Of the old connection a late answer could be taken for the next one's.
                with contextlib.suppress(RuntimeError):
                    self._store = connected(self._port, seconds=BEAT_SECONDS)
                return
        self._beats = [Beat(**json.loads(text)) for text in texts]

    def _wait(self, ranks: Iterable[int], place: int) -> None:
        """Return when these ranks have come to this place."""
        if self._store is None:
            return
        self._moved.clear()
        mine = StopSignals()
        told = judged = began = time.monotonic()
        pause, longest = 0.002, max(0.1, self._world_size / 256)
        with mine as signals, self.doing(WAITING):
            self._look()
            while late := [rank for rank in ranks if self._beats[rank].place < place]:
                time.sleep(pause)
                pause = min(
                    1.5 * pause, longest
                )  # at most half as long again as what is waited for
                self._look()
                if self.while_waiting is not None:
                    self.while_waiting()
                elif time.monotonic() > judged + 2 * longest:
                    judged = time.monotonic()
                    self._judge()
                if signals is mine and (reason := signals.reason()):
                    # The launcher ends the others when one has died.
                    self.name_the_dead()
                    raise Interrupted(reason)
                if is_due(told):
                    told = time.monotonic()
                    self._say_for_what(late, told - began)

    def _say_for_what(self, late: list[int], seconds: float) -> None:
        if self._rank != min(self._waiting(here=True)):
            return
        doing = self._beats[late[0]].doing or "on its way"
        who = ", ".join(map(str, late[:4])) + (" …" if len(late) > 4 else "")
        say(f"rank {self._rank} waits for rank {who}: {doing}, {seconds:.0f} s so far")

    def _waiting(self, *, here: bool) -> list[int]:
        """The ranks that wait, on this machine or on all; this one among them."""
        return [
            rank
            for rank, beat in enumerate(self._beats)
            if rank == self._rank or (beat.doing == WAITING and (beat.is_here() or not here))
        ]

    def _judge(self) -> None:
        """End the job if a rank has died."""
        now = time.monotonic()
        for rank, beat in enumerate(self._beats):
            if self._moved.get(rank, (-1, now))[0] != beat.number:
                self._moved[rank] = (beat.number, now)
            silent = now - self._moved[rank][1]
            limit = max(self.timeout, SILENT_SECONDS) if beat.is_here() else SILENT_SECONDS
            if beat.left or (beat.is_here() and not beat.is_alive_here()):
                self._end(rank, "has died")
            elif silent > limit and rank != self._rank:
                self._end(rank, f"has shown no sign of life for {silent:.0f} s")

    def _end(self, rank: int, what: str) -> None:
        beat = self._beats[rank]
        with self._lock, contextlib.suppress(RuntimeError):
            if self._store is not None:  # other machines cannot see it
                self._store.set(self._keys[rank], json.dumps(asdict(replace(beat, left=True))))
        if self._rank != min(each for each in self._waiting(here=False) if each != rank):
            time.sleep(3)  # one tells for all
            os._exit(FAILED_STATUS)
        doing = f" while {beat.doing}" if beat.doing not in ("", WAITING) else ""
        print(
            f"pemt: error: rank {rank} (host {beat.host}, process {beat.pid}) {what}{doing}; the job ends here, and "
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
    kept = None
    if rank == 0:
        kept = TCPStore(os.environ["MASTER_ADDR"], 0, is_master=True, wait_for_workers=False)
    made = Waiting(
        rank=rank,
        world_size=world_size,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        port=broadcast_object_list([kept and kept.port])[0],
    )
    made.kept = kept
    torch.distributed.barrier()  # from now on every rank has told something
    return made
