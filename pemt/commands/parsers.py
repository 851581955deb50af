"""How the commands' parsers look alike: a sentence, the options, an example."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from pemt.config import PemtError


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ours: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise PemtError(f"{self.prog}: {message}; `{self.prog} --help` tells what it takes")


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
