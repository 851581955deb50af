"""Errors for the user, in one line each."""

from __future__ import annotations

MOST_CHARACTERS = 1500


class PemtError(ValueError):
    """An error for the user: its text is one line that says what was found, what is allowed, what to do.

    What was found may be anything that a file can hold: it is made printable here, and a long one is cut.

    Args:
        faults: one line each; more than one where many can be told at once.
    """

    def __init__(self, *faults: str) -> None:
        super().__init__(*(_line(fault) for fault in faults))

    def __str__(self) -> str:
        return "\n".join(self.args)


def _line(text: str) -> str:
    text = "".join(each if each.isprintable() else _shown(each) for each in text)
    if len(text) > MOST_CHARACTERS:
        text = f"{text[: MOST_CHARACTERS // 2]} ... {text[-MOST_CHARACTERS // 2 :]}"
    return text


def _shown(character: str) -> str:
    """A character that is no printable one: a space, or its escape as Python writes it."""
    return " " if character.isspace() else character.encode("unicode_escape").decode()


class ConfigError(PemtError):
    """A configuration that cannot be run."""
