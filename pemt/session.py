"""A run's hold on its folder while it is under way: lock, status.json, and whether it is told to stop."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from types import TracebackType

from pemt.engine import Engine
from pemt.lock import RunLock
from pemt.signals import Interrupted, StopSignals
from pemt.status import State, write_status
from pemt.storage import StorageError

# status.json is not rewritten more often than this while a run trains.
STATUS_SECONDS = 1.0


class Session:
    """Use it in a `with` block around all that a run writes; every rank calls every method.

    Args:
        folder: the run's output folder, which is made.
        engine: combines over ranks what one of them has been told.

    Raises:
        LockError: another run is under way in the folder.
        StorageError: the folder cannot be written.
    """

    def __init__(self, folder: Path, engine: Engine) -> None:
        self._folder, self._engine = folder, engine
        self._lock = RunLock(folder)
        self._signals = StopSignals()
        self._step, self._told = 0, time.monotonic()

    def __enter__(self) -> Session:
        self._engine.on_main(self._begin)
        self._signals.watch()
        return self

    def _begin(self) -> None:
        try:
            self._lock.acquire()
            write_status(self._folder, "running", step=0)
        except OSError as error:
            raise StorageError(
                f"output_dir: {self._folder} cannot be written: {error.strerror}"
            ) from None

    def reached(self, step: int) -> None:
        """Note how many optimizer steps are done."""
        self._step = step
        if self._engine.is_main and time.monotonic() > self._told + STATUS_SECONDS:
            self._told = time.monotonic()
            with contextlib.suppress(
                OSError
            ):  # what matters is saved elsewhere, and complains there
                write_status(self._folder, "running", step=step)

    def check(self) -> None:
        """Leave the run if any rank has been told to (all ranks call, and leave together).

        Raises:
            Interrupted: a rank has received a signal, or lost its launcher.
        """
        reason = self._signals.reason()
        told = self._engine.highest(-1 if reason is None else self._engine.rank)
        if told >= 0:
            raise Interrupted(reason or f"rank {told} was told to")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._signals.unwatch()
        if not self._engine.is_main:
            return
        state: State = "failed"
        if kind is None:
            state = "finished"
        elif isinstance(error, Interrupted):
            state = "interrupted"
            print(
                f"stopped after step {self._step} ({error.reason}); it is saved, and the same command goes on from "
                f"there (exit status {error.code})",
                flush=True,
            )
        with contextlib.suppress(OSError):  # an error is under way that says more
            write_status(self._folder, state, step=self._step)
        self._lock.release()
