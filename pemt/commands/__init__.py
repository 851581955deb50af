"""The commands, one record each; `pemt/commands/NAME.py` is imported when `pemt NAME` is called.

A new command needs a line in COMMANDS and a file of its own with two functions:

    make_parser()   its command line, for `--help` and for shells to complete
    run(arguments)  does it
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from pemt.config import Parser, flags_in_messages


@dataclass(frozen=True)
class Command:
    """One command of `pemt`.

    Args:
        name: as it is typed, and its file's name.
        about: what it does, for the overview, in at most 26 characters: two of them stand side by side.
        takes_fields: whether any field of a run may stand behind it, beside its own options.
    """

    name: str
    about: str
    takes_fields: bool = False

    def __call__(self, arguments: list[str]) -> None:
        """Run it on the command line behind its name; its errors name fields as they are typed."""
        with flags_in_messages():
            self._module().run(arguments)

    def make_parser(self) -> Parser:
        """Its command line, with the fields that it takes."""
        parser: Parser = self._module().make_parser()
        if self.takes_fields:
            # not at the top: `pemt doctor` runs without its libraries
            from pemt.commands.fields import STAGES, add_fields

            add_fields(parser, STAGES.get(self.name, STAGES["adapt"]))
        return parser

    def _module(self) -> Any:
        return importlib.import_module(f"pemt.commands.{self.name}")


# In the overview's order, where the two stages have a place of their own.
COMMANDS = {
    each.name: each
    for each in (
        Command("source", "an expert, into a bank", takes_fields=True),
        Command("adapt", "a target task over a bank", takes_fields=True),
        Command("evaluate", "score a finished run", takes_fields=True),
        Command("predict", "answer a jsonl or stdin", takes_fields=True),
        Command("report", "a page about runs"),
        Command("sweep", "methods, tasks, seeds"),
        Command("bank", "list, add, export experts"),
        Command("demo", "both stages on a laptop"),
        Command("export", "a run, for others"),
        Command("push", "an export to the hub"),
        Command("pull", "an export from the hub"),
        Command("tasks", "the tasks there are"),
        Command("plan", "memory, traffic, time"),
        Command("fetch", "all for offline nodes", takes_fields=True),
        Command("doctor", "is this machine ready"),
        Command("ops", "build the fused op"),
        Command("bench", "time op, step, answers"),
        Command("completion", "for bash and zsh"),
    )
}
