"""Your own task without Python: a YAML file checked against the fields of `Task`.

    name: tickets
    description: Decide which team a support ticket belongs to.
    template: "subject: {subject} text: {body}"
    label: team
    labels: [billing, network, other]
    metrics: [accuracy, macro_f1]
    files: {train: tickets_train.csv, validation: tickets_dev.csv}

Instead of `files` (relative to the YAML file; a list where a split has several) it may name a data
set on the hub (`hub: {path: owner/name, validation: null, test: test}`), or neither, and
`--data_dir` points at its files. `like: squad` takes over whatever it does not say from a known task:

    name: squad-mine
    like: squad
    files: {train: articles.json, validation: more_articles.json}
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pemt.config import load_yaml, nearest
from pemt.tasks.registry import known_task
from pemt.tasks.task import SPLITS, HubSource, Task, TaskError


class WrongType(ValueError):
    """What a value should have been."""


def get_task(name: str, task_file: str | None = None) -> Task:
    """The task of that name, from the table or from a YAML file.

    Raises TaskError, with the nearest names where the table has none like it.
    """
    if task_file is None:
        return known_task(name)
    task = load_task_file(task_file)
    if task.name != name:
        raise TaskError(
            f"task_name: found {name!r}, but {task_file} describes {task.name!r}; "
            "give the same name in both"
        )
    return task


def load_task_file(path: str | Path) -> Task:
    """The task that a YAML file describes.

    Raises TaskError for a missing file, malformed YAML, an unknown or missing key, a value of a
    wrong type, or whatever `Task` itself refuses.
    """
    path = Path(path).expanduser()
    values, as_written = mapping_of(path)
    read: dict[str, Any] = {}
    for key, value in values.items():
        if key not in READERS:
            hint = nearest(str(key), list(READERS), what=f"allowed: {', '.join(READERS)}")
            raise TaskError(f"{path}: unknown key `{key}`{hint}")
        try:
            read[key] = READERS[key](value)
            if READERS[key] is texts:
                check_as_written(read[key], as_written.get(key))
        except WrongType as error:
            raise TaskError(f"{path}: {key}: found {value!r:.60}, it must be {error}") from None
    like = read.pop("like", None)
    missing = [key for key in REQUIRED if key not in read and (like is None or key == "name")]
    if missing:
        raise TaskError(f"{path}: missing key {', '.join(missing)}")
    if "files" in read:
        read["files"] = tuple(
            (split, str(path.parent / Path(name).expanduser())) for split, name in read["files"]
        )
    try:
        return Task(**read) if like is None else dataclasses.replace(known_task(like), **read)
    except TaskError as error:
        raise TaskError(f"{path}: {error}") from None


def task_text(task: Task) -> str | None:
    """A task as the YAML file that `load_task_file` reads; None for one with functions, which no file can hold."""
    values: dict[str, Any] = {}
    for each in dataclasses.fields(Task):
        value = getattr(task, each.name)
        if value == each.default:
            continue
        if each.name not in READERS:
            return None
        values[each.name] = list(value) if isinstance(value, tuple) else value
    if task.hub:
        values["hub"] = dataclasses.asdict(task.hub)
    if task.aliases:
        values["aliases"] = _by_first(task.aliases)
    if task.files:
        absolute = [(split, str(Path(name).absolute())) for split, name in task.files]
        values["files"] = _by_first(absolute)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _by_first(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    return {key: [value for of, value in pairs if of == key] for key, _ in pairs}


def mapping_of(path: Path) -> tuple[Mapping[Any, Any], Mapping[Any, Any]]:
    """The YAML file's top-level mapping, and the same with all values as they are written."""
    try:
        content = path.read_text(encoding="utf-8")
        values, as_written = load_yaml(content), yaml.load(content, Loader=yaml.BaseLoader)
    except OSError as error:
        raise TaskError(f"task_file: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: bad UTF-8 at byte {error.start}; save it as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise TaskError(f"{path}{line}: malformed YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise TaskError(f"{path}: malformed YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise TaskError(f"{path}: found {type(values).__name__}, it must be a mapping of keys")
    return values, as_written


def text(value: Any) -> str:
    """A string."""
    if not isinstance(value, str) or not value.strip():
        raise WrongType("text")
    return value


def texts(value: Any) -> tuple[str, ...]:
    """A list of strings; integers become text, whatever else YAML makes of a text must be quoted."""
    entries = value if isinstance(value, list) else [value]
    if not entries or any(isinstance(e, bool) or not isinstance(e, str | int) for e in entries):
        raise WrongType(
            "a list of texts (put yes, no, true and false in quotes, null, dates and numbers with a point as well)"
        )
    return tuple(str(entry) for entry in entries)


def check_as_written(read: Sequence[str], as_written: Any) -> None:
    """Refuse an integer that YAML reads otherwise than it is written: 010 as 8, 1_0 as 10, 1:30 as 90."""
    written = as_written if isinstance(as_written, list) else [as_written]
    for ours, theirs in zip(read, written, strict=False):
        if isinstance(theirs, str) and theirs.strip() != ours.strip():
            raise WrongType(f"in quotes where YAML reads {theirs} as {ours}")


def positive_integer(value: Any) -> int:
    """An integer above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise WrongType("a positive integer")
    return value


def share(value: Any) -> float:
    """A number between 0 and 1."""
    if not (isinstance(value, float) and 0 < value < 1):
        raise WrongType("a number between 0 and 1")
    return value


def quoting(value: Any) -> str:
    """Whether quotes are syntax."""
    if value not in ("minimal", "none"):
        raise WrongType("minimal (quotes are syntax) or none (quotes are text)")
    return str(value)


def columns(value: Any) -> tuple[str, ...]:
    """Names of columns, each once."""
    names = texts(value)
    if len(set(names)) < len(names):
        raise WrongType("a list of texts, each of them once")
    return names


def positive_number(value: Any) -> float:
    """A number above 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 < value < math.inf):
        raise WrongType("a positive number")
    return float(value)


def pairs(
    value: Any, wanted: str = "a mapping of texts, or of lists of texts"
) -> tuple[tuple[str, str], ...]:
    """{key: a text, or a list of texts}, as pairs."""
    if not isinstance(value, dict):
        raise WrongType(wanted)
    found = [
        (key, name)
        for key, names in value.items()
        for name in (names if isinstance(names, list) and names else [names])
    ]
    if not all(isinstance(text, str) for pair in found for text in pair):
        raise WrongType(wanted)
    return tuple(found)


def files(value: Any) -> tuple[tuple[str, str], ...]:
    """{split: file, or a list of files}, as pairs."""
    wanted = f"a mapping that has train; keys {', '.join(SPLITS)}, values texts or lists"
    found = pairs(value, wanted)
    if "train" not in value or not set(value) <= set(SPLITS):
        raise WrongType(wanted)
    return found


def hub(value: Any) -> HubSource:
    """{path, config, revision, train, validation, test}; null where there is no such split."""
    keys = [field.name for field in dataclasses.fields(HubSource)]
    may_be_null = ("config", "revision", "validation", "test")
    if (
        not isinstance(value, dict)
        or "path" not in value
        or not all(
            key in keys and (isinstance(name, str) or (name is None and key in may_be_null))
            for key, name in value.items()
        )
    ):
        raise WrongType(f"a mapping of texts that has path, with the keys {', '.join(keys)}")
    return HubSource(**value)


READERS: dict[str, Callable[[Any], Any]] = {
    "name": text,
    "like": text,
    "description": text,
    "template": text,
    "metrics": texts,
    "labels": texts,
    "label_names": texts,
    "label": text,
    "no_label": texts,
    "score_step": positive_number,
    "group": texts,
    "max_target_length": positive_integer,
    "aliases": pairs,
    "tsv_columns": columns,
    "quoting": quoting,
    "files": files,
    "validation_split": share,
    "hub": hub,
}
REQUIRED = ("name", "description", "template", "metrics")
