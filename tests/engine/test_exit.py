"""A process that has done its work cannot be aborted by a library's destructor any more."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.conftest import ROOT, python

# What a broken destructor does, at the C library's exit, after Python's end.
ABORTING = """
import ctypes
libc = ctypes.CDLL(None)
libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)
"""
PROGRAM = """
import atexit, sys, threading, time
from pemt.engine.exit import run_and_exit
def work():
    time.sleep(0.3)
    print("the thread has ended")
def main():
    atexit.register(print, "exit functions have run")
    threading.Thread(target=work).start()
    print("done")
"""
TOLD = ["done", "the thread has ended", "exit functions have run"]


def test_what_aborts_at_exit_aborts_a_process_that_leaves_as_python_does() -> None:
    assert python("-c", f"{ABORTING}{PROGRAM}main()").returncode == -signal.SIGABRT


@pytest.mark.parametrize(
    ("end", "status"), [("", 0), ("sys.exit()", 0), ("sys.exit(3)", 3)], ids=["return", "0", "3"]
)
def test_the_status_and_all_of_pythons_exit_stay(end: str, status: int) -> None:
    done = python("-c", f"{ABORTING}{PROGRAM}    {end}\nrun_and_exit(main)")
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (status, TOLD, "")


@pytest.mark.parametrize(
    ("end", "message"),
    [("sys.exit('no')", "no\n"), ("raise KeyError('no')", "KeyError: 'no'\n")],
    ids=["exit with a text", "exception"],
)
def test_an_error_is_told_as_ever(end: str, message: str) -> None:
    done = python("-c", f"{PROGRAM}    {end}\nrun_and_exit(main)")
    assert (done.returncode, done.stdout.splitlines()) == (1, TOLD)
    assert done.stderr.endswith(message)


def test_pemt_itself_leaves_so(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(ABORTING)
    places = f"{tmp_path}{os.pathsep}{ROOT}"
    done = python("-m", "pemt", "tasks", PYTHONPATH=places)
    assert done.returncode == 0, done.stderr
    assert "sst2" in done.stdout
