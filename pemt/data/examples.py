"""Rows to examples, kept on disk by `datasets`, so that they are built once and memory-mapped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, load_dataset
from datasets.fingerprint import Hasher

from pemt.data.errors import DataError
from pemt.data.local_files import SPLITS, find_files, read_rows
from pemt.data.records import Record
from pemt.tasks import HubSource, RowError, Task, example_of

# A malformed row stays in the cache with its error, a row without gold label with UNLABELLED, so
# that what was left out can be told again when the cache is used.
UNLABELLED = "no gold label"
EXAMPLE = Features(
    {
        "source": Value("string"),
        "target": Value("string"),
        "references": List(Value("string")),
        "group": Value("string"),
        "problem": Value("string"),
    }
)

Located = Iterable[tuple[str, Record | RowError]]


def load_examples(task: Task, data_dir: str | None) -> dict[str, Dataset]:
    """The examples of every labelled split that exists, malformed rows included.

    Read from `data_dir`, else from the task's own files, else from the hub.
    """
    if data_dir is None and not task.files:
        return load_hub_examples(task)
    files = (
        find_files(task, data_dir)
        if data_dir is not None
        else {split: [Path(path)] for split, path in task.files}
    )
    if task.hub is not None and task.hub.test is None:
        # The published test file has no labels.
        files.pop("test", None)
    return {split: local_examples(task, tuple(paths)) for split, paths in files.items()}


def load_hub_examples(task: Task) -> dict[str, Dataset]:
    """The labelled splits of a task's data set on the hub."""
    if task.hub is None:
        raise DataError(f"task {task.name}: it has no data set on the hub; give --data_dir")
    return {
        split: hub_examples(task, task.hub, name)
        for split in SPLITS
        if (name := task.hub.split_name(split))
    }


def hub_examples(task: Task, hub: HubSource, split: str) -> Dataset:
    """One split of the hub's copy."""
    try:
        rows = load_dataset(hub.path, hub.config, split=split, revision=hub.revision)
    except (OSError, ValueError, RuntimeError) as error:
        # The first line is the cause; what follows repeats it for every file tried.
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"task {task.name}: {hub.path} ({hub.config or 'default'}, {split}) could not be "
            f"loaded: {cause}; point --data_dir at local files to work without the hub"
        ) from None
    located = HubRows(rows, f"{hub.path}/{hub.config or 'default'}/{split}")
    return build(task, located, rows._fingerprint)


def local_examples(task: Task, paths: tuple[Path, ...]) -> Dataset:
    """One split of local files, which are told apart by their path, size and time of change."""
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file, which task {task.name} reads")
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return build(task, LocalRows(task, paths), Hasher.hash(stats))


class HubRows:
    """Rows of a data set with their places."""

    def __init__(self, rows: Dataset, name: str) -> None:
        self.rows, self.name = rows, name

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        for number, row in enumerate(self.rows, start=1):
            yield f"{self.name}: row {number}", row


class LocalRows:
    """Rows of local files with their places."""

    def __init__(self, task: Task, paths: tuple[Path, ...]) -> None:
        self.task, self.paths = task, paths

    def __iter__(self) -> Iterator[tuple[str, Record | RowError]]:
        return read_rows(self.task, self.paths)


def build(task: Task, rows: Located, origin: str) -> Dataset:
    """The examples of some rows, from the cache where task, code and origin are the same."""
    fingerprint = Hasher.hash([origin, Hasher.hash(task), source_hash()])
    return Dataset.from_generator(
        examples_of,
        features=EXAMPLE,
        gen_kwargs={"task": task, "rows": rows},
        fingerprint=fingerprint,
    )


def examples_of(task: Task, rows: Located) -> Iterator[dict[str, Any]]:
    """An example per row; where a row gives none, an empty one with the reason as `problem`."""
    for place, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            example = example_of(task, row)
            problem = f"{place}: {UNLABELLED}" if example is None else ""
        except RowError as error:
            example, problem = None, f"{place}: {error}"
        empty = {"source": "", "target": "", "references": [], "group": ""}
        yield {**(example or empty), "problem": problem}


def source_hash() -> str:
    """Identity of the code that makes examples: a cache from older code is not used."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted([*root.glob("tasks/*.py"), *root.glob("data/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()
