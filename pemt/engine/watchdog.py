"""Ends a job in which a rank hangs or has died, and names it.

The ranks of a job send one another a heartbeat every second, with how far they are, through the
store at which the launcher brought them together. Collective calls would wait for a rank that is
stopped; DeepSpeed's do so whatever timeout their process group was given.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import TCPStore

from pemt.engine.process import ProcessId, this_process

# The launcher ends the others as soon as one has died. Told so by SIGTERM, which a run takes for a wish
# to save, they could wait for the dead one; after this long they end by themselves.
DEATH_SECONDS = 2.0
FAILED_STATUS = 1


@dataclass(frozen=True, kw_only=True)
class Heartbeat(ProcessId):
    """A rank's heartbeat, as the others read it.

    Args:
        number: beats so far; constant while the process is stopped.
        progress: of the main thread, heartbeats (here) or barriers (waiting.py) so far; constant in a hanging call.
        step: optimizer steps done.
        left: it has left the run; its silence is no failure.
        status: what it works at, while others may wait for it.
    """

    number: int = 0
    progress: int = 0
    step: int = 0
    left: bool = False
    status: str = ""


class Watchdog:
    """One rank's watch over all; in a job of one process it does nothing.

    Args:
        rank, world_size: which this is, and of how many.
        timeout: seconds after which a rank without a heartbeat ends the job.
        on_failure: called before this process ends, on one rank.
    """

    def __init__(
        self, *, rank: int, world_size: int, timeout: float, on_failure: Callable[[], None]
    ) -> None:
        self._rank, self._world_size, self._on_failure = rank, world_size, on_failure
        self._interval = min(1.0, timeout / 20)
        self._patience = timeout - 3 * self._interval  # so that the end comes within the timeout
        self._step = self._progress = 0
        self._stopped = threading.Event()
        self._beats: dict[int, Heartbeat] = {}
        self._last_exchange = time.monotonic()

    def start(self, name: str, barrier: Callable[[], None]) -> None:
        """Begin to watch (all ranks call).

        Args:
            name: the same on all ranks, and of no other run: the launcher's store outlives a restart of the
                ranks, and a job may hold several runs.
            barrier: waits for all ranks.
        """
        if self._world_size == 1 or "MASTER_ADDR" not in os.environ:
            return
        self._prefix = f"pemt/{name}"
        self._store = connected()
        self._publish(0)
        barrier()  # from now on every rank has a beat to be read
        for work in (self._exchange, self._check_ranks):
            threading.Thread(target=work, name=f"watchdog-{work.__name__}", daemon=True).start()

    def heartbeat(self, step: int) -> None:
        """Count a heartbeat of the main thread."""
        self._step, self._progress = step, self._progress + 1

    def heartbeat_while_waiting(self) -> None:
        """The same while the main thread waits for another's work; not before its first heartbeat."""
        if self._progress:
            self._progress += 1

    def stop(self, *, together: bool) -> None:
        """End the watch.

        Args:
            together: all ranks leave the run here, so that this one's silence means nothing any more.
        """
        self._stopped.set()
        if together and hasattr(self, "_store"):
            with contextlib.suppress(RuntimeError):
                self._publish(-1, left=True)

    def _publish(self, number: int, *, left: bool = False) -> None:
        beat = Heartbeat(
            **vars(this_process()),
            number=number,
            progress=self._progress,
            step=self._step,
            left=left,
        )
        self._store.set(f"{self._prefix}/{self._rank}", json.dumps(asdict(beat)))

    def _exchange(self) -> None:
        keys = [f"{self._prefix}/{rank}" for rank in range(self._world_size)]
        number = 0
        while not self._stopped.wait(self._interval):
            number += 1
            try:
                self._publish(number)
                texts = self._store.multi_get(keys)
                self._beats = {
                    rank: Heartbeat(**json.loads(text)) for rank, text in enumerate(texts)
                }
                self._last_exchange = time.monotonic()
            except RuntimeError:
                # It may be a cable; `_check_ranks` minds how long it lasts. Of the old connection a late answer could
                # be taken for the next one's.
                with contextlib.suppress(RuntimeError):
                    self._store = connected()

    def _check_ranks(self) -> None:
        """Compare the ranks' heartbeats with those before."""
        alive: dict[int, tuple[int, float]] = {}
        moved: dict[int, tuple[int, float]] = {}
        died: dict[int, float] = {}
        while not self._stopped.wait(self._interval):
            now = time.monotonic()
            for rank, beat in self._beats.items():
                if beat.left:
                    return  # the run is over
                if alive.get(rank, (-1, now))[0] != beat.number:
                    alive[rank] = (beat.number, now)
                if moved.get(rank, (-1, now))[0] != beat.progress:
                    moved[rank] = (beat.progress, now)
                if beat.is_on_this_host() and not beat.is_alive():
                    died.setdefault(rank, now)
            if lost := [rank for rank, since in died.items() if now - since > DEATH_SECONDS]:
                self._end(lost, "has died")
            if now - self._last_exchange > self._patience:
                self._end(
                    self._ranks_beside_store(),
                    "cannot be reached: the rendezvous store on that machine has not answered "
                    f"for {self._patience:.0f} s",
                )
            # Without the store nobody is heard, whose silence would then be told on a machine that has died.
            heard = self._last_exchange
            if silent := [r for r, (_, since) in alive.items() if heard - since > self._patience]:
                self._end(silent, f"has sent no heartbeat for {self._patience:.0f} s")
            begun = [(progress, since) for progress, since in moved.values() if progress > 0]
            if begun and all(heard - since > self._patience for _, since in moved.values()):
                last = min(progress for progress, _ in moved.values())
                hanging = [rank for rank, (progress, _) in moved.items() if progress == last]
                self._end(hanging, f"hangs: no progress for {self._patience:.0f} s")

    def _ranks_beside_store(self) -> list[int]:
        """The ranks of rank 0's machine, where the store is; seen from there, rank 0 alone."""
        first = self._beats.get(0)
        if first is None or first.is_on_this_host():
            return [0]
        return [rank for rank, beat in self._beats.items() if beat.host == first.host]

    def _end(self, ranks: list[int], what: str) -> None:
        if self._stopped.is_set():
            return
        others = [rank for rank in range(self._world_size) if rank not in ranks] or ranks
        if self._rank != others[0]:
            time.sleep(3)  # one prints for all
            os._exit(FAILED_STATUS)
        named = ", ".join(self._name(rank) for rank in ranks)
        print(
            f"pemt: error: {named} {what}; the job ends here (ddp_timeout); the same command resumes from its "
            "newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        self._on_failure()
        for rank in ranks:
            beat = self._beats.get(rank)
            # A stopped process would hold the launcher up for another half a minute.
            if rank != self._rank and beat and beat.is_alive():
                os.kill(beat.pid, signal.SIGKILL)
        os._exit(FAILED_STATUS)

    def _name(self, rank: int) -> str:
        beat = self._beats.get(rank)
        if beat is None:
            return f"rank {rank}"
        return f"rank {rank} (host {beat.host}, process {beat.pid}, after step {beat.step})"


def connected(port: int | None = None, seconds: float = 60) -> TCPStore:
    """A store on the first machine; without a port the one at which the launcher brought the ranks together."""
    return TCPStore(
        os.environ["MASTER_ADDR"],
        port or int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=seconds),
    )
