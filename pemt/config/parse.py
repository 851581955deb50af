"""From YAML and the command line to a configuration.

jsonargparse reads and converts; what it lets pass (a key given twice) is refused here, and its
complaints are turned into one line that names the file and the key.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml

from pemt.config.command_line import nearest
from pemt.config.schema import ConfigError, RunConfig
from pemt.config.yaml_file import load_yaml

PRINT_CONFIG = "--print_config"
RECIPES = Path(__file__).parents[1] / "recipes"
Config = TypeVar("Config", bound=RunConfig)
_EXAMPLES = {
    "pemt source": "--config source --task_name mnli --output_dir runs/mnli --bank_dir bank",
    "pemt adapt": "--config adapt --task_name superglue-cb --output_dir runs/cb --bank_dir bank",
}


def parse_config(kind: type[Config], arguments: list[str], *, prog: str) -> Config:
    """Read a configuration from `--config FILE` and `--field value` overrides.

    Args:
        kind: SourceConfig or AdaptConfig.
        arguments: the command line behind the subcommand. `--config` takes a YAML file or the name
            of a recipe that comes with the package. A field on the command line wins over every file,
            wherever it stands; among files, and among fields, the later one wins.
        prog: the command's name, for help and errors.

    Raises:
        ConfigError: unknown key, wrong type, value out of range, unreadable or malformed YAML.
        SystemExit: after `--help` or `--print_config`.
    """
    files, flags = _files_and_flags(kind, arguments)
    try:
        parser = _parser(kind, prog)  # type: ignore[arg-type]
        # jsonargparse goes by order alone: what was typed goes last.
        ordered = [*(f"--config={file}" for file in files), *flags]
        if PRINT_CONFIG in ordered:
            _print_config(parser, ordered, _sources(field_keys(kind), files, flags))
        namespace = parser.parse_args(ordered)
        values = dict(vars(parser.instantiate(namespace)))
    except ConfigError:
        raise
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(_one_line(str(error), files)) from None
    values.pop("config", None)
    return kind(**values)


def value_sources(kind: type[RunConfig], arguments: list[str]) -> dict[str, str]:
    """Where `parse_config` takes each field from: `command line`, a file's path, or `default`.

    Raises:
        ConfigError: an unknown key, or a file that cannot be read.
    """
    return _sources(field_keys(kind), *_files_and_flags(kind, arguments))


def _files_and_flags(kind: type[Any], arguments: list[str]) -> tuple[list[Path], list[str]]:
    """The files behind `--config`, and all else that was typed; every key of both is known."""
    files, flags = _config_files(_inline_mappings(arguments))
    keys = field_keys(kind)
    for file in files:
        _check_yaml(file, keys)
    _check_flags(flags, keys)
    return files, flags


def _sources(keys: list[str], files: list[Path], flags: list[str]) -> dict[str, str]:
    typed = {_flag_name(flag) for flag in flags if flag.startswith("--")}
    sources = {}
    for key in keys:
        holders = [str(file) for file in files if _mentions(file, key)]
        is_typed = key in typed or key.split(".")[0] in typed
        sources[key] = "command line" if is_typed else (holders or ["default"])[-1]
    return sources


def _print_config(
    parser: jsonargparse.ArgumentParser, ordered: list[str], sources: dict[str, str]
) -> None:
    """Print the whole configuration as YAML, each value with where it comes from, and leave."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        parser.parse_args(
            ordered
        )  # required fields may be missing yet, which is jsonargparse's to know
    print("\n".join(_with_sources(load_yaml(printed.getvalue()), sources)), flush=True)
    sys.exit(0)


def _with_sources(
    values: dict[str, Any], sources: dict[str, str], section: str = ""
) -> Iterator[str]:
    for key, value in values.items():
        name = f"{section}{key}"
        if isinstance(value, dict) and any(each.startswith(f"{name}.") for each in sources):
            yield f"{key}:"
            yield from (f"  {line}" for line in _with_sources(value, sources, f"{name}."))
        else:
            # in a list, so that it is written on one line
            text = yaml.safe_dump(
                [value], default_flow_style=True, width=math.inf, allow_unicode=True
            )
            yield f"{key}: {text.strip()[1:-1]}  # {sources[name]}"


@cache
def _parser(kind: Any, prog: str) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        description=(kind.__doc__ or "").split("\n", 1)[0],
        epilog=_epilog(prog),
        formatter_class=_Formatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action=jsonargparse.ActionConfigFile,
        help=f"YAML file, or a recipe's name ({', '.join(recipe_names())}); may be given more than once.",
    )
    parser.add_class_arguments(kind)
    return parser


class _Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """jsonargparse's types and defaults; an example keeps its lines."""


