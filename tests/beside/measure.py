"""Both sides taken in turn: steps of both stages, answers, evaluation, and what each costs in memory.

All figures of one row come from the same rounds, in which every side and both codes' own frozen T5 are called one after
another, each round beginning with another of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.beside.process import BesideError
from tests.beside.recipe import FROZEN, STAGES

LOSS_TOLERANCE = 1e-5  # of the loss; what float32 loses in t5-base's 24 layers is some 1e-6
NORM_TOLERANCE = (
    1e-3  # of the gradients' norm, which no dropout and the same sums in another order give
)
Ask = Callable[..., dict[str, Any]]
SIDES = ("theirs", "ours")


@dataclass(frozen=True)
class Call:
    """What is timed: a side's model of a stage, and what it does."""

    side: str
    stage: str
    what: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Args:
        unit: of the values; theirs, ours: one a round; frozen: stock T5s likewise, by side, where there are any.
        note: what else was seen.
    """

    name: str
    unit: str
    theirs: Sequence[float]
    ours: Sequence[float]
    frozen: dict[str, Sequence[float]] = field(default_factory=dict)
    note: str = ""


def measure(name: str, sides: dict[str, Ask], *, rounds: int) -> Iterator[Row]:
    """Every row of one size, each as soon as it is known.

    Args:
        name: the size.
        sides: how to ask each.

    Raises:
        BesideError: the codes do not compute the same, or a side fails.
    """
    for ask in sides.values():
        ask("load", stage=FROZEN)
    for stage in STAGES:
        yield from _stage_rows(name, stage, sides, rounds)
        if stage == "stage2":
            yield from _answers_rows(name, sides, rounds)
            calls = _calls(stage, "evaluate")
            yield from _timed_rows(f"{name}: evaluation", sides, calls, rounds)
        for ask in sides.values():
            ask("drop", stage=stage)


def check_same(stage: str, sides: dict[str, Ask]) -> str:
    """Load a stage on both sides and hold them against each other; what was compared, in words.

    Raises:
        BesideError: other numbers of trained parameters, other losses or gradients.
    """
    trained = {side: ask("load", stage=stage)["trained"] for side, ask in sides.items()}
    found = {side: ask("check", stage=stage) for side, ask in sides.items()}
    if trained["theirs"] != trained["ours"]:
        raise BesideError(f"{stage}: trained parameters differ: {trained}")
    differences = {}
    for key, limit in (("loss", LOSS_TOLERANCE), ("gradient_norm", NORM_TOLERANCE)):
        theirs, ours = found["theirs"][key], found["ours"][key]
        differences[key] = abs(ours / theirs - 1)
        if not differences[key] <= limit:  # a NaN fails too
            raise BesideError(
                f"{stage}: {key}: theirs {theirs:.9g}, ours {ours:.9g}; more than {limit:g} apart"
            )
    return (
        f"loss {found['theirs']['loss']:.6f} and {found['ours']['loss']:.6f}; "
        f"gradient norms {differences['gradient_norm']:.0e} apart"
    )


def _stage_rows(name: str, stage: str, sides: dict[str, Ask], rounds: int) -> Iterator[Row]:
    note = check_same(stage, sides)
    calls = [*_calls(FROZEN, "step"), *_calls(stage, "step")]
    label = f"{name}: {stage[:5]} {stage[5:]}"
    yield from _timed_rows(f"{label}, step", sides, calls, rounds, note)
    taken = {
        call: [sides[call.side]("memory", stage=call.stage, what="step")["bytes"] / 1e6]
        for call in calls
    }
    yield _row(f"{label}, memory of a step", "MB", taken)


def _answers_rows(name: str, sides: dict[str, Ask], rounds: int) -> list[Row]:
    calls = [*_calls(FROZEN, "answer"), *_calls("stage2", "answer")]
    answers = {
        side: ask("run", stage="stage2", what="answer")["tokens"] for side, ask in sides.items()
    }
    pairs = list(zip(answers["theirs"], answers["ours"], strict=True))
    if len({len(answer) for pair in pairs for answer in pair}) != 1:
        raise BesideError("answers: not equally long, so their times say nothing")
    note = f"{sum(a == b for a, b in pairs)} of {len(pairs)} answers equal"
    return _timed_rows(f"{name}: answering", sides, calls, rounds, note)


def _calls(stage: str, what: str) -> list[Call]:
    return [Call(side, stage, what) for side in SIDES]


def _timed_rows(
    name: str, sides: dict[str, Ask], calls: list[Call], rounds: int, note: str = ""
) -> list[Row]:
    """Two rows: on the clock, and computed by all threads, which a busy machine changes less."""
    told: dict[Call, list[dict[str, float]]] = {call: [] for call in calls}
    for number in range(-1, rounds):  # the first does not count
        turn = number % len(calls)
        for call in calls[turn:] + calls[:turn]:
            each = sides[call.side]("run", stage=call.stage, what=call.what)
            if number >= 0:
                told[call].append(each)
    return [
        _row(name, unit, {call: [one[key] for one in each] for call, each in told.items()}, text)
        for key, unit, text in (("milliseconds", "ms", note), ("computed", "CPU ms", ""))
    ]


def _row(name: str, unit: str, values: dict[Call, list[float]], note: str = "") -> Row:
    of_stage = {call.side: value for call, value in values.items() if call.stage != FROZEN}
    frozen: dict[str, Sequence[float]] = {
        call.side: value for call, value in values.items() if call.stage == FROZEN
    }
    return Row(name=name, unit=unit, **of_stage, frozen=frozen, note=note)


HEAD = (
    "| | T5 there | T5 here | published | here | published ÷ T5 here | here ÷ T5 here | published ÷ here | |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---|"
)


def line(row: Row) -> str:
    """Medians and standard deviations; quotients are medians over rounds."""
    unit = row.frozen.get("ours")
    cells = [
        f"{row.name}, {row.unit}",
        _value(row.frozen.get("theirs")),
        _value(unit),
        _value(row.theirs),
        _value(row.ours),
        _quotient(row.theirs, unit),
        _quotient(row.ours, unit),
        _quotient(row.theirs, row.ours),
        row.note,
    ]
    return f"| {' | '.join(cells)} |"


def _value(values: Sequence[float] | None) -> str:
    if values is None:
        return ""
    median = statistics.median(values)
    digits = 0 if median >= 100 else 1
    if len(values) == 1:
        return f"{median:.{digits}f}"
    return f"{median:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def _quotient(over: Sequence[float], under: Sequence[float] | None) -> str:
    if under is None:
        return ""
    return f"{statistics.median(a / b for a, b in zip(over, under, strict=True)):.2f}"
