"""`python` of scripts, without the ten seconds in which each would import everything (tests/support/slurm/python)."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import kill_session
from tests.support.ranks import Forked


@contextmanager
def forked_python(folder: Path) -> Iterator[dict[str, str]]:
    """The variables with which scripts take the `python` of tests/support/slurm.

    That one leaves its process id in a pipe, and waits for an exit status. Its arguments, variables, working folder and
    streams are read from what the kernel knows of it.
    """
    os.mkfifo(folder / "asked")
    asked = os.open(folder / "asked", os.O_RDWR)
    started: list[Forked] = []
    answering = threading.Thread(target=_answer, args=(folder, asked, started))
    answering.start()
    try:
        yield {"FORKED_PYTHON": str(folder)}
    finally:
        os.write(asked, b"end\n")
        for process in started:
            if process.poll() is None:
                kill_session(process)
        answering.join()
        os.close(asked)


def _answer(folder: Path, asked: int, started: list[Forked]) -> None:
    waiting = []
    with open(asked, closefd=False) as lines:
        while (line := lines.readline().strip()) != "end":
            started.append(_fork(Path("/proc", line)))
            waiting.append(threading.Thread(target=_tell, args=(started[-1], folder / line)))
            waiting[-1].start()
    for thread in waiting:
        thread.join()


def _fork(client: Path) -> Forked:
    """What a bash that runs the stand-in was started as."""
    _, _, *arguments = (client / "cmdline").read_text().split("\0")[:-1]
    variables = (client / "environ").read_text().split("\0")[:-1]
    environment = dict(each.split("=", 1) for each in variables)
    stdin, out, err = (client / "fd" / str(number) for number in range(3))
    return Forked(arguments, out, environment, err=err, folder=client / "cwd", stdin=stdin)


def _tell(process: Forked, answer: Path) -> None:
    """The client has the pipe open, if it lives: so neither of both has to wait for the other."""
    status = process.wait()
    with os.fdopen(os.open(answer, os.O_RDWR), "w") as pipe:
        pipe.write(f"{status if status >= 0 else 128 - status}\n")
