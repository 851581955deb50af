"""Inputs to predict: lines of jsonl to source texts."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pemt.data.errors import DataError
from pemt.data.formats import lines_of, note_on, parsed_lines, read_records
from pemt.data.local_files import columns_of, rows_of
from pemt.data.tables import Located, RawRow
from pemt.data.text import as_utf8
from pemt.tasks import RowError, Task, encodable, source_of, text_of

STDIN = "-"
TEXT = "input"  # the field of a row that brings its whole source text


def read_inputs(task: Task, file: str) -> list[str]:
    """The source texts of a file's rows, in its order.

    A row has the fields of the task's template, or, where it has none of them, `{"input": text}` with
    a text that is taken as it is. Labels are not needed and not read.

    Args:
        task: gives the template.
        file: jsonl, or another kind of file that a task may be read from; `-` is stdin, as jsonl.

    Raises:
        DataError: no such file, no row in it, or a malformed row, with file and line.
    """
    if file != STDIN and not Path(file).is_file():
        raise DataError(f"input_file: no file {file}; give a jsonl file, or - for stdin")
    sources: list[str] = []
    for row_id, record in located(task, file):
        try:
            if isinstance(record, RowError):
                raise record
            sources += sources_of(task, record)
        except RowError as error:
            raise DataError(f"{row_id}: {error}") from None
    if not sources:
        raise DataError(f"{'stdin' if file == STDIN else file}: no row in it; give one or more")
    return sources


def note_on_inputs(task: Task, file: str) -> str:
    """What was decided on how to read the file; empty where there was nothing to decide."""
    return "" if file == STDIN else note_on(Path(file), columns_of(task))


def located(task: Task, file: str) -> Iterable[Located]:
    """Records with their places."""
    if file == STDIN:
        return parsed_lines("stdin", lines_of(as_utf8(sys.stdin.buffer, "stdin")))
    return read_records(Path(file), columns_of(task))


def sources_of(task: Task, record: Mapping[str, Any]) -> list[str]:
    """The source texts of a record: one, or one for each example that a published record nests.

    The template's fields win: a whole text counts where the record has none of them.
    """
    rows: list[RawRow] = []
    for row in rows_of(task, record):
        if isinstance(row, RowError):
            raise row
        rows.append(row)
    if TEXT not in record or any(name in row for row in rows for name in task.fields):
        return [source_of(task, row) for row in rows]
    return [encodable(text_of(record, TEXT))]
