"""A run's hold on its folder while it is under way: lock, status.json, and whether it is told to stop."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from types import TracebackType
from uuid import uuid4

from pemt.checkpoint import (
    STATUS,
    Checkpoints,
    LockError,
    RunLock,
    RunStatus,
    finished_status,
    saved_checkpoint,
    write_status,
)
from pemt.config import PemtError
from pemt.engine import Engine, Interrupted, StopSignals, Watchdog
from pemt.monitor import progress_logger
from pemt.storage import StorageError, write_text

# status.json is not rewritten more often than this while a run trains.
STATUS_SECONDS = 1.0
_FAILED = 1 << 30  # above any rank


class Session:
    """Use it in a `with` block around all that a run writes; every rank calls every method.

    Args:
        engine: combines over ranks what one of them has been told; its configuration names the run's output folder,
            which is made, and how long a rank may be silent.

    Raises:
        LockError: another run is under way in the folder.
        StorageError: the folder cannot be written.
    """

    def __init__(self, engine: Engine) -> None:
        self._folder, self._engine = Path(engine.config.output_dir), engine
        self._lock = RunLock(self._folder)
        self._watchdog = Watchdog(
            rank=engine.rank,
            world_size=engine.world_size,
            timeout=engine.config.ddp_timeout,
            on_failure=lambda: self._write_status("failed"),
        )
        self._watched = StopSignals()
        self._checkpoints: Checkpoints | None = None
        # the checkpoint that the run has left here; rank 0 knows
        self.saved_before: int | None = None
        # What status.json says of a run that is finished, until this one writes into its folder.
        self._finished_before: str | None = None
        self._step, self._status_written = 0, time.monotonic()

    def __enter__(self) -> Session:
        self._engine.on_rank0(self._begin, "locking the run's folder")
        self._signals = self._watched.__enter__()
        # Chosen by one rank: machines may count the launcher's restarts differently.
        self._watchdog.start(self._engine.broadcast_object(uuid4().hex), self._engine.barrier)
        # Waiting counts as progress, and from here on the watchdog reports dead ranks.
        self._engine.waiting.on_wait = self._watchdog.heartbeat_while_waiting
        return self

    def _begin(self) -> None:
        try:
            self._lock.acquire()
            self.saved_before = saved_checkpoint(self._folder)
            self._finished_before = finished_status(self._folder)
            write_status(self._folder, "running", step=0, checkpoint=self.saved_before)
        except OSError as error:
            raise StorageError(
                f"output_dir: {self._folder} cannot be written: {error.strerror}"
            ) from None

    def set_step(self, step: int) -> None:
        """Note how many optimizer steps are done."""
        self._step = step
        if self._engine.is_main and time.monotonic() > self._status_written + STATUS_SECONDS:
            self._status_written = time.monotonic()
            self._write_status("running")

    def _write_status(self, state: RunStatus) -> None:
        with contextlib.suppress(OSError):  # what matters is saved elsewhere, and complains there
            if state == "failed" and self._finished_before is not None:
                # This start was refused; results, checkpoints and log are still those of the run that is finished.
                write_text(self._folder / STATUS, self._finished_before)
                return
            saved = self._checkpoints.saved if self._checkpoints else self.saved_before
            write_status(self._folder, state, step=self._step, checkpoint=saved)

    def attach_checkpoints(self, checkpoints: Checkpoints) -> None:
        """Record in status.json what is saved from now on; a save that fails may end the run from now on."""
        self._checkpoints, self._finished_before = checkpoints, None
        # an overwritten run's are not waited for if this one is killed now
        if self._engine.is_main:
            self._write_status("running")

    def raise_if_stopped(self) -> None:
        """End the run if any rank has been told to stop, or if it must end (all ranks call, and raise together).

        Raises:
            Interrupted: a rank has received a signal, or lost its launcher.
            LockError: another run has taken the folder.
            StorageError: a checkpoint could not be written, and `save_errors` says stop.
        """
        engine, reason = self._engine, self._signals.reason()
        self._watchdog.heartbeat(self._step)
        failed = engine.is_main and self._failure() is not None
        highest = engine.all_reduce_max(
            _FAILED if failed else -1 if reason is None else engine.rank
        )
        if highest == _FAILED:
            engine.on_rank0(self._fail, "reporting why the run must stop")
        if highest >= 0:
            raise Interrupted(reason or f"rank {highest} was told to stop")

    def _fail(self) -> None:
        if error := self._failure():
            raise error

    def _failure(self) -> PemtError | None:
        if self._lock.lost:
            return LockError(f"output_dir: another run has taken over {self._folder}")
        return self._checkpoints.failure() if self._checkpoints else None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # An error may be this rank's alone; then its death is to be seen.
        self._engine.waiting.on_wait = None
        self._watchdog.stop(together=kind is None or isinstance(error, Interrupted))
        self._watched.__exit__()
        if not self._engine.is_main:
            return
        state: RunStatus = "failed"
        if kind is None:
            state = "finished"
        elif isinstance(error, Interrupted):
            state = "interrupted"
            where = (
                f"after step {self._step} ({error.reason}); a checkpoint is saved, and the same command resumes from it"
                if self._step
                else f"before its first step ({error.reason}); run the same command again"
            )
            progress_logger().info(f"stopped {where} (exit status {error.code})")
        self._write_status(state)
        self._lock.release()
