"""Lines that say that work goes on, from before any library is imported."""

from __future__ import annotations

import gc
import re
import sys
import time
from types import SimpleNamespace

import pytest

from pemt.engine import status_lines
from pemt.engine.status_lines import importing_libraries, is_due, print_line, show_status
from tests.conftest import python


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_lines, "LINE_SECONDS_IN_FILE", 0.0)
    monkeypatch.setattr(status_lines, "POLL_SECONDS", 0.01)


def lines(capsys: pytest.CaptureFixture[str], seconds: float = 30.0, count: int = 2) -> list[str]:
    """What is said within a block, until there are so many lines of it or the time is over."""
    said, until = "", time.monotonic() + seconds
    with show_status("reading a library"):
        while said.count("\n") < count and time.monotonic() < until:
            time.sleep(0.01)
            said += capsys.readouterr().err
    return (said + capsys.readouterr().err).splitlines()


def test_a_block_that_lasts_is_told_of_until_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    said = lines(capsys)
    assert len(said) >= 2
    for line in said:
        assert re.fullmatch(r"pemt: still reading a library, \d+ s so far", line)
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_one_that_ends_soon_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_lines, "LINE_SECONDS_IN_FILE", 1e6)
    assert lines(capsys, seconds=0.2) == []


def test_other_ranks_say_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert lines(capsys, seconds=0.2) == []


def test_on_a_terminal_sooner_than_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_lines, "LINE_SECONDS", 10.0)
    monkeypatch.setattr(status_lines, "LINE_SECONDS_IN_FILE", 1e6)
    told = time.monotonic() - 20
    for terminal in (True, False):
        monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda shown=terminal: shown))
        assert is_due(told) == terminal


def test_a_line_needs_no_bar_and_minds_one_that_is_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "tqdm", raising=False)
    print_line("no bar")
    assert capsys.readouterr().err == "pemt: no bar\n"
    above: list[str] = []
    bar = SimpleNamespace(write=lambda line, file: above.append(line))
    monkeypatch.setitem(sys.modules, "tqdm", SimpleNamespace(tqdm=bar))
    print_line("a bar")
    assert above == ["pemt: a bar"]
    # another thread is importing it
    monkeypatch.setitem(sys.modules, "tqdm", SimpleNamespace())
    print_line("half a bar")
    assert capsys.readouterr().err == "pemt: half a bar\n"


def test_it_imports_nothing_that_takes_time() -> None:
    program = "import pemt.engine.status_lines, sys; print(*sys.modules)"
    done = python("-c", program, check=True)
    assert not {"torch", "tqdm", "numpy", "accelerate"} & set(done.stdout.split())


def test_the_garbage_collector_rests_during_imports_alone() -> None:
    def import_in_vain() -> None:
        with importing_libraries():
            assert not gc.isenabled()
            raise ImportError

    with pytest.raises(ImportError):
        import_in_vain()
    assert gc.isenabled(), "whether the import succeeds or not"
