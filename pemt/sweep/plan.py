"""From a sweep's YAML to its runs, all of them checked before the first starts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from pemt.checkpoint import CONFIG, RESULTS, plain_values, trained_count
from pemt.config import (
    AdaptConfig,
    ConfigError,
    PemtError,
    RunConfig,
    SourceConfig,
    field_keys,
    flatten,
    make_config,
    nearest,
    read_yaml_mapping,
)
from pemt.run import check_method
from pemt.tasks import get_task

NEEDED = ("output_dir", "methods", "tasks", "seeds")
KEYS = (*NEEDED, "recipe", "fields", "sources", "source_fields", "published")
# What the sweep itself sets for each run; a task or a source may be another one than its name says.
OWN = ("output_dir", "seed", "task_name", "resume_from_checkpoint", "overwrite_output_dir")
SOURCE_OWN = tuple(key for key in OWN if key != "seed")
# What stage 1 takes from the fields of all stage 2 runs.
SHARED = ("model_name_or_path", "tokenizer_name", "bank_dir")
Config = TypeVar("Config", bound=RunConfig)
_Fields: TypeAlias = Mapping[str, Any]


class SweepError(PemtError):
    """A sweep that cannot run as it is written, or runs in it that failed."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a sweep.

    Args:
        method: the row's name in the table; two rows may use one `config.method`.
        task: the column's; two columns may use one `config.task_name`.
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

    @property
    def results(self) -> dict[str, Any]:
        """What `all_results.json` of a finished one holds."""
        found: dict[str, Any] = json.loads((self.folder / RESULTS).read_text(encoding="utf-8"))
        return found

    @property
    def trained(self) -> int | None:
        """How many parameters a finished one trains; None where its checkpoint is gone."""
        return trained_count(self.folder / self.results["best_checkpoint"])

    def __str__(self) -> str:
        return f"{self.task}, {self.method}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Methods × tasks × seeds, in the order in which they run: seed by seed.

    Args:
        sources: stage 1, which runs first; one that the bank has is not trained again.
        published: method -> task -> a number of somebody else's, in percent; published_by: where it stands.
    """

    output_dir: Path
    methods: list[str]
    tasks: list[str]
    seeds: list[int]
    runs: list[Run]
    sources: list[SourceConfig] = field(default_factory=list)
    published: dict[str, dict[str, float]] = field(default_factory=dict)
    published_by: str = ""


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep.

    Args:
        path: YAML with `output_dir`, `methods`, `tasks` (each a list of names, or names with fields of
            their own), `seeds`, and for all runs `recipe` and `fields`. A method's fields win over a
            task's, a task's over `fields`, and those over the recipe. `sources`, written as tasks are, are
            trained first, by the recipe `source` and `source_fields`; `published` has numbers to show beside ours.

    Raises:
        SweepError: anything wrong in any run; a line per fault, each with file and key.
    """
    content = read_yaml_mapping(path.expanduser())
    try:
        return _sweep(content)
    except SweepError as error:
        raise SweepError(*(f"{path}: {fault}" for fault in error.args)) from None


def _sweep(content: Mapping[str, Any]) -> Sweep:
    _check_shape(content)
    output_dir = Path(content["output_dir"]).expanduser()
    seeds = list(dict.fromkeys(content["seeds"]))
    methods, tasks = _named(content, "methods"), _named(content, "tasks")
    recipes = {name: each.pop("recipe", content.get("recipe")) for name, each in methods.items()}
    shared = content.get("fields") or {}
    every = {"fields": shared, **_levels("tasks", tasks), **_levels("methods", methods)}
    _check_keys(AdaptConfig, every, OWN)
    numbers, published_by = _published(content.get("published"), methods, tasks)
    sources, faults = _sources(content, shared, output_dir / "stage1")
    if sources:
        shared = {"source_tasks": [each.task_name for each in sources], **shared}
    runs: list[Run] = []
    made: dict[tuple[str, str], AdaptConfig] = {}  # of the first seed; reading one takes 50 ms
    for seed, task, method in product(seeds, tasks, methods):
        levels = {
            f"methods.{method}": methods[method],
            f"tasks.{task}": tasks[task],
            "fields": shared,
        }
        default = {"method": method, "task_name": task, "output_dir": ""}
        folder = output_dir / task / method / f"seed-{seed}"
        try:
            if (task, method) not in made:
                config = _config(AdaptConfig, recipes[method], levels, default)
                if not (sources and config.method == "pemt"):  # whose bank is not there yet
                    check_method(config)
                made[task, method] = config
            config = replace(made[task, method], output_dir=str(folder), seed=seed)
            _check_folder(config)
            runs.append(Run(method=method, task=task, seed=seed, config=config))
        except PemtError as error:
            faults.append(_placed(str(error), levels, f"tasks.{task}, methods.{method}"))
    _stop(faults)
    return Sweep(
        output_dir=output_dir,
        methods=list(methods),
        tasks=list(tasks),
        seeds=seeds,
        runs=runs,
        sources=sources,
        published=numbers,
        published_by=published_by,
    )


