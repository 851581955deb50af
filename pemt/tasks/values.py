"""What a value of a row means, whatever made it: YAML, JSON, csv, parquet, numpy, arrow or a person."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

LONGEST_ERROR = 500
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
# YAML, JSON, pandas and Excel make true and false of these: what is true, and what is false.
PAIRS = (("true", "false"), ("yes", "no"), ("on", "off"), ("y", "n"), ("t", "f"), ("1", "0"))


class RowError(ValueError):
    """A row that cannot become an example; the reader adds the file and the line.

    What it tells is one line of UTF-8, whatever stands in the row.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.encode("utf-8", errors="backslashreplace").decode("utf-8").split())
        super().__init__(line if len(line) <= LONGEST_ERROR else f"{line[:LONGEST_ERROR]}…")


class ClassId(int):
    """A number of which the data set itself says that it is a class id, and no truth value."""


def plain(value: Any) -> Any:
    """The Python value behind a numpy or arrow scalar or array, and the text behind bytes of UTF-8."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    for unwrap in ("as_py", "tolist"):
        if callable(method := getattr(value, unwrap, None)):
            return method()
    return value


def written(value: Any) -> str | None:
    """A text, or a finite number as text; None for anything else."""
    value = plain(value)
    if isinstance(value, str):
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and abs(value) < float("inf") else None


def encodable(text: str) -> str:
    """The text, or RowError where JSON's \\ud800 … \\udfff left a half of a character in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"no UTF-8: {text[error.start]!r} is half of a character") from None
    return text


def label_text(value: Any) -> str:
    """A label as text, with the names that JSON has for true, false and null."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value).strip()


def number_of(text: str) -> float | None:
    """The number that a text is, or None."""
    return float(text) if NUMBER.fullmatch(text) else None


def is_one_of(value: Any, texts: Sequence[str]) -> bool:
    """Whether a label is one of these texts; 1, 1.0 and "1" are the same."""
    text = label_text(value)
    number = number_of(text)
    return text in texts or (number is not None and number in map(number_of, texts))


def class_of(value: Any, labels: Sequence[str], names: Sequence[str] = ()) -> tuple[int, bool]:
    """The class that a row means, and whether nothing but its place among the labels says so.

    A label or name itself comes first, then the same number written otherwise (1, 1.0, "1"). True and
    false, also "True" as csv has it, are the class that says so: `true`, `yes`, `on`, `1` … opposite its
    counterpart. A number that is no label is a class id, unless some label or name is a number; 0 and 1
    must not say something else as false and true. RowError where it means none of them, or may mean two.
    """
    value = plain(value)
    text = label_text(value)
    known = [(name.strip(), i) for each in (names, labels) for i, name in enumerate(each)]
    number, truth = number_of(text), truth_of(text)
    same = set() if isinstance(value, bool) else {i for name, i in known if name == text}
    if not same and number is not None:
        same = {i for name, i in known if number_of(name) == number}
    by_place: set[int] = set()
    by_truth: set[int] = set()
    if not same and number is not None:
        if number in range(len(labels)) and not has_numbers(labels, names):
            by_place = {int(number)}
            by_truth = classes_of_truth(number == 1, known) if number in (0, 1) else set()
            same = by_place if isinstance(value, ClassId) else by_place | by_truth
    elif not same and truth is not None:
        same = classes_of_truth(truth, known)
    if len(same) == 1:
        (found,) = same
        return found, same == by_place and same != by_truth
    if same:
        meant = " or ".join(repr(labels[i]) for i in sorted(same))
        raise RowError(
            f"{value!r:.60} may mean {meant}; write the label itself, or say in `label_names` what the rows call each "
            "label"
        )
    allowed = ", ".join(dict.fromkeys((*labels, *names)))
    hint = "; `label_names` may say which label is true" if truth is not None else ""
    if number == -1:
        hint = '; if it means that the row has no label: `no_label: ["-1"]`'
    raise RowError(f"unknown label {value!r:.60}; allowed: {allowed}{hint}")


def has_numbers(labels: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a label or name is a number: a class id would be ambiguous then."""
    return any(number_of(text.strip()) is not None for text in (*labels, *names))


def truth_of(text: str) -> bool | None:
    """What true or false says, in any case: csv has Python's True and Excel's TRUE."""
    return {"true": True, "false": False}.get(text.casefold())


def classes_of_truth(truth: bool, known: Sequence[tuple[str, int]]) -> set[int]:
    """The classes whose label or name says true (or false): by that very word, or by one of a pair that is there."""
    words: dict[str, set[int]] = {}
    for name, i in known:
        words.setdefault(name.casefold(), set()).add(i)
    found = words.get(str(truth).casefold(), set())
    pairs = [pair for pair in PAIRS if words.keys() >= set(pair)]
    return found or set().union(*(words[pair[0 if truth else 1]] for pair in pairs))
