"""Told to stop while libraries and data are still being read: nothing is begun, and the queue hears of it."""

from __future__ import annotations

import os
import pkgutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pemt.commands import COMMANDS
from pemt.engine.signals import INTERRUPTED_STATUS, Interrupted
from tests.support.jobs import World, last_step, status

# What is called in these moments, and where it is looked up.
MOMENTS = {"imports": "pemt.config.parse_config", "data": "pemt.run.train.load_task_data"}


@pytest.fixture(autouse=True)
def unheard() -> Iterator[list[int]]:
    """Signals that nobody took note of, which would have ended the process."""
    unheard: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: unheard.append(number))
        for number in (signal.SIGUSR1, signal.SIGTERM)
    }
    yield unheard
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("moment", MOMENTS)
def test_told_before_the_first_step(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    unheard: list[int],
    moment: str,
    number: signal.Signals,
) -> None:
    run = tmp_path / "run"
    fields = {"max_steps": "2", "save_steps": "1", "eval_strategy": "no"}
    arguments = world.arguments(run, **fields)[1:]
    with monkeypatch.context() as patch:
        patch.setattr(MOMENTS[moment], told_by(number, MOMENTS[moment]))
        with pytest.raises(Interrupted) as stopped:
            COMMANDS["adapt"](arguments)
    assert unheard == []
    assert stopped.value.code == INTERRUPTED_STATUS
    assert f"before its first step ({number.name})" in capsys.readouterr().out
    assert status(run)["state"] == "interrupted", "the SLURM scripts look there"
    assert [path.name for path in run.iterdir()] == ["status.json"]
    COMMANDS["adapt"](arguments)
    assert status(run)["state"] == "finished"
    assert last_step(run) == 2
    os.kill(os.getpid(), number)
    assert unheard == [number], "whoever had the signals before has them again"


def told_by(number: int, name: str) -> Callable[..., Any]:
    """A function that is told to stop when it is called."""
    real = pkgutil.resolve_name(name)

    def told(*arguments: Any, **fields: Any) -> Any:
        os.kill(os.getpid(), number)
        return real(*arguments, **fields)

    return told
