"""Local files of a task: which file is which split, and their rows with the hub's fields."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pemt.data.errors import DataError
from pemt.data.formats import EXTENSIONS, extension_of, read_records
from pemt.data.tables import Columns, Located, RawRow
from pemt.tasks import RowError, Task

WORDS = {
    "train": r"(?:train|training)",
    "validation": r"(?:validation|valid|val|dev|development)",
    "test": r"(?:test|testing)",
    "eval": r"(?:eval|evaluation)",  # validation, or test where there is a validation set
}
# Names of a split, the fullest file first: train.tsv before train.slice.tsv before train.32shot.*
SHARD = r"(?:[\w.-]+[_-])?{}-(\d{{5}})-of-(\d{{5}})(?:-[0-9a-f]+)?"  # the hub's
VARIANTS = (
    r"{}",
    r"{}-v\d\.\d",  # SQuAD
    SHARD,
    r"{}_matched",  # MNLI
    r"{}_rand_split",  # CommonsenseQA
    r"{}_xl",  # WinoGrande
    r"[\w.-]+[_.-]{}(?:_matched)?",  # snli_1.0_train
    r"{}\.slice",
    r"{}[._](?:k|\d+)[_-]?shot",
    r"{}\d+",  # FewGLUE's dev32
    r"{}_l",
    r"{}_m",
    r"{}_s",
    r"{}_xs",
    r"(?:.*[^a-z])?{}(?:[^a-z].*)?",  # train-clean
)
# Beside data lie code, papers, and what tools leave.
OTHER = ("py", "sh", "md", "rst", "ipynb", "pdf", "yaml", "yml", "log", "html", "png", "jpg")
OF_DATASETS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
DEPTH = 3  # folders within folders: glue_data/MNLI, data/train


def task_files(task: Task, data_dir: str | Path | None) -> tuple[dict[str, list[Path]], list[str]]:
    """The files of each split: in `data_dir`, else those that the task names; none where it is read from the hub.
    In one line each what else was decided.

    Raises DataError where the folder or a file is missing.
    """
    if data_dir is not None:
        return find_files(task, data_dir)
    files: dict[str, list[Path]] = {}
    for split, name in task.files:
        if not Path(name).is_file():
            raise DataError(f"{name}: no such file, which task {task.name} reads")
        files.setdefault(split, []).append(Path(name))
    return files, []


def find_files(task: Task, data_dir: str | Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The files of each split in a folder, by the names in WORDS and VARIANTS, and in one line
    each what else was decided: files that look like a split and are not read, names that were guessed.

    A split without a file is left out. Raises DataError, which tells the names looked for, where
    the folder is missing or has no such file, and where two files could be the same split.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataError(f"data_dir: {folder} is no folder; give one that holds the task's files")
    found, notes = search(task, folder, DEPTH)
    if not found:
        here = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise DataError(
            f"data_dir: {folder} has no file of {task.name}; looked for train, <name>_train, "
            f"train-v<x.y>, train.slice, train.<k>shot, train.kshot, and folders train, dev (or valid) "
            f"and test alike, each as .{', .'.join(EXTENSIONS)}, also with .gz; found: {here:.300}; files of other "
            f"names go into a --task_file with `like: {task.name}` and `files`"
        )
    return found, [f"{task.name}: {note}" for note in notes]


def search(task: Task, folder: Path, depth: int) -> tuple[dict[str, list[Path]], list[str]]:
    """What `find_files` gives of one folder, or of the one within it that bears the task's name."""
    found, notes = splits_in(folder)
    within = inner_folders(task, folder) if depth else []
    if found:
        return found, notes
    for name in within:
        found, inner = search(task, name, depth - 1)
        if found:
            return found, [f"data_dir: read {name}", *inner, *notes]
    alone = [path for path in entries(folder) if is_data(path) and extension_of(path) != "txt"]
    if len(alone) == 1 and not words_in(alone[0]):
        return {"train": alone}, [f"{alone[0]} is the only file: it is train", *notes]
    return {}, notes


def inner_folders(task: Task, folder: Path) -> list[Path]:
    """Folders that may hold the task: of its name (GLUE's SST-2, snli_1.0), its configuration, data."""

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", re.sub(r"[ _-]?v?\d+\.\d+$", "", name.lower()))

    own = plain(task.name.removeprefix("superglue-").removesuffix("-fixed"))
    names = [own, plain(task.hub.config or own) if task.hub else own, "data"]
    folders = [path for path in entries(folder) if path.is_dir() and plain(path.name) in names]
    folders.sort(key=lambda path: names.index(plain(path.name)))
    if len(folders) > 1 and plain(folders[0].name) == plain(folders[1].name):
        raise DataError(
            f"data_dir: {folders[0]} and {folders[1]} could both be {task.name}; give one of them"
        )
    return folders


