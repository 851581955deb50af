"""Requests to stop: SIGTERM, SIGUSR1 (SLURM's warning), SIGINT (Ctrl-C), or a launcher that is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, ClassVar

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# EX_TEMPFAIL of sysexits.h: saved, run me again.
INTERRUPTED_STATUS = 75
KILLED_STATUS = 128 + signal.SIGINT
# A launcher may pass on what the terminal has sent to its ranks as well: within so many seconds it is one Ctrl-C.
SAME_SECONDS = 1.0
# How long a process that is told to stop may go on waiting for ranks that have not come: they may have died.
UNMET_SECONDS = 3.0


def is_interactive() -> bool:
    """Whether a person types at this very interpreter: a notebook, IPython, Python's own prompt."""
    return hasattr(sys, "ps1")


class Interrupted(SystemExit):
    """The run has been told to stop; a checkpoint is saved, and the same command resumes. Exit status 75."""

    def __init__(self, reason: str) -> None:
        super().__init__(INTERRUPTED_STATUS)
        self.reason = reason


class StopSignals:
    """Takes note of signals instead of dying of them, in a `with` block; a block within another is that same one.

    A second SIGINT ends the process at once; in an interactive Python it is a KeyboardInterrupt. So does SIGTERM after
    SIGINT behind a launcher: torch's elastic agent passes the first Ctrl-C on as SIGINT, and the second one as SIGTERM.
    """

    _outermost: ClassVar[StopSignals | None] = None

    def __init__(self) -> None:
        self._received: str | None = None
        # Before `_note`, which waits for the main thread's next line of Python.
        self._heard = threading.Event()
        self._before: dict[signal.Signals, Any] = {}
        # Without a launcher a parent may leave as it likes: that is what nohup is for.
        self._launcher = os.getppid() if "LOCAL_RANK" in os.environ else None

    def __enter__(self) -> StopSignals:
        if StopSignals._outermost is None:
            StopSignals._outermost = self
            # Elsewhere Python refuses handlers; whoever trains in a thread minds signals by themselves.
            if threading.current_thread() is threading.main_thread():
                self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
                self._watch_second()
        return StopSignals._outermost

    def __exit__(self, *_: object) -> None:
        if StopSignals._outermost is self:
            StopSignals._outermost = None
            for number, handler in self._before.items():
                signal.signal(number, handler)
            if self._before:
                signal.set_wakeup_fd(self._fd_before)
                os.close(self._wakeup_fd)
                self._listener.join()  # it has read the pipe's end

    def reason(self) -> str | None:
        """What tells this process to stop; None while nothing does."""
        if self._received is None and self._launcher not in (None, os.getppid()):
            return "the launcher is gone"
        return self._received

    def is_told(self) -> bool:
        """Whether `reason` is, or will be, one."""
        return self._heard.is_set() or self.reason() is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received == "SIGINT" and number == signal.SIGINT and is_interactive():
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name

    def _watch_second(self) -> None:
        """Hear of every signal in a thread: handlers run in the main thread, which may be waiting for a dead rank."""
        reader, self._wakeup_fd = os.pipe()
        os.set_blocking(self._wakeup_fd, False)
        self._fd_before = signal.set_wakeup_fd(self._wakeup_fd, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, args=(reader,), daemon=True)
        self._listener.start()

    def _listen(self, reader: int) -> None:
        ending, apart, first = {signal.SIGINT}, 0.0, 0.0
        if self._launcher is not None:
            ending, apart = {signal.SIGINT, signal.SIGTERM}, SAME_SECONDS
        if is_interactive():
            ending = set()  # what is in memory is somebody's work
        with open(reader, "rb", buffering=0) as signals:
            while number := signals.read(1):
                now = time.monotonic()
                if number[0] in SIGNALS:
                    self._heard.set()
                if not first and number[0] == signal.SIGINT:
                    first = now
                    _print_line(
                        "stopping after this step, with a checkpoint; a second one stops at once"
                    )
                elif first and number[0] in ending and now - first > apart:
                    _print_line(
                        "stopped at once; the same command resumes from the newest checkpoint"
                    )
                    os._exit(KILLED_STATUS)


@contextlib.contextmanager
def ended_while_unmet() -> Iterator[None]:
    """Where ranks meet: a process that is told to stop within ends soon, since nothing is begun that could be saved.

    It waits for ranks that may have died before they came, and in C++, where no handler of a signal runs.
    """
    signals, met = StopSignals._outermost, threading.Event()

    def watch(signals: StopSignals) -> None:
        while not met.wait(1.0):
            if signals.is_told() and not met.wait(UNMET_SECONDS):
                print(
                    f"pemt: rank {os.environ.get('RANK', 0)}: told to stop while it waits for the other ranks",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(INTERRUPTED_STATUS)

    if signals is not None and not is_interactive():
        threading.Thread(target=watch, args=(signals,), daemon=True).start()
    try:
        yield
    finally:
        met.set()


def _print_line(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            print(f"pemt: SIGINT: {text}", file=sys.stderr, flush=True)


def _hold_signals() -> None:
    _held.before = None
    # Python's own handler of SIGINT must not run within these hooks
    if StopSignals._outermost is not None:
        _held.before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _release_signals() -> None:
    if _held.before is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _held.before)


def _forget_in_child() -> None:
    """What a forked process receives is not this one's, from its first moment on."""
    if StopSignals._outermost is not None and StopSignals._outermost._before:
        signal.set_wakeup_fd(-1)
    _release_signals()


_held = threading.local()
os.register_at_fork(
    before=_hold_signals, after_in_parent=_release_signals, after_in_child=_forget_in_child
)
