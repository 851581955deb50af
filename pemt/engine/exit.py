"""The end of a process that has done its work: Python's exit functions, and then no destructor of a C++ library.

Rarely one of those aborts a process whose work is on disk ("terminate called without an active exception"), and a
launcher then reports a finished run as failed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable

_before_exit: dict[Callable[[], None], None] = {}


def before_exit(function: Callable[[], None]) -> None:
    """Have `finish` call the function, once however often this is asked for."""
    _before_exit[function] = None


def finish() -> None:
    """What this process owes the other ranks once its command has succeeded or was interrupted."""
    for function in _before_exit:
        function()


def run_and_exit(program: Callable[[], object]) -> None:
    """Run a program whose return, or `sys.exit`, is the end of the process; an exception ends it as ever.

    Threads are waited for, and exit functions run that are registered from here on: import in `program` what has some.
    Files that are left open are not flushed.
    """
    statuses: list[int] = []

    def leave() -> None:
        if statuses:
            for stream in (sys.stdout, sys.stderr):
                # its reader may have gone, or it may be closed
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(statuses[0])

    atexit.register(leave)
    try:
        program()
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            statuses.append(left.code or 0)
        raise
    statuses.append(0)
