"""What is asked of other processes: when a launcher began."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from pemt.engine import launcher_began
from tests.conftest import ROOT

MARK = "PEMT_TEST_RANK"
RANK = f"from pemt.engine import launcher_began as began; print(began('{MARK}'))"


def test_a_launcher_is_found_behind_the_scripts_that_it_starts() -> None:
    """This process is one; between it and the rank stands a shell that has the rank's variables."""
    command = ["sh", "-c", f'{sys.executable} -c "{RANK}"; true']
    environment = {**os.environ, MARK: "1", "PYTHONPATH": str(ROOT)}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    ours = psutil.Process()
    assert abs(float(told.stdout) - ours.create_time()) < 1
    # without one the parent is it, as for a rank that is started by hand
    assert abs((launcher_began(MARK) or 0) - ours.parent().create_time()) < 1


def test_where_processes_cannot_be_looked_at_nothing_is_guessed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "getppid", lambda: 2**22 + 1)  # above any
    assert launcher_began(MARK) is None
