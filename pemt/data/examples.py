"""Rows to examples, kept on disk by `datasets`, so that they are built once and memory-mapped."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from pemt.data.errors import DataError
from pemt.data.formats import note_on
from pemt.data.in_memory import MemoryData, Rows
from pemt.data.local_files import columns_of, read_rows, rows_of, task_files
from pemt.data.tables import Located, RawRow
from pemt.storage import sha256
from pemt.tasks import (
    SPLITS,
    ClassId,
    HubSource,
    RowError,
    Task,
    example_of,
    has_label,
    has_numbers,
)

# A malformed row stays in the cache with its error, a row without gold label with UNLABELLED, so
# that what was left out can be logged again when the cache is used.
UNLABELLED = "no gold label"
EXAMPLE = Features(
    {
        "source": Value("string"),
        "target": Value("string"),
        "references": List(Value("string")),
        "group": Value("string"),
        "problem": Value("string"),
        "is_class_id": Value("bool"),
    }
)


@dataclass(frozen=True, kw_only=True)
class DataLocation:
    """Where a task's splits come from: memory, files, or, where there are neither, the hub."""

    task: Task
    files: dict[str, list[Path]] | None = None
    memory: MemoryData | None = None
    notes: tuple[str, ...] = ()  # what was left out or decided, in a line each

    @property
    def splits(self) -> tuple[str, ...]:
        """The labelled splits that there are."""
        if self.memory is not None:
            return tuple(split for split in SPLITS if split in self.memory.splits)
        if self.files is not None:
            return tuple(self.files)
        return tuple(split for split in SPLITS if getattr(hub_of(self.task), split))

    def examples(self, split: str) -> Dataset:
        """The examples of one of `splits`, malformed rows included.

        Raises DataError where files or hub cannot be read.
        """
        if self.memory is not None:
            rows = memory_rows(self.task, self.memory.splits[split], split)
            # with the split, for messages: equal rows may be given as two
            return make_examples(self.task, rows, f"{split} {self.memory.digests[split]}")
        if self.files is not None:
            return local_examples(self.task, self.files[split])
        hub = hub_of(self.task)
        name = getattr(hub, split)
        dataset = load_hub(self.task, name)
        rows = hub_rows(self.task, dataset, hub_name(hub, name))
        return make_examples(self.task, rows, dataset._fingerprint)

    def stream(self) -> IterableDataset:
        """The examples of the training set, malformed rows included, read when they are asked for.

        Raises DataError where the hub cannot be read.
        """
        task = self.task
        if self.files is not None:
            # A list among the arguments is one shard each: what lies before a resumed one is not read again.
            given = {"task": task, "paths": self.files["train"]}
            return IterableDataset.from_generator(local_rows, features=EXAMPLE, gen_kwargs=given)
        hub = hub_of(task)
        rows = load_hub(task, hub.train, streaming=True)
        name, features = hub_name(hub, hub.train), rows.features

        def example(row: RawRow, number: int) -> dict[str, Any]:
            resolved = resolve_class_id(task, row, features)
            return example_row(task, f"{name}: row {number + 1}", resolved)

        names = rows.column_names
        return rows.map(example, with_indices=True, remove_columns=names, features=EXAMPLE)


def locate_data(task: Task, data_dir: str | None, memory: MemoryData | None = None) -> DataLocation:
    """Looks for a task's splits in memory, in `data_dir`, else among its own files, else on the hub.

    Raises DataError where there is no such folder, file or data set.
    """
    if memory is not None:
        return DataLocation(task=task, memory=memory)
    if data_dir is None and not task.files:
        hub_of(task)
        return DataLocation(task=task)
    files, notes = task_files(task, data_dir)
    every = dict.fromkeys(path for paths in files.values() for path in paths)
    decided = [note for path in every if (note := note_on(path, columns_of(task)))]
    notes += [f"{task.name}: {note}" for note in decided]
    # The published test file has no labels, one's own may.
    is_published = task.hub is not None and task.hub.test is None and "test" in files
    if is_published and not any(
        not isinstance(row, RowError) and has_label(task, row)
        for _, row in read_rows(task, files["test"])
    ):
        (file, *_) = files.pop("test")
        notes.append(f"{task.name}, test: left out {file}, which has no label")
    return DataLocation(task=task, files=files, notes=tuple(notes))


