"""Errors for the user, in one line each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

MOST_CHARACTERS = 1500
# A field as it is typed, with its value where that is a plain one.
_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z_.]*[a-z])(?: (true|false|\d+(?:\.\d+)?)\b)?")
_as_flags = {"on": False}


@contextmanager
def flags_in_messages() -> Iterator[None]:
    """Within the block errors name a field as it is typed, `--overwrite_output_dir true`: in commands.

    Elsewhere they name it as Python has it: `overwrite_output_dir=True`.
    """
    before = _as_flags["on"]
    _as_flags["on"] = True
    try:
        yield
    finally:
        _as_flags["on"] = before


def spell_fields(text: str) -> str:
    """A message whose fields are written as flags, as its reader writes them: as flags in a command, else as Python.

    What stands between backticks is a command, or what was typed, and stays.
    """
    if _as_flags["on"]:
        return text
    parts = text.split("`")
    return "`".join(
        part if number % 2 else _FLAG.sub(_as_python, part) for number, part in enumerate(parts)
    )


def _as_python(flag: re.Match[str]) -> str:
    name, value = flag.groups()
    return name if value is None else f"{name}={value.capitalize()}"


class PemtError(ValueError):
    """An error for the user: its text is one line that says what was found, what is allowed, what to do.

    What was found may be anything that a file can hold: it is made printable here, and a long one is cut.

    Args:
        faults: one line each; more than one where many can be reported at once.
    """

    def __init__(self, *faults: str) -> None:
        super().__init__(*(_line(fault) for fault in faults))

    def __str__(self) -> str:
        return "\n".join(self.args)


def _line(text: str) -> str:
    text = spell_fields(text)
    text = "".join(each if each.isprintable() else _shown(each) for each in text)
    if len(text) > MOST_CHARACTERS:
        text = f"{text[: MOST_CHARACTERS // 2]} ... {text[-MOST_CHARACTERS // 2 :]}"
    return text


def _shown(character: str) -> str:
    """A character that is no printable one: a space, or its escape as Python writes it."""
    return " " if character.isspace() else character.encode("unicode_escape").decode()


class ConfigError(PemtError):
    """A configuration that cannot be run."""
