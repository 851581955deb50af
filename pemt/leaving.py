"""The end of a process: all that Python does at exit, and then no destructor of a C++ library.

Rarely one of those aborts a process whose work is done and on disk ("terminate called without an active exception"),
and a launcher then reports a finished run as failed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable


def run_and_leave(program: Callable[[], object]) -> None:
    """Run a program whose return, or `sys.exit`, is the end of the process; an exception ends it as ever.

    Call it before the imports that register exit functions of their own: they then run before this one's.
    """
    statuses: list[int] = []

    def leave() -> None:
        if statuses:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(
                    OSError, ValueError
                ):  # its reader has gone, or it is closed
                    stream.flush()
            os._exit(statuses[0])

    atexit.register(leave)
    try:
        program()
    except SystemExit as exit:
        if exit.code is None or isinstance(exit.code, int):
            statuses.append(exit.code or 0)
        raise
    statuses.append(0)
