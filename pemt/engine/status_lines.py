"""Status lines while work takes long, on a terminal or in a file; light, for they begin before any library.

Importing PyTorch, transformers and DeepSpeed takes 10 s on a slow machine, a minute on a busy one.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import time
from collections.abc import Iterator

# A line at least every 10 s where someone looks, every 30 s in a file.
LINE_SECONDS, LINE_SECONDS_IN_FILE = 8.0, 25.0
POLL_SECONDS = 1.0
LIBRARIES = "reading PyTorch, transformers and DeepSpeed"  # what `pemt demo` prints too


def is_due(last_line: float) -> bool:
    """Whether another line is due, after one at `last_line` of `time.monotonic()`."""
    return time.monotonic() - last_line > (
        LINE_SECONDS if sys.stderr.isatty() else LINE_SECONDS_IN_FILE
    )


def print_line(line: str) -> None:
    """Print a line on stderr, above a bar if there is one."""
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)  # not imported: there is none
    with contextlib.suppress(OSError, ValueError):  # its reader may have gone
        (bars.write if bars else print)(f"pemt: {line}", file=sys.stderr)
        sys.stderr.flush()


@contextlib.contextmanager
def show_status(description: str) -> Iterator[None]:
    """Print what this process does within the block, again and again while it lasts; rank 0 alone does.

    For the time before the process group is open; from then on `waiting.Waiting` does it for all ranks.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(
        target=_print_status, args=(description, ended), name="status", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()  # no line of it comes after the block


@contextlib.contextmanager
def importing_libraries() -> Iterator[None]:
    """`show_status` of the imports within the block, in which Python's garbage collector rests.

    Imports make objects by the million and next to no garbage; the collector would look through all of them again and
    again, for a fifth of the time (LOG.md, 2026-11-29). It never looks at them later, either.
    """
    gc.disable()
    try:
        with show_status(LIBRARIES):
            yield
    finally:
        gc.freeze()
        gc.enable()


def _print_status(description: str, ended: threading.Event) -> None:
    began = last_line = time.monotonic()
    while not ended.wait(POLL_SECONDS):
        if is_due(last_line):
            last_line = time.monotonic()
            print_line(f"still {description}, {last_line - began:.0f} s so far")
