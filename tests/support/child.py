"""A forked copy of this process, which may be killed or left changed: nothing has to be imported anew."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def start_child(out: Path, function: Callable[[], object]) -> int:
    """Begin a function in a forked process, its output to a file; the process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sys.stdout = sys.stderr = out.open("w", buffering=1)
            function()
            status = 0
        except BaseException:  # noqa: BLE001  # it must not go on as a second pytest
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def in_a_child(out: Path, function: Callable[[], object]) -> int:
    """The same to its end; the wait status."""
    return os.waitpid(start_child(out, function), 0)[1]