def splits_in(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The files of each split in a folder, and notes on what was guessed or is not read."""
    named = {path: words_in(path) for path in entries(folder)}
    found: dict[str, list[Path]] = {}
    notes = []
    for word in WORDS:
        split = word
        if word == "eval":
            split = next((name for name in ("validation", "test") if name not in found), "")
        paths = [path for path, words in named.items() if words == {word}]
        if split and (best := best_of(folder, word, paths)):
            found[split] = best
            if word == "eval" or not any(matches(word, best[0], each) for each in VARIANTS[:-1]):
                notes.append(f"{best[0]} is read as {split}")
    read = {path for paths in found.values() for each in paths for path in (each, each.parent)}
    ignored = [path.name for path, words in named.items() if words and path not in read]
    if ignored and found:
        names = ", ".join(ignored)
        notes.append(f"not read in {folder}: {names:.300}; `files` of a --task_file takes others")
    return found, notes


def entries(folder: Path) -> list[Path]:
    """What a folder holds, less what tools leave there."""
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith((".", "~"))]


def is_data(path: Path) -> bool:
    """Whether it is a file of a kind that is read, and no note of `datasets` about its own."""
    is_known = extension_of(path) in EXTENSIONS and path.name.lower() not in OF_DATASETS
    return path.is_file() and is_known


def stem_of(path: Path) -> str:
    """A name without its extension, in small letters."""
    name = path.name.lower().removesuffix(".gz")
    return name.removesuffix(f".{extension_of(path)}") if is_data(path) else name


def words_in(path: Path) -> set[str]:
    """Which splits a name tells of, where it can be data."""
    if path.is_file() and extension_of(path) in OTHER:
        return set()
    name = stem_of(path)
    return {
        word for word, any_of in WORDS.items() if re.search(rf"(?<![a-z]){any_of}(?![a-z])", name)
    }


def matches(word: str, path: Path, variant: str) -> re.Match[str] | None:
    """The name as this variant of the word; a folder has no variants."""
    return re.fullmatch(variant.format(WORDS[word]), stem_of(path))


def best_of(folder: Path, word: str, paths: Sequence[Path]) -> list[Path]:
    """The best match for a split; several files only where they are the shards of one.

    A .txt counts where nothing else has its name: SNLI has each file as jsonl and as txt.
    """
    files = [path for path in paths if is_data(path)]
    named_so = [path for path in paths if path.is_dir() and matches(word, path, "{}")]
    folders = [path for path in named_so if any(map(is_data, entries(path)))]
    for variant in VARIANTS:
        candidates = [*files, *folders] if variant == "{}" else files
        named = [path for path in candidates if matches(word, path, variant)]
        found = [path for path in named if extension_of(path) != "txt"] or named
        if variant == SHARD and found:
            return check_shards(found)
        if len(found) > 1:
            several = ", ".join(path.name for path in found)
            raise DataError(f"data_dir: {folder} has several files for {word}: {several}; keep one")
        if found:
            return parts_of(found[0]) if found[0].is_dir() else found
    return []


def parts_of(folder: Path) -> list[Path]:
    """The files of a split that has a folder of its own."""
    files = [path for path in entries(folder) if is_data(path)]
    if len({extension_of(path) for path in files}) > 1:
        several = ", ".join(path.name for path in files)
        raise DataError(
            f"data_dir: {folder} has files of several kinds: {several:.300}; keep one kind"
        )
    return check_shards(files)


def check_shards(files: list[Path]) -> list[Path]:
    """The files, if none of the shards that their names count is missing or there twice."""
    shards = [re.search(r"-(\d{5})-of-(\d{5})", path.name) for path in files]
    numbers = [match.groups() for match in shards if match]
    if numbers:
        count = int(numbers[0][1])
        wanted = [(f"{number:05d}", f"{count:05d}") for number in range(count)]
        if sorted(numbers) != wanted or len(numbers) < len(files):
            raise DataError(
                f"data_dir: {files[0].parent} has {len(files)} of {count} shards, or some of another "
                f"count: {', '.join(path.name for path in files):.300}; each must be there once"
            )
    return files


def columns_of(task: Task) -> Columns:
    """What a task says of its tables."""
    aliases = {name for pair in task.aliases for name in pair}
    return Columns(
        names=task.tsv_columns,
        known=frozenset({*task.tsv_columns, *task.fields, task.label, *aliases}),
        quoting=task.quoting,
    )


def read_rows(task: Task, paths: Sequence[Path]) -> Iterator[Located]:
    """The rows of published or plain files with the hub's fields, each with its place."""
    for path in paths:
        for row_id, record in read_records(path, columns_of(task)):
            for row in rows_of(task, record):
                yield row_id, row


def rows_of(task: Task, record: Mapping[str, Any] | RowError) -> Iterator[RawRow | RowError]:
    """The rows of a record, published fields under the hub's names as well; a RowError in place of a malformed one."""
    if isinstance(record, RowError):
        yield record
        return
    try:
        for row in task.unpack(record) if task.unpack else (record,):
            if isinstance(row, RowError):
                yield row
                continue
            filled = dict(row)
            for field, published in task.aliases:
                if field not in filled and published in filled:
                    filled[field] = filled[published]
            yield filled
    except RowError as error:
        yield error