def _sources(
    content: Mapping[str, Any], shared: Mapping[str, Any], output_dir: Path
) -> tuple[list[SourceConfig], list[str]]:
    """Stage 1's runs, on the base model and into the bank of `fields`; and what is wrong with them."""
    named = _named(content, "sources") if content.get("sources") else {}
    given = content.get("source_fields") or {}
    _check_keys(SourceConfig, {"source_fields": given, **_levels("sources", named)}, SOURCE_OWN)
    found: dict[str, SourceConfig] = {}
    faults = []
    if given and not named:
        faults.append("source_fields: there are no `sources` to train with them")
    for name, each in named.items():
        levels = {
            f"sources.{name}": each,
            "source_fields": given,
            "fields": {key: shared[key] for key in SHARED if key in shared},
        }
        default = {"task_name": name, "output_dir": str(output_dir / name)}
        try:
            config = _config(SourceConfig, "source", levels, default)
            if config.task_name in found:
                raise ConfigError(
                    f"task_name: found {config.task_name} twice; the bank has one entry of a name"
                )
            found[config.task_name] = config
            _check_folder(config)
        except PemtError as error:
            faults.append(_placed(str(error), levels, f"sources.{name}"))
    return list(found.values()), faults


def _published(
    given: Any, methods: Mapping[str, Any], tasks: Mapping[str, Any]
) -> tuple[dict[str, dict[str, float]], str]:
    """Published numbers by method and task, and where they stand."""
    if given is None:
        return {}, ""
    numbers = given.get("numbers") if isinstance(given, dict) else None
    if (
        not isinstance(numbers, dict)
        or given.keys() != {"source", "numbers"}
        or not all(isinstance(row, dict) for row in numbers.values())
        or not all(type(each) in (int, float) for row in numbers.values() for each in row.values())
    ):
        raise SweepError(
            f"published: found {given}, expected `source: where they stand` and "
            "`numbers: {method: {task: percent}}`"
        )
    named = [(method, methods) for method in numbers]
    named += [(task, tasks) for row in numbers.values() for task in row]
    _stop(
        [
            f"published.numbers: unknown `{name}`{nearest(name, list(known))}"
            for name, known in named
            if name not in known
        ]
    )
    return numbers, str(given["source"])


def _check_shape(content: Mapping[str, Any]) -> None:
    known = f"there are {KEYS}"
    unknown = [key for key in content if key not in KEYS]
    faults = [f"unknown key `{key}`{nearest(key, list(KEYS), what=known)}" for key in unknown]
    faults += [f"{key}: missing" for key in NEEDED if not content.get(key)]
    _stop(faults)
    seeds = content["seeds"]
    if not (isinstance(seeds, list) and all(type(seed) is int for seed in seeds)):
        raise SweepError(f"seeds: found {seeds}, expected a list of integers")


def _stop(faults: list[str]) -> None:
    if faults:
        raise SweepError(*dict.fromkeys(faults))


def _named(content: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """Names with their own fields, from a list of names or a mapping."""
    value = content[key]
    named = dict.fromkeys(value) if isinstance(value, list) else value
    if not isinstance(named, dict) or not all(
        isinstance(name, str) and (fields is None or isinstance(fields, dict))
        for name, fields in named.items()
    ):
        raise SweepError(
            f"{key}: found {value}, expected a list of names, or `name: {{field: value}}` lines"
        )
    for name in named:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise SweepError(
                f"{key}: found the name `{name}`; it becomes a folder's: letters, digits, . _ -"
            )
    return {name: dict(fields or {}) for name, fields in named.items()}


def _levels(key: str, named: Mapping[str, _Fields]) -> dict[str, _Fields]:
    """Fields by the place in the sweep that they stand at."""
    return {f"{key}.{name}": fields for name, fields in named.items()}


def _check_keys(kind: type[RunConfig], levels: Mapping[str, _Fields], own: tuple[str, ...]) -> None:
    """Refuse keys that no run has, and those of the sweep's `own`."""
    keys = field_keys(kind)
    known = [key for key in keys if key not in own]
    faults = []
    for level, fields in levels.items():
        for key in flatten(fields, keys):
            if key == "task_name" and level.startswith(("tasks.", "sources.")):
                continue
            if key in own:
                faults.append(f"{level}.{key}: the sweep sets it for each run; leave it out")
            elif key not in known:
                faults.append(f"{level}: unknown key `{key}`{nearest(key, known)}")
    _stop(faults)


def _config(
    kind: type[Config], recipe: str | None, levels: Mapping[str, _Fields], default: _Fields
) -> Config:
    """A run's configuration: the first level's fields win over the next one's, the last one's over `default`."""
    known = field_keys(kind)
    given = dict(default)
    for fields in reversed(list(levels.values())):
        given |= flatten(fields, known)
    config = make_config(kind, given, recipe=recipe, prog="pemt sweep")
    get_task(config.task_name, config.task_file)
    return config


def _placed(message: str, levels: Mapping[str, _Fields], where: str) -> str:
    """A complaint about a run, with the place in the sweep that it comes from; else with the run."""
    key = message.removeprefix("--").split(":")[0].split(" ")[0]
    for level, fields in levels.items():
        if key in flatten(fields, field_keys(AdaptConfig)) or key.split(".")[0] in fields:
            return f"{level}.{message.removeprefix('--')}"
    if key == "method":
        where = where.rpartition(", ")[2]
    return f"{where}: {message}"


def _check_folder(config: RunConfig) -> None:
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
