"""Bars and lines, by what a terminal tells of itself."""

from __future__ import annotations

import fcntl
import io
import os
import struct
import sys
import termios
from types import SimpleNamespace

import pytest

from pemt.monitor import ProgressBar


@pytest.mark.parametrize(("columns", "lines"), [(0, 1), (80, 0)])
def test_on_a_terminal_without_a_width_there_are_lines(
    columns: int, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tqdm would draw nothing."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        bar = ProgressBar(total_steps=10, initial_step=0, description="training")
        bar.advance(5, loss=1.0, samples_per_second=2.0)
        bar.close()
        monkeypatch.undo()
        said = os.read(ours, 4096).decode()
    os.close(ours)
    assert "training" in said
    assert said.count("training: step 5/10, loss 1.0000") == lines


class ZMQInteractiveShell:
    """What a notebook's IPython calls its shell; a terminal's is a TerminalInteractiveShell."""


class TerminalInteractiveShell:
    """The other one."""


@pytest.mark.parametrize(
    ("shell", "is_bar"), [(ZMQInteractiveShell(), True), (TerminalInteractiveShell(), False)]
)
def test_in_a_notebook_there_is_a_bar(
    shell: object, is_bar: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    cell = io.StringIO()
    monkeypatch.setattr(sys, "stdout", cell)
    bar = ProgressBar(total_steps=10, initial_step=0, description="training")
    bar.advance(5, loss=1.0, samples_per_second=2.0)
    bar.close()
    assert ("training: step 5/10" in cell.getvalue()) is not is_bar
    assert ("5/10" in cell.getvalue()) is True
