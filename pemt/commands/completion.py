"""`pemt completion`: what a shell needs to complete pemt's commands, fields, tasks and recipes."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any, Literal

import shtab

from pemt.arguments import field_keys, recipe_names
from pemt.commands.parsers import Parser, command_parser
from pemt.config import RunConfig

SHELLS = ("bash", "zsh")
FILES = {"config", "task_file"}
FOLDERS = {"data_dir", "output_dir", "bank_dir", "model_name_or_path", "tokenizer_name"}


def completion_parser() -> Parser:
    """The command line of `pemt completion`."""
    parser = command_parser(
        "completion",
        "Print a completion script; have the shell read it when it starts.",
        'eval "$(pemt completion bash)"                # in ~/.bashrc',
        "pemt completion zsh > ~/.zfunc/_pemt          # with fpath+=~/.zfunc before compinit",
    )
    parser.add_argument("shell", choices=SHELLS)
    return parser


def completion_script(shell: str, commands: Mapping[str, Parser]) -> str:
    """The script for a shell.

    Args:
        shell: one of `SHELLS`.
        commands: each command's parser; a verb's parsers are found below it.
    """
    root = Parser(prog="pemt", allow_abbrev=False)
    verbs = root.add_subparsers(metavar="COMMAND")
    for name, parser in commands.items():
        about = (parser.description or name).split("\n")[0]
        verbs.add_parser(name, parents=[parser], add_help=False, help=about, description=about)
    return shtab.complete(root, shell)


def fields_parser(name: str, kind: type[RunConfig], about: str) -> Parser:
    """A configuration's fields as plain options: what can be completed of `pemt NAME`."""
    from pemt.tasks import task_names

    parser = command_parser(name, about)
    config = parser.add_argument("--config", choices=recipe_names())
    config.complete = shtab.FILE  # type: ignore[attr-defined]
    for key in field_keys(kind):
        options: dict[str, Any] = {}
        chosen = _choices(kind, key)
        if key == "task_name":
            chosen = list(task_names())
        if chosen:
            options["choices"] = chosen
        action = parser.add_argument(f"--{key}", help=key, **options)
        if key in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif key in FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    return parser


def _choices(kind: Any, key: str) -> list[str]:
    """What a field may hold, where that is a short list: a Literal's values, or true and false."""
    *sections, last = key.split(".")
    for section in sections:
        kind = typing.get_type_hints(kind)[section]
    hint = typing.get_type_hints(kind)[last]
    if typing.get_origin(hint) is Literal:
        return [str(value) for value in typing.get_args(hint)]
    if hint is bool:
        return ["true", "false"]
    return []
