"""log.jsonl: a line a moment, intact after a crash, without what a resumed run logs again."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOG_FILE = "log.jsonl"
TENSORBOARD_FOLDER = "tensorboard"  # beside it; not in board.py, which takes seconds to import


class LogFile:
    """Appends lines to a run's log.jsonl; those after `initial_step`, of a run that is resumed here, are dropped."""

    def __init__(self, path: Path, *, initial_step: int) -> None:
        kept = drop_later_lines(path, initial_step) if path.exists() else []
        self._elapsed_before = max((float(line.get("elapsed", 0)) for line in kept), default=0.0)
        self._started = time.monotonic()
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One object: `step`, `time` (seconds since 1970), `elapsed` and the scalars.

        `elapsed` counts the seconds that the run has been running, over all its resumes. What is
        not finite stands there as null, as JSON has no word for it.

        Raises:
            OSError: the disk refuses; the line is kept, and written before the next one.
        """
        elapsed = self._elapsed_before + time.monotonic() - self._started
        finite = {tag: value if math.isfinite(value) else None for tag, value in scalars.items()}
        entry = {"step": step, "time": time.time(), "elapsed": round(elapsed, 3), **finite}
        self._unwritten += json.dumps(entry, allow_nan=False).encode() + b"\n"
        self._flush()

    def close(self) -> None:
        """Write what is left, and close the file.

        Raises:
            OSError: it could not be written.
        """
        with self._file:
            self._flush()

    def _flush(self) -> None:
        while self._unwritten:  # a disk that fills up takes a part of a line
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]


def read_log(path: Path) -> list[dict[str, Any]]:
    """A log's lines; a half-written one, left by a crash, is passed over."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def drop_later_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Rewrite a log.jsonl without the lines after `step`; what is left."""
    kept = [line for line in read_log(path) if line["step"] <= step]
    rewritten = path.with_suffix(".rewritten")
    rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(rewritten, path)
    return kept
