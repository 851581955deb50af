"""Command lines that look and complain alike: a sentence, the options, an example; errors in one line."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from pemt.config.errors import PemtError

TEXTS = ("description", "message")  # options that name no file


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ours: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise `PemtError` with one line where argparse would print its usage and exit."""
        raise PemtError(f"{self.prog}: {message}; `{self.prog} --help` tells what it takes")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but the error about an unknown option names the nearest that the verb knows."""
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            verbs = self.verbs()
            verb = next((each for each in args or sys.argv[1:] if each in verbs), None)
            (verbs[verb] if verb else self).refuse(rest[0])
        return options

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, with `~` as home in values: behind `=` no shell expands it."""
        options, rest = super().parse_known_args(args, namespace)
        for name, value in vars(options).items():
            if name not in TEXTS:
                setattr(options, name, _at_home(value))
        return options, rest

    def refuse(self, argument: str, also: Iterable[str] = ()) -> NoReturn:
        """Complain about what nobody takes; `also` names options besides this parser's own."""
        name = argument.split("=")[0]
        known = list(dict.fromkeys([*self.options(), *also]))
        hint = nearest(name, known, what=f"`{self.prog} --help` tells what it takes")
        raise PemtError(f"{self.prog}: unknown argument `{name}`{hint}")

    def options(self) -> list[str]:
        """The long options, as they are written, its verbs' among them."""
        names = [name for name in self._option_string_actions if name.startswith("--")]
        for verb in self.verbs().values():
            names += verb.options()
        return names

    def verbs(self) -> dict[str, Parser]:
        """The parsers of its verbs, if it has any."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return dict(action.choices)
        return {}


def _at_home(value: Any) -> Any:
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    is_path = isinstance(value, str | Path) and str(value).startswith("~")
    return type(value)(os.path.expanduser(value)) if is_path else value


def command_parser(name: str, description: str, *examples: str) -> Parser:
    """The parser of `pemt NAME`; the examples stand below the options."""
    return Parser(
        prog=f"pemt {name}",
        description=description,
        epilog=epilog(*examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def verb_parser(verbs: Any, name: str, description: str, example: str) -> Parser:
    """The parser of one verb of a command."""
    parser: Parser = verbs.add_parser(
        name,
        help=description,
        description=description[0].upper() + description[1:] + ".",
        epilog=epilog(example),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def epilog(*examples: str) -> str | None:
    """`example:` and the commands, a line each."""
    if not examples:
        return None
    return "\n".join(["example:", *(f"  {line}" for line in examples)])


def count(text: str) -> int:
    """The type of an option that counts something: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found `{text}`, a whole number above 0 is needed")
    return int(text)


def nearest(name: str, known: list[str], *, what: str = "`pemt … --help` lists all keys") -> str:
    """The tail of a message about an unknown name: the nearest known ones, or where to look."""
    close = difflib.get_close_matches(name, known, n=3)
    return (
        "; did you mean " + " or ".join(f"`{each}`" for each in close) + "?"
        if close
        else f"; {what}"
    )
