"""From YAML and the command line to a configuration.

jsonargparse reads and converts; what it lets pass (a key given twice) is refused here, and its
complaints are turned into one line that names the file and the key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import jsonargparse
import yaml

from pemt.config.command_line import nearest
from pemt.config.errors import ConfigError, flags_in_messages
from pemt.config.help import described, help_text
from pemt.config.schema import RunConfig
from pemt.config.types import expected
from pemt.config.yaml_file import load_yaml

PRINT_CONFIG = "--print_config"
PEFT_CONFIG = "peft_config"  # a field that may name a file, and becomes what that holds
RECIPES = Path(__file__).parents[1] / "recipes"
SWEEPS = "paper_*.yaml"  # of the recipes those that are for `pemt sweep`
Config = TypeVar("Config", bound=RunConfig)


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
    with flags_in_messages():
        from_files, flags = _read_arguments(kind, arguments)
        if not {"--help", "-h"}.isdisjoint(flags):
            print(help_text(kind, prog, _recipe_values(kind, prog), recipe_names()), end="")
            sys.exit(0)
        if PRINT_CONFIG in flags:
            _print_config(kind, prog, from_files, flags)
        return _config(kind, prog, from_files, flags)


def make_config(
    kind: type[Config], values: Mapping[str, Any], *, recipe: str | None = None, prog: str
) -> Config:
    """A configuration from values as YAML gives them, whose keys are those of `field_keys`; they win over a recipe.

    Raises:
        ConfigError: as `parse_config`.
    """
    keys = field_keys(kind)
    from_files = _read_files([] if recipe is None else [_config_file(recipe)], keys)
    for key, value in values.items():
        _add(from_files, key, _mapping_in_file(value) if key == PEFT_CONFIG else value, None, keys)
    return _config(kind, prog, from_files, [])


def value_sources(kind: type[RunConfig], arguments: list[str]) -> dict[str, str]:
    """Where `parse_config` takes each field from: `command line`, a file's path, or `default`.

    Raises:
        ConfigError: an unknown key, or a file that cannot be read.
    """
    return _sources(kind, *_read_arguments(kind, arguments))


# What files give: key -> its value, and the file; None for a value that comes from none.
_FileValues: TypeAlias = dict[str, tuple[Any, "Path | None"]]


def _read_arguments(kind: type[Any], arguments: list[str]) -> tuple[_FileValues, list[str]]:
    """What the files behind `--config` hold, and all else that was typed; every key of both is known.

    A file behind `--peft_config` is replaced by what it holds, so that the run's config.yaml holds it too.
    """
    files, flags = [], []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name not in ("--config", f"--{PEFT_CONFIG}"):
            flags.append(argument)
            continue
        value = value if equals else next(rest, "")
        if name == "--config":
            files.append(_config_file(value))
        else:
            content = _mapping_in_file(value)
            flags.append(f"{name}={content if isinstance(content, str) else json.dumps(content)}")
    keys = field_keys(kind)
    _check_flags(flags, keys)
    return _read_files(files, keys), flags


def _read_files(files: list[Path], keys: list[str]) -> _FileValues:
    from_files: _FileValues = {}
    for file in files:
        for key, value in flatten(read_yaml_mapping(file), keys).items():
            _add(from_files, key, value, file, keys)
    return from_files


def _add(from_files: _FileValues, key: str, value: Any, file: Path | None, keys: list[str]) -> None:
    where = "" if file is None else f"{file}: "
    if key not in keys:
        raise ConfigError(f"{where}unknown key `{key}`{nearest(key, keys)}")
    if not is_section(key, keys):
        from_files[key] = value, file
    elif value != {}:
        raise ConfigError(f"{where}{key}: found `{value}`, expected `key: value` lines")


def flatten(
    values: Mapping[str, Any], keys: list[str] | None = None, prefix: str = ""
) -> dict[str, Any]:
    """Nested mappings as one, its keys joined by dots.

    Args:
        keys: a configuration's; a field that is no section of its own, as peft_config, stays as it is. Default: all
            mappings are unfolded.
        prefix: of the keys.
    """
    unfolded: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and (keys is None or is_section(name, keys)):
            unfolded |= flatten(value, keys, f"{name}.")
        else:
            unfolded[name] = value
    return unfolded


def is_section(key: str, keys: Iterable[str]) -> bool:
    """Whether a key of a configuration stands for others below it."""
    return any(each.startswith(f"{key}.") for each in keys)


def _config(kind: type[Config], prog: str, from_files: _FileValues, flags: list[str]) -> Config:
    try:
        parser = _parser(kind, prog)  # type: ignore[arg-type]
        values = {key: value for key, (value, _) in from_files.items()}
        namespace = parser.parse_args(flags, namespace=jsonargparse.Namespace(values))
        values = dict(vars(parser.instantiate(namespace)))
    except ConfigError:
        raise
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(_one_line(str(error), kind, from_files)) from None
    values.pop("config", None)
    return kind(**values)


def _sources(kind: type[RunConfig], from_files: _FileValues, flags: list[str]) -> dict[str, str]:
    sources = dict.fromkeys(field_keys(kind), "default")
    sources |= {key: str(file) for key, (_, file) in from_files.items()}
    typed = {_flag_name(flag) for flag in flags if flag.startswith("--")}
    return sources | {
        key: "command line" for key in sources if key in typed or key.split(".")[0] in typed
    }


def _print_config(
    kind: type[RunConfig], prog: str, from_files: _FileValues, flags: list[str]
) -> None:
    """Print the whole configuration as YAML, each value with where it comes from, and leave."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        # required fields may be missing yet, which is jsonargparse's to know
        _config(kind, prog, from_files, flags)
    sources = _sources(kind, from_files, flags)
    print("\n".join(_with_sources(load_yaml(printed.getvalue()), sources)), flush=True)
    sys.exit(0)


