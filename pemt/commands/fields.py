"""A run's fields on the command lines of others: kept apart from their own options, completed by shells."""

from __future__ import annotations

import typing
from typing import Any, Literal

from pemt.config import AdaptConfig, Parser, RunConfig, SourceConfig, command_parser, field_keys
from pemt.engine import StopSignals, importing_libraries

STAGES: dict[str, type[RunConfig]] = {"adapt": AdaptConfig, "source": SourceConfig}
FILES = {"task_file", "peft_config"}
FOLDERS = {"data_dir", "output_dir", "bank_dir", "model_name_or_path", "tokenizer_name"}
# The shell functions that offer recipes and files; `pemt completion` prints them.
RECIPE_OR_FILE = {"bash": "_pemt_recipes", "zsh": "_pemt_recipes"}


def split_fields(parser: Parser, arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """A command's own options, and what is left of its command line: overrides of a run's fields.

    Raises:
        PemtError: an option that is neither, with the nearest ones.
    """
    options, rest = parser.parse_known_args(arguments)
    fields = [f"--{key}" for key in field_keys(AdaptConfig)]
    for argument in rest:
        if argument.startswith("--") and argument.split("=")[0] not in (*fields, "--config"):
            parser.refuse(argument, also=fields)
    return vars(options), rest


def stage_parser(name: str, about: str) -> Parser:
    """The parser of a command that takes fields alone, less these."""
    parser = command_parser(name, about)
    parser.add_argument(
        "--print_config", action="store_true", help="the whole configuration; nothing runs"
    )
    return parser


def run_stage(name: str, arguments: list[str]) -> None:
    """What `pemt source` and `pemt adapt` do."""
    with StopSignals():  # from here on, since reading libraries and data takes minutes
        from pemt.config import parse_config

        config = parse_config(STAGES[name], arguments, prog=f"pemt {name}")
        with importing_libraries():
            from pemt.run import check_early
        check_early(config)
        with importing_libraries():
            from pemt.run import run_adapt, run_source

        if isinstance(config, SourceConfig):
            run_source(config)
        elif isinstance(config, AdaptConfig):
            run_adapt(config)


def add_fields(parser: Parser, kind: type[RunConfig]) -> None:
    """Add `--config` and a configuration's fields, so that a shell can complete them."""
    import shtab

    from pemt.tasks import task_names

    own = set(parser.options())
    config = parser.add_argument("--config", help="a recipe's name, or a YAML file")
    config.complete = RECIPE_OR_FILE  # type: ignore[attr-defined]
    for key in field_keys(kind):
        if f"--{key}" in own:
            continue
        chosen = list(task_names()) if key == "task_name" else _choices(kind, key)
        action = parser.add_argument(f"--{key}", help=key, choices=chosen or None)
        if key in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif key in FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]


def _choices(kind: Any, key: str) -> list[str]:
    """What a field may hold, where that is a short list: a Literal's values, or true and false."""
    *sections, last = key.split(".")
    for section in sections:
        kind = typing.get_type_hints(kind)[section]
    hint = typing.get_type_hints(kind)[last]
    if typing.get_origin(hint) is Literal:
        return [str(value) for value in typing.get_args(hint)]
    if hint in (bool, bool | None):
        return ["true", "false"]
    return []