def hub_of(task: Task) -> HubSource:
    """A task's data set on the hub."""
    if task.hub is None:
        raise DataError(f"task {task.name}: it has no data set on the hub; give --data_dir")
    return task.hub


def load_hub(task: Task, split: str, *, streaming: bool = False) -> Any:
    """One split of the hub's copy, as a Dataset or, streaming, an IterableDataset."""
    hub = hub_of(task)
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


def resolve_class_id(task: Task, row: RawRow, features: Features | None) -> RawRow:
    """A row in which a class id of the data set's own is the name that it has there, or is known to be an id.

    A data set on the hub may number its classes in another order than the task's labels.
    """
    kind = (features or {}).get(task.label)
    if not isinstance(kind, ClassLabel) or row[task.label] not in range(len(kind.names)):
        return row
    number = row[task.label]
    is_known = set(kind.names) <= {*task.labels, *task.label_names}
    by_name = is_known and not has_numbers(task.labels, task.label_names)
    return {**row, task.label: kind.names[number] if by_name else ClassId(number)}


def hub_name(hub: HubSource, split: str) -> str:
    """How the places of its rows begin."""
    return f"{hub.path}/{hub.config or 'default'}/{split}"


def local_examples(task: Task, paths: Sequence[Path]) -> Dataset:
    """One split of local files, which are identified by path, in messages, and by content."""
    contents = []
    for path in paths:
        try:  # another file may have the same size and time of change
            contents.append((str(path.resolve()), sha256(path)))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return make_examples(task, read_rows(task, paths), Hasher.hash(contents))


def local_rows(task: Task, paths: list[Path]) -> Iterator[dict[str, Any]]:
    """The examples of local files."""
    return examples_of(task, read_rows(task, paths))


def hub_rows(task: Task, rows: Dataset, name: str) -> Iterator[Located]:
    """Rows of a data set with their places."""
    for number, row in enumerate(rows, start=1):
        yield f"{name}: row {number}", resolve_class_id(task, row, rows.features)


def memory_rows(task: Task, rows: Rows, split: str) -> Iterator[Located]:
    """Rows in memory with their places: `train[3]`, as Python counts."""
    features = None
    if isinstance(rows, Dataset):
        rows, features = rows.with_format(None), rows.features
    for number, record in enumerate(rows):
        for row in rows_of(task, resolve_class_id(task, dict(record), features)):
            yield f"{split}[{number}]", row


def make_examples(task: Task, rows: Iterator[Located], identity: str) -> Dataset:
    """The examples of some rows, from the cache where task, code and identity of the rows are the same."""
    fingerprint = Hasher.hash([identity, Hasher.hash(task), source_hash()])
    try:
        return Dataset.from_generator(
            examples_of,
            features=EXAMPLE,
            gen_kwargs={"task": task, "rows": rows},
            fingerprint=fingerprint,
        )
    except DatasetGenerationError as error:
        # a file that cannot be read to its end, or a cache that cannot be written
        if isinstance(error.__cause__, DataError | OSError):
            raise error.__cause__ from None
        raise


def examples_of(task: Task, rows: Iterable[Located]) -> Iterator[dict[str, Any]]:
    """An example per row; where a row gives none, an empty one with the reason as `problem`."""
    for row_id, row in rows:
        yield example_row(task, row_id, row)


def example_row(task: Task, row_id: str, row: RawRow | RowError) -> dict[str, Any]:
    """The example of one row."""
    try:
        if isinstance(row, RowError):
            raise row
        example = example_of(task, row)
        problem = f"{row_id}: {UNLABELLED}" if example is None else ""
    except RowError as error:
        example, problem = None, f"{row_id}: {error}"
    empty = {"source": "", "target": "", "references": [], "group": "", "is_class_id": False}
    return {**(example or empty), "problem": problem}


@cache
def source_hash() -> str:
    """Identity of the code that makes examples: a cache from older code is not used.

    All modules of both packages are in it: a list of those that matter would be wrong one day, without a word.
    """
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted([*root.glob("tasks/*.py"), *root.glob("data/*.py")]):
        digest.update(program_of(path.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()


def program_of(source: str) -> str:
    """What Python runs of a module's text: without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            has_docstring = ast.get_docstring(node, clean=False) is not None
            node.body = node.body[has_docstring:]
    return ast.dump(tree)
