"""Local files of a task: which file is which split, and their rows with the hub's fields."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pemt.data.errors import DataError
from pemt.data.formats import EXTENSIONS, Record, read_records
from pemt.tasks import SPLITS, RowError, Task

# Names of a split, the fullest file first: train.tsv before train.slice.tsv before train.32shot.*
STEMS = {
    "train": ("train",),
    "validation": ("validation", "val", "dev", "validation_matched", "dev_matched"),
    "test": ("test",),
}
VARIANTS = (
    r"{}",
    r"{}-v\d\.\d",  # SQuAD
    r"{}-\d{{5}}-of-\d{{5}}",  # the hub's parquet shards
    r"{}_rand_split",  # CommonsenseQA
    r"{}_xl",  # Winogrande
    r"[\w.-]+[_-]{}",  # snli_1.0_train
    r"{}\.slice",
    r"{}[._](?:k|\d+)[_-]?shot",
    r"{}\d+",  # FewGLUE's dev32
)


def task_files(task: Task, data_dir: str | Path | None) -> dict[str, list[Path]]:
    """The files of each split: in `data_dir`, else those that the task names; none where it is read from the hub.

    Raises DataError where the folder or a file is missing.
    """
    found = own_files(task) if data_dir is None else find_files(task, data_dir)
    for file in (path for paths in found.values() for path in paths):
        if not file.is_file():
            raise DataError(f"{file}: no such file, which task {task.name} reads")
    return found


def own_files(task: Task) -> dict[str, list[Path]]:
    """The files of each split that a task names."""
    files: dict[str, list[Path]] = {}
    for split, path in task.files:
        files.setdefault(split, []).append(Path(path))
    return files


def find_files(task: Task, data_dir: str | Path) -> dict[str, list[Path]]:
    """The files of each split in a folder, by the names told in STEMS and VARIANTS.

    A split without a file is left out. Raises DataError, which tells the names looked for, where
    the folder is missing or has no such file.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataError(f"data_dir: {folder} is no folder; give one that holds the task's files")
    found = {split: files for split in SPLITS if (files := files_of_split(folder, split))}
    if not found:
        here = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise DataError(
            f"data_dir: {folder} has no file of {task.name}; looked for train, <name>_train, "
            f"train-v<x.y>, train.slice, train.<k>shot, train.kshot, dev and test alike, each as "
            f".{', .'.join(EXTENSIONS)}, also with .gz; found: {here:.300}; files of other names "
            f"go into a --task_file with `like: {task.name}` and `files`"
        )
    return found


def files_of_split(folder: Path, split: str) -> list[Path]:
    """The best match for a split; several files only where they are the shards of one."""
    extension = rf"\.(?:{'|'.join(EXTENSIONS)})(?:\.gz)?"
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for pattern in (variant.format(stem) for variant in VARIANTS for stem in STEMS[split]):
        matches = [name for name in names if re.fullmatch(pattern + extension, name)]
        if len(matches) > 1 and not all("-of-" in name for name in matches):
            raise DataError(
                f"data_dir: {folder} has several files for {split}: {', '.join(matches)}; keep one"
            )
        if matches:
            return [folder / name for name in matches]
    return []


def read_rows(task: Task, paths: Sequence[Path]) -> Iterator[tuple[str, Record | RowError]]:
    """The rows of published or plain files with the hub's fields, each with its place."""
    for path in paths:
        for place, record in read_records(path, tsv_columns=task.tsv_columns):
            if isinstance(record, RowError):
                yield place, record
                continue
            try:
                for row in task.unpack(record) if task.unpack else (record,):
                    yield place, row if isinstance(row, RowError) else renamed(task, dict(row))
            except RowError as error:
                yield place, error


def renamed(task: Task, row: Record) -> Record:
    """The row with the fields of published files under the hub's names as well."""
    for field, published in task.aliases:
        if field not in row and published in row:
            row[field] = row[published]
    return row
