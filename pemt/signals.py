"""Being told to stop: SIGTERM, SIGUSR1 (SLURM's warning), or a launcher that is gone."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# EX_TEMPFAIL of sysexits.h: saved, run me again.
INTERRUPTED_STATUS = 75


class Interrupted(SystemExit):
    """The run has been told to stop; everything is saved, and the same command goes on. Exit status 75."""

    def __init__(self, reason: str) -> None:
        super().__init__(INTERRUPTED_STATUS)
        self.reason = reason


class StopSignals:
    """Takes note of signals instead of dying of them, between `watch` and `unwatch`."""

    def __init__(self) -> None:
        self._received: str | None = None
        self._before: dict[signal.Signals, Any] = {}
        # Without a launcher a parent may leave as it likes: that is what nohup is for.
        self._launcher = os.getppid() if "LOCAL_RANK" in os.environ else None

    def watch(self) -> None:
        """Take over the signals; only the main thread can."""
        # Elsewhere Python refuses handlers; whoever trains in a thread minds signals by themselves.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def unwatch(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reason(self) -> str | None:
        """What tells this process to stop; None while nothing does."""
        if self._received is None and self._launcher not in (None, os.getppid()):
            return "the launcher is gone"
        return self._received

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