def _epilog(prog: str) -> str | None:
    if prog not in _EXAMPLES:
        return None
    return (
        f"example:\n  {prog} {_EXAMPLES[prog]}\n"
        "with --print_config behind it, the whole configuration is shown and nothing runs"
    )


def recipe_names() -> list[str]:
    """The recipes that come with the package, by the names `--config` takes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def field_keys(kind: type[Any], prefix: str = "") -> list[str]:
    """All keys of a configuration dataclass, nested ones with dots."""
    keys = []
    for each in dataclasses.fields(kind):
        keys.append(prefix + each.name)
        section: Any = each.default_factory
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            keys += field_keys(section, f"{prefix}{each.name}.")
    return keys


def _config_files(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """The files that `--config` names, recipes among them, and the other arguments."""
    files, others = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument != "--config" and not argument.startswith("--config="):
            others.append(argument)
            continue
        name = next(rest, None) if argument == "--config" else argument.removeprefix("--config=")
        if name is None:
            raise ConfigError(f"--config: no file behind it; {_what_config_takes()}")
        files.append(_config_file(name))
    return files, others


def _config_file(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file() and (RECIPES / f"{name}.yaml").is_file():
        path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"--config {name}: no such file; {_what_config_takes()}")
    return path


def _what_config_takes() -> str:
    return f"give a YAML file or a recipe's name ({', '.join(recipe_names())})"


def _inline_mappings(arguments: list[str]) -> list[str]:
    """Replace a file behind `--peft_config` by what it holds, so that the run's config.yaml holds it too."""
    resolved = list(arguments)
    for place, argument in enumerate(arguments):
        name, _, inline = argument.partition("=")
        if name != "--peft_config" or (not inline and place + 1 == len(arguments)):
            continue
        value = inline or arguments[place + 1]
        if value.startswith("{") or value == "null":
            continue
        file = Path(value).expanduser()
        if not file.is_file():
            raise ConfigError(
                f"--peft_config {value}: no such file; give a YAML or JSON file, or {{peft_type: ...}}"
            )
        content = json.dumps(read_yaml_mapping(file))
        if inline:
            resolved[place] = f"{name}={content}"
        else:
            resolved[place + 1] = content
    return resolved


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping.

    Raises:
        ConfigError: unreadable, malformed, a key given twice, or no mapping.
    """
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{path}, line {line}: malformed YAML: {error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path}: cannot be read as YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: found {type(content).__name__} at the top level, expected `key: value` lines"
        )
    return content


def _check_yaml(path: Path, keys: list[str]) -> None:
    def check(mapping: dict[str, Any], prefix: str) -> None:
        for key, value in mapping.items():
            name = f"{prefix}{key}"
            if name not in keys:
                raise ConfigError(f"{path}: unknown key `{name}`{nearest(name, keys)}")
            # a field that is no section of its own, as peft_config, holds what keys it likes
            if isinstance(value, dict) and any(each.startswith(f"{name}.") for each in keys):
                check(value, f"{name}.")

    check(read_yaml_mapping(path), "")


def _check_flags(arguments: list[str], keys: list[str]) -> None:
    allowed = {*keys, "config", "help", "print_config"}
    for argument in arguments:
        if argument.startswith("--"):
            name = _flag_name(argument)
            if name not in allowed:
                raise ConfigError(f"command line: unknown key `--{name}`{nearest(name, keys)}")


def _flag_name(flag: str) -> str:
    """`--field=value` and `--field+=value` give `field`."""
    return re.split(r"[=+]", flag[2:], maxsplit=1)[0]


def _one_line(message: str, files: list[Path]) -> str:
    """jsonargparse's complaint as `file: key: found …, expected …`."""
    where = re.search(r'Parser key "([\w.]+)"', message)
    found = re.search(r"(?:Got value|Given value): (.*)", message)
    expected = re.search(r"Expected an? (.+?)\. Got|Subtypes: (.*)", message)
    if not where:
        return " ".join(message.split())
    key = where[1]
    holders = [str(path) for path in files if _mentions(path, key)]
    prefix = f"{holders[-1]}: " if holders else ""
    if not found or not expected:
        return f"{prefix}{key}: " + " ".join(message.split("\n", 1)[-1].split())
    wanted = re.sub(r"<class '(\w+)'>|typing\.", r"\1", expected[1] or expected[2]).replace(
        "NoneType", "null"
    )
    if "list" in wanted:
        wanted += ", written like [a,b]"
    return f"{prefix}{key}: found `{found[1].strip()}`, expected {wanted}"


def _mentions(path: Path, key: str) -> bool:
    value: Any = read_yaml_mapping(path)
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True
