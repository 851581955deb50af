"""Being told to stop: SIGTERM, SIGUSR1 (SLURM's warning), or a launcher that is gone."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, ClassVar

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# EX_TEMPFAIL of sysexits.h: saved, run me again.
INTERRUPTED_STATUS = 75


class Interrupted(SystemExit):
    """The run has been told to stop; everything is saved, and the same command goes on. Exit status 75."""

    def __init__(self, reason: str) -> None:
        super().__init__(INTERRUPTED_STATUS)
        self.reason = reason


class StopSignals:
    """Takes note of signals instead of dying of them, in a `with` block; a block within another is that same one."""

    _outermost: ClassVar[StopSignals | None] = None

    def __init__(self) -> None:
        self._received: str | None = None
        self._before: dict[signal.Signals, Any] = {}
        # Without a launcher a parent may leave as it likes: that is what nohup is for.
        self._launcher = os.getppid() if "LOCAL_RANK" in os.environ else None

    def __enter__(self) -> StopSignals:
        if StopSignals._outermost is None:
            StopSignals._outermost = self
            # Elsewhere Python refuses handlers; whoever trains in a thread minds signals by themselves.
            if threading.current_thread() is threading.main_thread():
                self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return StopSignals._outermost

    def __exit__(self, *_: object) -> None:
        if StopSignals._outermost is self:
            StopSignals._outermost = None
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def reason(self) -> str | None:
        """What tells this process to stop; None while nothing does."""
        if self._received is None and self._launcher not in (None, os.getppid()):
            return "the launcher is gone"
        return self._received

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
