"""From a sweep's YAML to its runs, all of them checked before the first starts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pemt.checkpoint import CONFIG, RESULTS, plain_values
from pemt.config import (
    AdaptConfig,
    ConfigError,
    PemtError,
    field_keys,
    flat,
    make_config,
    nearest,
    read_yaml_mapping,
)
from pemt.run import check_method
from pemt.tasks import get_task

KEYS = ("output_dir", "recipe", "fields", "methods", "tasks", "seeds")
NEEDED = ("output_dir", "methods", "tasks", "seeds")
# What the sweep itself sets for each run.
OWN = ("output_dir", "seed", "task_name", "resume_from_checkpoint", "overwrite_output_dir")


class SweepError(PemtError):
    """A sweep that cannot run as it is written, or runs in it that failed."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a sweep.

    Args:
        method: the row's name in the table; two rows may use one `config.method`.
    """

    method: str
    task: str
    seed: int
    config: AdaptConfig

    @property
    def folder(self) -> Path:
        """Its output folder."""
        return Path(self.config.output_dir)

    @property
    def finished(self) -> bool:
        """Whether it has left its results."""
        return (self.folder / RESULTS).is_file()

    def __str__(self) -> str:
        return f"{self.task}, {self.method}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Methods × tasks × seeds, in the order in which they run: seed by seed."""

    output_dir: Path
    methods: list[str]
    tasks: list[str]
    seeds: list[int]
    runs: list[Run]


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep.

    Args:
        path: YAML with `output_dir`, `methods`, `tasks` (each a list of names, or names with fields of
            their own), `seeds`, and for all runs `recipe` and `fields`. A method's fields win over a
            task's, a task's over `fields`, and those over the recipe.

    Raises:
        SweepError: anything wrong in any run; a line per fault, each with file and key.
    """
    content = _content(path)
    methods, tasks = (_named(path, content, key) for key in ("methods", "tasks"))
    seeds = content["seeds"]
    if not (isinstance(seeds, list) and all(type(seed) is int for seed in seeds)):
        raise SweepError(f"{path}: seeds: found {seeds}, expected a list of integers")
    shared = content.get("fields") or {}
    output_dir = Path(content["output_dir"]).expanduser()
    _stop(list(_unknown(path, shared, methods, tasks)))
    seeds = list(dict.fromkeys(seeds))
    runs: list[Run] = []
    faults: list[str] = []
    for seed, task, method in product(seeds, tasks, methods):
        levels = {
            f"methods.{method}": methods[method],
            f"tasks.{task}": tasks[task],
            "fields": shared,
        }
        recipe = methods[method].get("recipe", content.get("recipe"))
        own = {
            "output_dir": str(output_dir / task / method / f"seed-{seed}"),
            "task_name": task,
            "seed": seed,
        }
        try:
            config = _config(recipe, levels, own, method)
            _check_folder(config)
            runs.append(Run(method=method, task=task, seed=seed, config=config))
        except PemtError as error:
            faults.append(f"{path}: {_placed(str(error), levels, method=method, task=task)}")
    _stop(faults)
    return Sweep(
        output_dir=output_dir,
        methods=list(methods),
        tasks=list(tasks),
        seeds=seeds,
        runs=runs,
    )


def _content(path: Path) -> dict[str, Any]:
    content = read_yaml_mapping(path.expanduser())
    faults = [
        f"{path}: unknown key `{key}`{nearest(key, list(KEYS), what=f'there are {KEYS}')}"
        for key in content
        if key not in KEYS
    ]
    faults += [f"{path}: {key}: missing" for key in NEEDED if not content.get(key)]
    _stop(faults)
    return content


def _stop(faults: list[str]) -> None:
    if faults:
        raise SweepError(*dict.fromkeys(faults))


def _named(path: Path, content: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """Names with their own fields, from a list of names or a mapping."""
    value = content[key]
    named = dict.fromkeys(value) if isinstance(value, list) else value
    if not isinstance(named, dict) or not all(
        isinstance(name, str) and (fields is None or isinstance(fields, dict))
        for name, fields in named.items()
    ):
        raise SweepError(
            f"{path}: {key}: found {value}, expected a list of names, or `name: {{field: value}}` lines"
        )
    for name in named:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise SweepError(
                f"{path}: {key}: found the name `{name}`; it becomes a folder's: letters, digits, . _ -"
            )
    return {name: fields or {} for name, fields in named.items()}


def _unknown(
    path: Path,
    shared: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Any]],
    tasks: Mapping[str, Mapping[str, Any]],
) -> Iterator[str]:
    """Keys that no run has, or that the sweep settles."""
    known = [key for key in field_keys(AdaptConfig) if key not in OWN]
    levels = {"fields": shared} | {f"tasks.{name}": each for name, each in tasks.items()}
    for name, each in methods.items():
        levels[f"methods.{name}"] = {key: each[key] for key in each if key != "recipe"}
    for level, fields in levels.items():
        for key in flat(fields, field_keys(AdaptConfig)):
            if key in OWN:
                yield f"{path}: {level}.{key}: the sweep sets it for each run; leave it out"
            elif key not in known:
                yield f"{path}: {level}: unknown key `{key}`{nearest(key, known)}"


def _config(
    recipe: str | None, levels: Mapping[str, Mapping[str, Any]], own: dict[str, Any], method: str
) -> AdaptConfig:
    known = field_keys(AdaptConfig)
    given: dict[str, Any] = {}
    for fields in reversed(list(levels.values())):
        given |= flat(fields, known)
    given.pop("recipe", None)
    given.setdefault("method", method)
    config = make_config(AdaptConfig, given | own, recipe=recipe, prog="pemt sweep")
    get_task(config.task_name, config.task_file)
    check_method(config)
    return config


def _placed(
    message: str, levels: Mapping[str, Mapping[str, Any]], *, method: str, task: str
) -> str:
    """A complaint about a run, with the place in the sweep that it comes from."""
    key = message.removeprefix("--").split(":")[0].split(" ")[0]
    for level, fields in levels.items():
        if key in flat(fields, field_keys(AdaptConfig)) or key.split(".")[0] in fields:
            return f"{level}.{message.removeprefix('--')}"
    if key == "method":
        return f"methods.{method}: {message}"
    return f"tasks.{task}, methods.{method}: {message}"


def _check_folder(config: AdaptConfig) -> None:
    """Refuse a folder that holds a run of another configuration."""
    path = Path(config.output_dir) / CONFIG
    if not path.is_file():
        return
    there = read_yaml_mapping(path)
    for key, value in plain_values(config).items():
        if key not in OWN and there.get(key) != value:
            raise ConfigError(
                f"{key}: found {value}, and {path}, of an earlier run, has {there.get(key)}; delete that "
                "folder, or choose another output_dir"
            )
