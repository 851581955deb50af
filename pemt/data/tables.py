"""Tables as people write them: csv, tsv and their like. What separates columns and whether quotes
are syntax or text is decided by what the file shows, and logged.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from pemt.data.errors import DataError
from pemt.data.quoting import MAX_FIELD, Evidence
from pemt.data.text import text_lines
from pemt.tasks import RowError

DELIMITERS = (",", ";", "\t", "|")
SAMPLE = 50  # rows that are compared where several delimiters would do

RawRow = dict[str, Any]
Located = tuple[str, RawRow | RowError]
Numbered = tuple[int, list[str] | RowError]  # the line a row begins at, and its fields


class ShortRow(RowError):
    """A row with too few fields: perhaps half of one."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What a task says of its tables."""

    # the columns of a table without a header line, as many as there are
    names: tuple[str, ...] = ()
    known: frozenset[str] = frozenset()  # names that only a header line can hold
    quoting: str | None = None  # "minimal" or "none" instead of what a file shows


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a table is written. `note` tells what was decided, where another decision was possible."""

    delimiter: str
    is_quoted: bool
    begins: int  # the line of its first row
    skips_blanks: bool
    note: str


def layout_of(path: Path, delimiter: str, columns: Columns) -> Layout:
    """How a table is written; `delimiter` is what its extension says.

    Raises DataError for UTF-16 without a byte order mark.
    """
    stat = path.stat()
    changed = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return _layout_of(path, delimiter, columns.quoting, changed)


@lru_cache(maxsize=256)
def _layout_of(path: Path, usual: str, quoting: str | None, changed: tuple[int, ...]) -> Layout:
    lines = ((n, line.rstrip("\r\n")) for n, line in enumerate(text_lines(path), 1))
    sample = [(n, line) for n, line in islice(lines, SAMPLE + 2) if line]
    if not sample:
        return Layout(delimiter=usual, is_quoted=True, begins=1, skips_blanks=False, note="")
    excel_line = re.fullmatch(r'"?sep=(.)"?', sample[0][1], re.IGNORECASE)
    if excel_line:
        del sample[0]
    begins, header = sample[0] if sample else (2, "")
    if "\0" in header:
        raise DataError(f"{path}:{begins}: bytes of 0 in the first line; save it as UTF-8")
    delimiter = excel_line[1] if excel_line else delimiter_of([line for _, line in sample], usual)
    notes = [] if delimiter == usual else [f"columns are separated by {delimiter!r}"]
    is_quoted = quoting != "none"
    if quoting is None and delimiter == "\t":
        evidence = evidence_of(path, begins, header, delimiter)
        is_quoted = evidence.is_quoted
        notes += [evidence.summary] if evidence.summary else []
    names = header.split(delimiter)[1:]
    return Layout(
        delimiter=delimiter,
        is_quoted=is_quoted,
        begins=begins,
        skips_blanks=bool(names) and all(name.startswith(" ") for name in names),
        note=f"{path}: {', '.join(notes)}" if notes else "",
    )


def delimiter_of(lines: Sequence[str], usual: str) -> str:
    """What separates the columns: whatever makes most of these lines as wide as the first."""

    def agreeing(delimiter: str) -> int:
        try:
            widths = [len(row) for row in csv.reader(sample, delimiter=delimiter)]
        except csv.Error:  # a field without end
            return 0
        return sum(width == widths[0] for width in widths) if widths and widths[0] > 1 else 0

    csv.field_size_limit(MAX_FIELD)
    sample = [line.replace("\r", " ") for line in lines]  # csv takes a bare one for a line's end
    return max((usual, *DELIMITERS), key=agreeing)


def evidence_of(path: Path, begins: int, header: str, delimiter: str) -> Evidence:
    """What the quotes of a whole file look like."""
    evidence = Evidence(header, delimiter)
    for line in islice(text_lines(path), begins - 1, None):
        evidence.add(line.rstrip("\r\n"))
    evidence.end()
    return evidence


def read_table(path: Path, delimiter: str, columns: Columns) -> Iterator[Located]:
    """The rows of a table; `delimiter` is what its extension says.

    Raises DataError where its header names a column twice or is no UTF-8.
    """
    layout = layout_of(path, delimiter, columns)
    lines = islice(text_lines(path), layout.begins - 1, None)
    rows = (quoted_rows if layout.is_quoted else plain_rows)(lines, layout)
    yield from without_halves(named_rows(path, rows, columns))


def plain_rows(lines: Iterable[str], layout: Layout) -> Iterator[Numbered]:
    """A row a line; quotes are text."""
    for number, line in enumerate(lines, start=layout.begins):
        yield number, line.rstrip("\r\n").split(layout.delimiter)


def quoted_rows(lines: Iterable[str], layout: Layout) -> Iterator[Numbered]:
    """Rows whose fields may stand in quotes, over several lines."""
    csv.field_size_limit(MAX_FIELD)
    reader = csv.reader(
        lines, delimiter=layout.delimiter, skipinitialspace=layout.skips_blanks, strict=True
    )
    was_broken = False
    while True:
        start = reader.line_num + layout.begins
        values: list[str] | RowError
        try:
            values = next(reader)
            if was_broken and any('"' in value for value in values):
                values = RowError("it may be the end of the broken row before it")
            was_broken = False
        except StopIteration:
            return
        except csv.Error as error:
            lost = reader.line_num + layout.begins - start
            values = RowError(f"broken CSV: {error}" + (f" ({lost} lines)" if lost > 1 else ""))
            was_broken = True
        yield start, values


def named_rows(path: Path, rows: Iterable[Numbered], columns: Columns) -> Iterator[Located]:
    """The rows behind the header under its names; rows without any text are passed over."""
    header: list[str] | None = None
    for number, values in rows:
        row_id = f"{path}:{number}"
        if isinstance(values, RowError):
            yield row_id, values
        elif not any(values):
            continue
        elif header is None:
            names = [name.strip() for name in values]
            if columns.names and not set(names) & columns.known:
                header = list(columns.names[: len(values)])
                yield row_id, row_of(header, values)
            else:
                header = checked_header(row_id, names)
        else:
            yield row_id, row_of(header, values)


def checked_header(row_id: str, names: list[str]) -> list[str]:
    """A header's names."""
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise DataError(
            f"{row_id}: the header has column {twice[0]!r} {names.count(twice[0])} times; give each a "
            "name of its own"
        )
    if not is_utf8(names):
        raise DataError(f"{row_id}: the header is no UTF-8; save the file as UTF-8")
    return names


