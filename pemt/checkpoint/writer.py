"""Checkpoints written while training continues: by a thread on rank 0, one after another, from copies on the host."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from pemt.storage import StorageError


class BackgroundWriter:
    """Writes checkpoints in a thread; `write` waits for the one before.

    What could not be written is kept, if it is still needed, and tried again with the next one.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._lines: deque[str] = deque()
        self._unwritten: dict[int, tuple[Callable[[], Path], float]] = {}
        self.error: StorageError | None = None  # of the last attempt; None after a success

    def write(
        self, step: int, save: Callable[[], Path], *, blocked_seconds: float, needed: int | None
    ) -> None:
        """Begin to write `checkpoint-<step>`.

        Args:
            save: writes it from copies of its own, and gives the folder.
            blocked_seconds: for which training stood still while the copies were made.
            needed: the step of an earlier one that must not be lost, if that could not be written.
        """
        self.wait()
        self._unwritten = {old: each for old, each in self._unwritten.items() if old == needed}
        self._unwritten[step] = save, blocked_seconds
        # Not a daemon: Python waits for it at exit. Before `os._exit`, which does not, somebody must `wait`.
        self._thread = threading.Thread(target=self._write_all, name="checkpoint", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait, and try once more what could not be written.

        Raises:
            StorageError: it still cannot.
        """
        self.wait()
        self._write_all()
        if self.error:
            raise self.error

    def lines(self) -> list[str]:
        """What to log about the writing since the last call."""
        return [self._lines.popleft() for _ in range(len(self._lines))]

    def _write_all(self) -> None:
        for step, (save, blocked_seconds) in list(self._unwritten.items()):
            began = time.perf_counter()
            try:
                folder = save()
            except StorageError as error:
                self.error = error
                self._lines.append(f"checkpoint-{step} was not saved: {error}")
                return
            except BaseException as error:
                self.error = StorageError(f"checkpoint-{step} was not saved: {error!r}")
                raise
            self.error = None
            del self._unwritten[step]
            seconds = time.perf_counter() - began
            megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
            # with the time and the rank before it, one line of a terminal
            self._lines.append(
                f"{folder.name}: {_short(megabytes)} MB in {_short(seconds)} s, "
                f"blocked {_short(blocked_seconds)} s"
            )


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"
