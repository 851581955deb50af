"""Two runs into one folder: the second is refused, and a dead one's lock is known as such."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pemt.checkpoint import lock
from pemt.checkpoint.lock import LOCK, LockError, RunLock, check_lock
from pemt.engine.process import start_ticks
from pemt.run import loop
from pemt.run.train import run_adapt
from tests.conftest import ROOT, python
from tests.support.jobs import World, assert_same_end

HOLD = """
import sys, time
from pathlib import Path
from pemt.checkpoint.lock import LockError, RunLock
try:
    RunLock(Path(sys.argv[1])).acquire()
except LockError as error:
    print(error, flush=True)
    sys.exit(3)
print("held", flush=True)
time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_living_holder_is_named_and_a_dead_one_is_not_minded(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(LockError, match=rf"process {holder.pid} on {socket.gethostname()}"):
        RunLock(tmp_path).acquire()
    holder.send_signal(signal.SIGKILL)
    # A killed process whose parent has not asked for it yet is dead all the same.
    while start_ticks(holder.pid) is not None:
        time.sleep(0.01)
    mine = RunLock(tmp_path)
    mine.acquire()
    holder.wait()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_find_a_dead_lock_one_alone_takes_it(tmp_path: Path) -> None:
    dead = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": 1,
    }  # our id, given out again
    (tmp_path / LOCK).write_text(json.dumps(dead))
    crowd = [hold(tmp_path) for _ in range(6)]
    answers = [process.stdout.readline() for process in crowd if process.stdout is not None]
    for process in crowd:  # the one that holds it too, once all have answered
        process.kill()
        process.communicate()
    assert sum(answer == "held\n" for answer in answers) == 1, answers
    assert sum("a run is under way" in answer for answer in answers) == 5, answers


def elsewhere(folder: Path, *, age: float) -> None:
    (folder / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 1}))
    now = time.time()
    os.utime(folder / LOCK, (now - age, now - age))


def test_on_another_host_its_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.5)
    elsewhere(tmp_path, age=3600)
    check_lock(tmp_path)
    elsewhere(tmp_path, age=0)  # silent from now on
    began = time.monotonic()
    RunLock(tmp_path).acquire()
    assert 1 < time.monotonic() - began < 20


def test_on_another_host_a_sign_of_life_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "STALE_SECONDS", 30.0)
    elsewhere(tmp_path, age=0)
    beat = threading.Timer(0.5, os.utime, [tmp_path / LOCK])
    beat.start()
    with pytest.raises(LockError, match="process 1 on elsewhere"):
        check_lock(tmp_path)
    beat.join()


def test_a_holder_touches_its_lock_and_notes_its_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    mine = RunLock(tmp_path)
    mine.acquire()
    os.utime(tmp_path / LOCK, (1, 1))
    deadline = time.monotonic() + 10
    while (tmp_path / LOCK).stat().st_mtime == 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / LOCK).stat().st_mtime > 1
    assert not mine.lost
    elsewhere(tmp_path, age=0)
    while not mine.lost and time.monotonic() < deadline:
        time.sleep(0.01)
    assert mine.lost
    mine.release()
    assert (tmp_path / LOCK).exists(), "another's lock is not ours to give back"


def test_a_second_run_is_refused_and_the_first_goes_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"max_steps": 3, "eval_strategy": "no"}
    first, alone = tmp_path / "first", tmp_path / "alone"
    arguments = world.arguments(first, **fields)
    take_step, seconds = loop._take_step, []

    def take_step_beside_another(*given: object) -> object:
        if not seconds:
            seconds.append(python("-m", "pemt", *arguments))
        return take_step(*given)

    monkeypatch.setattr(loop, "_take_step", take_step_beside_another)
    run_adapt(world.config(first, **fields))
    (second,) = seconds
    assert second.returncode == 2
    assert f"a run is under way in {first} (process {os.getpid()} on" in second.stderr
    assert "step 1/3" not in second.stdout
    monkeypatch.undo()
    run_adapt(world.config(alone, **fields))
    assert_same_end(first, alone)