def row_of(header: Sequence[str], values: Sequence[str]) -> RawRow | RowError:
    """A line's values under their names.

    A column without a name is an index where it is the first (pandas), otherwise it must be empty.
    """
    if len(values) != len(header):
        kind = ShortRow if len(values) < len(header) else RowError
        return kind(f"found {len(values)} fields, the header has {len(header)}")
    if not is_utf8(values):
        return RowError("bad UTF-8")
    pairs = list(zip(header, values, strict=True))
    for name, value in pairs[1:]:
        if value and not name:
            return RowError(f"found {value!r:.60} in a column without a name")
    return {name: value for name, value in pairs if name}


def is_utf8(texts: Collection[str]) -> bool:
    """Whether no bad bytes came through."""
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def without_halves(rows: Iterable[Located]) -> Iterator[Located]:
    """Takes the neighbours of short rows for malformed: a field that goes over several lines without
    quotes leaves a short row beside one that looks whole."""
    before: Located | None = None
    short = ""
    for row_id, row in rows:
        cause = f"{row_id}: {row}" if isinstance(row, ShortRow) else ""
        if before and cause and isinstance(before[1], dict):
            before = before[0], RowError(f"it may be half of a row, as its neighbour is: {cause}")
        if before:
            yield before
        if short and isinstance(row, dict):
            row = RowError(f"it may be half of a row, as its neighbour is: {short}")
        before, short = (row_id, row), cause
    if before:
        yield before
