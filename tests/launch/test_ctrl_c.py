"""Ctrl-C: the first SIGINT saves, alone and behind the launcher; the second ends at once; no traceback of ours."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pemt.engine.signals import INTERRUPTED_STATUS, KILLED_STATUS, SAME_SECONDS
from tests.conftest import ROOT, python
from tests.support.jobs import World, clean, last_step, status
from tests.support.ranks import Forked

# The main thread hangs where no handler of Python runs: in one call into C.
PROGRAM = """
import ctypes, os, sys, time
from pemt.engine.signals import StopSignals
with StopSignals() as signals:
    if "forked" in sys.argv and os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    print("ready", flush=True)
    if "hanging" in sys.argv:
        mutex = ctypes.create_string_buffer(64)
        while True:  # the second time it waits for itself
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
    while True:
        time.sleep(0.01)
        if signals.reason() and "leaving" in sys.argv:
            sys.exit(signals.reason() != "SIGINT")
"""


def program(*words: str, **environment: str) -> subprocess.Popen[str]:
    variables = {key: value for key, value in os.environ.items() if key != "LOCAL_RANK"}
    started = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=ROOT,
        env={**variables, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


def told(started: subprocess.Popen[str], word: str) -> str:
    """Read what it says of a signal, so that the next one comes after it."""
    assert started.stderr is not None
    line = started.stderr.readline()
    assert word in line, line
    return line


def test_the_first_is_taken_note_of() -> None:
    started = program("leaving")
    os.kill(started.pid, signal.SIGINT)
    told(started, "SIGINT: stopping after this step, with a checkpoint; a second one stops at once")
    assert started.wait(timeout=60) == 0


@pytest.mark.parametrize("where", ["here", "hanging"])
def test_the_second_ends_at_once_even_where_no_handler_runs(where: str) -> None:
    started = program(where)
    os.kill(started.pid, signal.SIGINT)
    told(started, "a second one stops at once")
    os.kill(started.pid, signal.SIGINT)
    assert started.wait(timeout=50) == KILLED_STATUS
    _, errors = started.communicate()
    assert "stopped at once" in errors
    assert "Traceback" not in errors


def test_behind_a_launcher_the_same_ctrl_c_may_come_twice() -> None:
    """From the terminal and passed on; torch's launcher passes the second one on as SIGTERM."""
    started = program("here", LOCAL_RANK="0")
    os.kill(started.pid, signal.SIGINT)
    told(started, "a second one stops at once")
    os.kill(started.pid, signal.SIGINT)
    time.sleep(SAME_SECONDS + 0.2)
    assert started.poll() is None
    os.kill(started.pid, signal.SIGTERM)
    told(started, "stopped at once")
    assert started.wait(timeout=60) == KILLED_STATUS


def test_sigterm_alone_never_ends_at_once() -> None:
    started = program("here", LOCAL_RANK="0")
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        os.kill(started.pid, number)
    told(started, "a second one stops at once")
    assert started.poll() is None
    started.kill()
    started.communicate()


def test_what_a_forked_process_gets_is_not_counted() -> None:
    """The workers that tokenise are in the terminal's group too."""
    started = program("here", "forked")
    os.killpg(started.pid, signal.SIGINT)
    told(started, "a second one stops at once")
    time.sleep(0.3)
    assert started.poll() is None
    os.killpg(started.pid, signal.SIGKILL)
    started.communicate()


def test_a_command_with_nothing_to_save_leaves_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import pemt.commands, pemt.commands.overview, os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background\n"
        "pemt.commands.overview.overview = None\n"
        "def stop(arguments): os.kill(os.getpid(), signal.SIGINT)\n"
        "pemt.commands.COMMANDS['tasks'] = stop\n"
    )
    done = python("-m", "pemt", "tasks", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert (done.returncode, done.stdout, done.stderr) == (KILLED_STATUS, "", "")


@pytest.mark.xdist_group("launch")  # where ranks are forked
def test_alone_it_saves_and_leaves_with_75(world: World, tmp_path: Path) -> None:
    """One process without a launcher, interrupted after three steps."""
    folder, out = world.folder / "alone", tmp_path / "out"
    process = Forked(["-m", "pemt", *world.arguments("alone")], out, dict(os.environ))
    try:
        while last_step(folder) < 3:
            assert process.poll() is None, out.read_text()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        left = process.wait(timeout=300)
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
    found = status(folder)
    assert left == INTERRUPTED_STATUS, out.read_text()
    assert found["state"] == "interrupted"
    assert (folder / f"checkpoint-{found['step']}").is_dir()
    assert "(SIGINT); a checkpoint is saved, and the same command resumes" in out.read_text()
    assert "Traceback" not in out.read_text()


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("forked", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_behind_the_launcher_all_ranks_save(world: World, forked: bool) -> None:
    """In fresh interpreters, as a user starts it, in `make soak`."""
    job = world.start(f"launched-{forked}", forked=forked)
    with clean(job):
        job.until_step(3)
        ranks = job.ranks()
        os.kill(job.process.pid, signal.SIGINT)
        job.end()
        for rank in ranks:
            rank.wait(timeout=60)
    found = status(job.run)
    assert found["state"] == "interrupted", job.output
    assert (job.run / f"checkpoint-{found['step']}").is_dir()
    assert last_step(job.run) == found["step"]
    assert not (job.run / "run.lock").exists()
    assert "a checkpoint is saved, and the same command resumes" in job.output
    assert "KeyboardInterrupt" not in job.output
    # torch's launcher tells of the signal that it got; none of it is ours
    assert job.output.count("Traceback") <= 1
    assert "SignalException" in job.output
    assert "/pemt/" not in re.sub(r"(?s)^.*Traceback", "", job.output)
