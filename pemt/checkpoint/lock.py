"""One run a folder: `run.lock` names the host and process of the run that holds it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import asdict
from pathlib import Path

from pemt.config import PemtError
from pemt.engine import ProcessId, this_process

LOCK = "run.lock"
BEAT_SECONDS = 10.0
# A holder on another host that has not touched its lock for so long is taken for dead.
STALE_SECONDS = 60.0


class LockError(PemtError):
    """Another run is under way in this folder."""


class RunLock:
    """The lock of a run's folder; made once, by rank 0.

    While it is held, a thread touches the file, so that another host can tell a dead holder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._me = this_process()
        self._released = threading.Event()
        self.lost = False  # somebody took this process for dead, and the lock with it

    def acquire(self) -> None:
        """Take the lock, also from a holder that is dead.

        Raises:
            LockError: its holder lives, or may live.
            OSError: the folder cannot be written.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        check_lock(self._path.parent)
        self._take_away_dead()
        try:
            with self._path.open("x", encoding="utf-8") as file:  # one alone succeeds
                json.dump(asdict(self._me), file)
        except FileExistsError:
            raise _refusal(self._path) from None
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()

    def _take_away_dead(self) -> None:
        aside = self._path.with_name(f"{LOCK}-{self._me.host}-{self._me.pid}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._path, aside)
            # Of two that find the same dead lock, the slower one may have moved the faster one's.
            if _is_stale(aside):
                aside.unlink()
            else:
                os.rename(aside, self._path)

    def release(self) -> None:
        """Give the lock back, if it is still ours."""
        self._released.set()
        if _holder(self._path) == self._me:
            self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            holder = _holder(self._path)
            self.lost = holder is not None and holder != self._me
            if holder == self._me:
                with contextlib.suppress(OSError):
                    os.utime(self._path)


def check_lock(folder: Path) -> None:
    """Refuse a folder in which a run is under way.

    On another host it is under way if it touches its lock while we watch; if that is too old, it is dead.
    In between, this waits: at most STALE_SECONDS.

    Raises:
        LockError: it is.
    """
    path = folder / LOCK
    first = _touched(path)
    while path.exists() and not _is_stale(path):
        holder = _holder(path)
        if holder is None or holder.is_on_this_host() or _touched(path) != first:
            raise _refusal(path)
        time.sleep(1.0)


def _is_stale(path: Path) -> bool:
    holder, touched = _holder(path), _touched(path)
    if touched is None:
        return True
    if holder is not None and holder.is_on_this_host():
        return not holder.is_alive()
    # By the disk's own clock: hosts disagree about the time.
    probe = path.with_name(f"{LOCK}-{socket.gethostname()}-{os.getpid()}-now")
    probe.touch()
    try:
        return probe.stat().st_mtime - touched > STALE_SECONDS
    finally:
        probe.unlink(missing_ok=True)


def _touched(path: Path) -> float | None:
    """When the lock was last touched; None if it is gone. Opened, since network disks remember old times."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return None


def _holder(path: Path) -> ProcessId | None:
    try:
        return ProcessId(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _refusal(path: Path) -> LockError:
    holder = _holder(path)
    who = f"process {holder.pid} on {holder.host}" if holder else "an unknown process"
    return LockError(
        f"output_dir: a run is under way in {path.parent} ({who}); wait for its end, or give another folder"
    )