def _with_sources(
    values: dict[str, Any], sources: dict[str, str], section: str = ""
) -> Iterator[str]:
    for key, value in values.items():
        name = f"{section}{key}"
        if isinstance(value, dict) and is_section(name, sources):
            yield f"{key}:"
            yield from (f"  {line}" for line in _with_sources(value, sources, f"{name}."))
        else:
            # in a list, so that it is written on one line
            text = yaml.safe_dump(
                [value], default_flow_style=True, width=math.inf, allow_unicode=True
            )
            yield f"{key}: {text.strip()[1:-1]}  # {sources[name]}"


@cache  # 50 ms each, and a sweep has hundreds of configurations
def _parser(kind: Any, prog: str) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=jsonargparse.ActionConfigFile)
    parser.add_class_arguments(kind)
    return parser


def _recipe_values(kind: type[Any], prog: str) -> dict[str, Any]:
    """The values of the command's own recipe, by their keys on the command line; empty where it has none."""
    name = prog.rpartition(" ")[2]
    return flatten(read_recipe(name), field_keys(kind)) if name in recipe_names() else {}


def recipe_names() -> list[str]:
    """The recipes that come with the package, by the names a run's `--config` takes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.match(SWEEPS))


def sweep_file(name: str) -> Path:
    """The file of a sweep: a path, or the name of one that comes with the package."""
    shipped = RECIPES / f"{name}.yaml"
    is_named = not Path(name).is_file() and shipped.is_file() and shipped.match(SWEEPS)
    return shipped if is_named else Path(name).expanduser()


def read_recipe(name: str) -> dict[str, Any]:
    """The values of a recipe that comes with the package, as its file has them."""
    return read_yaml_mapping(RECIPES / f"{name}.yaml")


def field_keys(kind: type[Any], prefix: str = "") -> list[str]:
    """All keys of a configuration dataclass, nested ones with dots."""
    keys = []
    for each in dataclasses.fields(kind):
        keys.append(prefix + each.name)
        section: Any = each.default_factory
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            keys += field_keys(section, f"{prefix}{each.name}.")
    return keys


def _config_file(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file() and (RECIPES / f"{name}.yaml").is_file():
        path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        found = f"--config {name}: no such file" if name else "--config: no file behind it"
        raise ConfigError(
            f"{found}; give a YAML file or a recipe's name ({', '.join(recipe_names())})"
        )
    return path


def _mapping_in_file(value: Any) -> Any:
    """The mapping in a file that is named; any other value as it is."""
    if not isinstance(value, str) or value.startswith("{") or value == "null":
        return value
    file = Path(value).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"--{PEFT_CONFIG} {value}: no such file; give a YAML or JSON file, or {{peft_type: ...}}"
        )
    return read_yaml_mapping(file)


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


def _one_line(message: str, kind: type[Any], from_files: _FileValues) -> str:
    """jsonargparse's complaint as `file: key: found …, expected …`."""
    where = re.search(r'Parser key "([\w.]+)"', message)
    found = re.search(r"(?:Got value|Given value): (.*)", message)
    if not where:
        return " ".join(message.split())
    key = where[1]
    file = from_files.get(key, (None, None))[1]
    prefix = f"{file}: " if file else ""
    hints = {each.key: each.type for each in described(kind)}
    if not found or key not in hints:
        return f"{prefix}{key}: " + " ".join(message.split("\n", 1)[-1].split())
    return f"{prefix}{key}: found `{found[1].strip()}`, expected {expected(hints[key])}"
