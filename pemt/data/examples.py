"""Rows to examples, kept on disk by `datasets`, so that they are built once and memory-mapped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
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


def load_examples(
    task: Task, data_dir: str | None, wanted: Sequence[str] = SPLITS
) -> dict[str, Dataset]:
    """The examples of every labelled split that exists and is wanted, malformed rows included.

    Read from `data_dir`, else from the task's own files, else from the hub.
    """
    files = files_of(task, data_dir)
    if files is not None:
        return {split: local_examples(task, files[split]) for split in wanted if split in files}
    hub = hub_of(task)
    names = {split: hub.split_name(split) for split in wanted}
    return {split: hub_examples(task, hub, name) for split, name in names.items() if name}


def files_of(task: Task, data_dir: str | None) -> dict[str, tuple[Path, ...]] | None:
    """The local files of each split; None where the task is read from the hub."""
    if data_dir is None and not task.files:
        return None
    files = (
        find_files(task, data_dir)
        if data_dir is not None
        else {split: [Path(path)] for split, path in task.files}
    )
    if task.hub is not None and task.hub.test is None:
        # The published test file has no labels.
        files.pop("test", None)
    for path in (path for paths in files.values() for path in paths):
        if not path.is_file():
            raise DataError(f"{path}: no such file, which task {task.name} reads")
    return {split: tuple(paths) for split, paths in files.items()}


def hub_of(task: Task) -> HubSource:
    """A task's data set on the hub."""
    if task.hub is None:
        raise DataError(f"task {task.name}: it has no data set on the hub; give --data_dir")
    return task.hub


def load_hub(task: Task, hub: HubSource, split: str, *, streaming: bool = False) -> Any:
    """One split of the hub's copy, as a Dataset or, streaming, an IterableDataset."""
    try:
        return load_dataset(
            hub.path, hub.config, split=split, revision=hub.revision, streaming=streaming
        )
    except (OSError, ValueError, RuntimeError) as error:
        # The first line is the cause; what follows repeats it for every file tried.
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"task {task.name}: {hub.path} ({hub.config or 'default'}, {split}) could not be "
            f"loaded: {cause}; point --data_dir at local files to work without the hub"
        ) from None


def hub_examples(task: Task, hub: HubSource, split: str) -> Dataset:
    """One split of the hub's copy."""
    rows = load_hub(task, hub, split)
    return build(task, HubRows(rows, hub_name(hub, split)), rows._fingerprint)


def hub_name(hub: HubSource, split: str) -> str:
    """How the places of its rows begin."""
    return f"{hub.path}/{hub.config or 'default'}/{split}"


def local_examples(task: Task, paths: tuple[Path, ...]) -> Dataset:
    """One split of local files, which are told apart by their path, size and time of change."""
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
        yield example_row(task, place, row)


def example_row(task: Task, place: str, row: Record | RowError) -> dict[str, Any]:
    """The example of one row."""
    try:
        if isinstance(row, RowError):
            raise row
        example = example_of(task, row)
        problem = f"{place}: {UNLABELLED}" if example is None else ""
    except RowError as error:
        example, problem = None, f"{place}: {error}"
    empty = {"source": "", "target": "", "references": [], "group": ""}
    return {**(example or empty), "problem": problem}


def source_hash() -> str:
    """Identity of the code that makes examples: a cache from older code is not used."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted([*root.glob("tasks/*.py"), *root.glob("data/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()
