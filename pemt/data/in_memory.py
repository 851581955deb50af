"""Rows that a Python caller holds in memory, identified by content, as files are by their bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from datasets import ClassLabel, Dataset

from pemt.data.errors import DataError
from pemt.tasks import SPLITS, plain

Rows: TypeAlias = Dataset | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class MemoryData:
    """The splits of a task as rows in memory.

    Raises:
        DataError: a split is neither a `datasets.Dataset` nor a list of dicts, or is empty.
    """

    splits: dict[str, Rows]

    def __post_init__(self) -> None:
        for split, rows in self.splits.items():
            _check_rows(split, rows)

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of each split, a hash of what its rows say; equal rows have equal ones in any process."""
        return {split: _digest(rows) for split, rows in self.splits.items()}

    def has_columns(self, *names: str) -> bool:
        """Whether the first training row has these."""
        return set(names) <= set(self.splits["train"][0])


def memory_data(
    train: Rows | Mapping[str, Rows] | None, validation: Rows | None, test: Rows | None
) -> MemoryData | None:
    """The splits that a caller gives; None where none is given.

    Args:
        train: rows; or a DatasetDict (a mapping of splits), which stands for all three.
        validation, test: rows.

    Raises:
        DataError: as `MemoryData`, or there is no training set.
    """
    given: dict[str, Any] = {"train": train, "validation": validation, "test": test}
    if isinstance(train, Mapping):
        _check_names(train, [name for name in ("validation", "test") if given[name] is not None])
        given = dict(train)
    splits = {split: rows for split, rows in given.items() if rows is not None}
    if not splits:
        return None
    if "train" not in splits:
        raise DataError(f"train: missing; found {', '.join(splits)} alone; give training rows too")
    return MemoryData(splits=splits)


def _check_names(train: Mapping[str, Any], beside: list[str]) -> None:
    unknown = [str(name) for name in train if name not in SPLITS]
    if unknown:
        raise DataError(
            f"train: found a mapping with {', '.join(unknown)}; allowed are the splits {', '.join(SPLITS)}: give "
            "others as `train=`, `validation=` and `test=`, each a datasets.Dataset or a list of dicts"
        )
    if beside:
        raise DataError(
            f"{', '.join(beside)}: given beside a mapping of splits as train; put them into it"
        )


def _check_rows(split: str, rows: Any) -> None:
    if not isinstance(rows, Dataset):
        if not isinstance(rows, Sequence) or isinstance(rows, str | bytes):
            raise DataError(
                f"{split}: found {type(rows).__name__}; give a datasets.Dataset (it has from_pandas, from_generator, "
                "from_dict) or a list of dicts"
            )
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
                raise DataError(
                    f"{split}[{number}]: found {type(row).__name__} {row!r:.60}; a row is a dict whose keys are texts"
                )
    if not len(rows):
        raise DataError(f"{split}: no row in it; give some, or leave it out")


def _digest(rows: Rows) -> str:
    digest = hashlib.sha256()
    if isinstance(rows, Dataset):
        rows = rows.with_format(None)
        # What a class id means stands in the features alone.
        classes = {
            name: kind.names for name, kind in rows.features.items() if isinstance(kind, ClassLabel)
        }
        digest.update(json.dumps(classes, sort_keys=True).encode() if classes else b"")
    for row in rows:
        line = json.dumps(dict(row), sort_keys=True, default=_written)
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _written(value: Any) -> Any:
    """What json does not know: numbers of numpy and arrow, dates, what a column that nobody reads may hold."""
    own = plain(value)
    return own if own is not value else str(value)
