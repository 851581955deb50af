"""Lines that say that work goes on, for who looks at a terminal or a file; light, for they begin before any library.

Importing PyTorch, transformers and DeepSpeed takes 10 s on a slow machine, a minute on a busy one.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

# A line at least every 10 s where someone looks, every 30 s in a file.
TELL_SECONDS, TELL_SECONDS_IN_FILE = 8.0, 25.0
LOOK_SECONDS = 1.0
LIBRARIES = "reading PyTorch, transformers and DeepSpeed"


def is_due(told: float) -> bool:
    """Whether another line is due, after one at `told` of `time.monotonic()`."""
    return time.monotonic() - told > (TELL_SECONDS if sys.stderr.isatty() else TELL_SECONDS_IN_FILE)


def say(line: str) -> None:
    """Print a line on stderr, above a bar if there is one."""
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)  # not imported: there is none
    with contextlib.suppress(OSError, ValueError):  # its reader may have gone
        (bars.write if bars else print)(f"pemt: {line}", file=sys.stderr)
        sys.stderr.flush()


@contextlib.contextmanager
def telling(doing: str) -> Iterator[None]:
    """Say what this process does within the block, as long as it lasts; rank 0 alone does.

    For the time before the ranks have met; from then on `waiting.Waiting` tells of all of them.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    ended = threading.Event()
    teller = threading.Thread(target=_tell, args=(doing, ended), name="sign-of-life", daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()  # no line of it comes after the block


def _tell(doing: str, ended: threading.Event) -> None:
    began = told = time.monotonic()
    while not ended.wait(LOOK_SECONDS):
        if is_due(told):
            told = time.monotonic()
            say(f"still {doing}, {told - began:.0f} s so far")
