"""The comparison with the published code, as far as it can be seen without it; and all of it where it is named."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pemt.commands import COMMANDS
from pemt.plan import KNOWN
from tests.bench.test_step import SMALL
from tests.beside.__main__ import main
from tests.beside.measure import HEAD, Row, check_same, line, measure
from tests.beside.process import BesideError, Worker, check_published
from tests.beside.recipe import FROZEN, STAGES
from tests.beside.start import first_step, our_command
from tests.beside.world import write_world

HERE = Path(__file__).parent
CHECKOUT, PYTHON = "PEMT_PUBLISHED", "PEMT_PUBLISHED_PYTHON"
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beside")
    write_world(folder, SMALL, batch=2, source=12, target=4, rows=5)
    return folder


@pytest.fixture(scope="module")
def asking(world: Path) -> Callable[[], Ask]:
    """Our side in this process, as often as asked for; its files have the names that a worker gives them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        ours = importlib.import_module("ours")
    return lambda: _ask(ours.Ours(str(world)))


def _ask(side: Any) -> Ask:
    return lambda do, **fields: getattr(side, do)(**fields)


@pytest.fixture(scope="module")
def rows(asking: Callable[[], Ask]) -> list[Row]:
    return list(measure("tiny", {"theirs": asking(), "ours": asking()}, rounds=2))


@pytest.mark.soak
def test_every_figure_of_both_stages(rows: list[Row]) -> None:
    named = [f"{row.name.partition(': ')[2]}, {row.unit}" for row in rows]
    units = ("step, ms", "step, CPU ms", "memory of a step, MB")
    steps = [f"stage {k}, {unit}" for k in (1, 2) for unit in units]
    more = [f"{what}, {unit}" for what in ("answering", "evaluation") for unit in ("ms", "CPU ms")]
    assert named == [*steps, *more]
    for row in rows:
        rounds = 1 if "memory" in row.name else 2
        for values in (row.theirs, row.ours, *row.frozen.values()):
            assert len(values) == rounds
        assert all(value > 0 for value in row.theirs if "memory" not in row.name)
        assert bool(row.frozen) == ("evaluation" not in row.name)
    assert rows[0].note.startswith("loss ")
    assert rows[6].note == "2 of 2 answers equal"


def test_a_line_has_medians_deviations_and_quotients() -> None:
    frozen = {"theirs": [2.0, 2.0, 2.0], "ours": [10.0, 20.0, 30.0]}
    row = Row(
        name="a step",
        unit="ms",
        theirs=[20.0, 40.0, 90.0],
        ours=[100.0, 210.0, 300.0],
        frozen=frozen,
    )
    bare = Row(name="memory", unit="MB", theirs=[300.0], ours=[150.0], note="seen")
    assert {each.count("|") for each in HEAD.splitlines()} == {line(row).count("|")}
    assert [line(row), line(bare)] == [
        "| a step, ms | 2.0 ± 0.0 | 20.0 ± 10.0 | 40.0 ± 36.1 | 210 ± 100 | 2.00 | 10.00 | 0.20 |  |",
        "| memory, MB |  |  | 300 | 150 |  |  | 2.00 | seen |",
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("check", "loss", 1.0001), "loss: theirs"),
        (("check", "gradient_norm", 1.01), "gradient_norm: theirs"),
        (("check", "loss", float("nan")), "loss: theirs"),
        (("load", "trained", 2), "trained parameters differ"),
    ],
)
def test_codes_that_differ_are_not_compared(
    asking: Callable[[], Ask], change: tuple[str, str, float], told: str
) -> None:
    ask, (request, key, factor) = asking(), change

    def other(do: str, **fields: Any) -> dict[str, Any]:
        answer = ask(do, **fields)
        return {**answer, key: factor * answer[key]} if do == request else answer

    with pytest.raises(BesideError, match=told):
        check_same("stage2", {"theirs": ask, "ours": other})


def test_a_step_trains_and_a_check_does_not(asking: Callable[[], Ask]) -> None:
    ask = asking()
    for stage in STAGES:
        ask("load", stage=stage)
        first = ask("check", stage=stage)
        assert ask("check", stage=stage) == first
        for _ in range(3):
            ask("run", stage=stage, what="step")
        assert ask("check", stage=stage)["loss"] < first["loss"]


@pytest.mark.soak
def test_our_command_takes_a_first_step(world: Path, tmp_path: Path) -> None:
    python, module, name, stage, *arguments = our_command(world, tmp_path / "ours")
    assert [python, module, name] == [sys.executable, "-m", "pemt"]
    COMMANDS[stage](arguments)
    assert '"train/loss"' in (tmp_path / "ours" / "log.jsonl").read_text()


def test_the_first_step_is_seen_by_its_loss(tmp_path: Path) -> None:
    def run(program: str) -> float:
        command = [sys.executable, "-c", program]
        log, variables = tmp_path / "log", {**os.environ, "PYTHONUNBUFFERED": "1"}
        return first_step(command, tmp_path, log, (log, "{'loss': "), variables)

    program = "import time; time.sleep(0.2); print({'loss': 1.0, 'epoch': 0.1}); time.sleep(60)"
    assert 0.2 < run(program) < 60
    with pytest.raises(BesideError, match="no first step: no such task"):
        run("print('no such task')")


@pytest.mark.soak
def test_a_process_answers_and_tells_what_failed(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With this Python, and a checkout that is none: the frozen T5 is the same in both."""
    (tmp_path / "pemt" / "third_party").mkdir(parents=True)
    (tmp_path / "pemt" / "third_party" / "trainers.py").write_text("import nothing_of_this_name")
    with Worker("theirs", world, threads=1, checkout=tmp_path, python=sys.executable) as worker:
        assert worker.ask("hello")["threads"] == 1
        assert worker.ask("load", stage=FROZEN) == {"trained": 20 * SMALL.d_model}
        assert len(worker.ask("run", stage=FROZEN, what="answer")["tokens"]) == 2
        assert worker.ask("run", stage=FROZEN, what="step")["milliseconds"] > 0
        with pytest.raises(BesideError, match=r"nothing_of_this_name.*docs/evidence\.md"):
            worker.ask("load", stage="stage2")
        assert worker.ask("hello"), "it lives on"
        worker._process.kill()
        with pytest.raises(BesideError, match="its process has ended"):
            worker.ask("hello")
    assert "nothing_of_this_name" in capsys.readouterr().err, "its log is shown"


@pytest.mark.soak
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--python", sys.executable]) == 1
    assert "has no pemt/run_seq2seq.py" in capsys.readouterr().err
    (tmp_path / "pemt").mkdir()
    (tmp_path / "pemt" / "run_seq2seq.py").touch()
    for python, told in (
        (str(tmp_path / "none"), "cannot be run: No such file"),
        (sys.executable, "the published code is run with 4.30"),
    ):
        with pytest.raises(BesideError, match=told):
            check_published(tmp_path, python)
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(BesideError, match=r"lacks what .*No module named"):
        check_published(tmp_path, str(bare))


@pytest.mark.real
def test_the_published_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it, at a tiny size: equal losses and gradients, equal answers, every row of the table."""
    named = [os.environ.get(name) for name in (CHECKOUT, PYTHON)]
    if None in named:
        pytest.skip(f"needs the published code: {CHECKOUT} names a checkout, {PYTHON} a Python")
    monkeypatch.setitem(KNOWN, "t5-small", SMALL)
    checkout, python = map(str, named)
    options = ["--sizes", "t5-small", "--rounds", "2", "--threads", "1"]
    assert main([checkout, "--python", python, *options]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| t5-small: ") == 11
    assert "8 of 8 answers equal" in printed
