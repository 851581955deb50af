"""File formats: records of local files, each with the place it stands at: jsonl, json, csv, tsv, parquet.

A record that cannot be read comes out as a RowError in its place, so that the caller decides
whether to stop or to go on.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from pemt.data.errors import DataError
from pemt.tasks import RowError

EXTENSIONS = ("jsonl", "json", "csv", "tsv", "parquet")
# Passages longer than csv's default limit of 128 KiB exist.
MAX_FIELD = 16 * 1024 * 1024

GAP = re.compile(r"[\s,:]*")
DECODER = json.JSONDecoder()

Record = dict[str, Any]
Located = tuple[str, Record | RowError]


def read_records(path: Path, *, tsv_columns: Sequence[str] = ()) -> Iterator[Located]:
    """The records of one file, by its extension; `.gz` behind it is unpacked on the way.

    Args:
        path: the file.
        tsv_columns: the columns of a tsv file that has no header line.

    Raises DataError where the file is missing, cannot be opened or has another extension.
    """
    name = path.name.removesuffix(".gz")
    extension = name.rpartition(".")[2]
    readers: dict[str, Callable[[Path], Iterator[Located]]] = {
        "jsonl": read_jsonl,
        "json": read_json,
        "csv": read_csv,
        "tsv": lambda path: read_tsv(path, tsv_columns),
        "parquet": read_parquet,
    }
    if extension not in readers:
        raise DataError(f"{path}: the extension is {extension!r}; allowed: {', '.join(readers)}")
    try:
        yield from readers[extension](path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked where it ends in .gz."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def lines_of(file: IO[bytes]) -> Iterator[tuple[int, str | RowError]]:
    """Numbered lines without their ends, a byte order mark left out; bad UTF-8 is a RowError."""
    for number, line in enumerate(file, start=1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        try:
            yield number, line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield number, RowError(f"bad UTF-8: {error.reason} at byte {error.start}")


def read_jsonl(path: Path) -> Iterator[Located]:
    """One object a line; blank lines are passed over."""
    with open_bytes(path) as file:
        yield from parsed_lines(str(path), lines_of(file))


def parsed_lines(name: str, lines: Iterable[tuple[int, str | RowError]]) -> Iterator[Located]:
    """The objects of numbered lines, each with its place in the file of that name."""
    for number, line in lines:
        place = f"{name}:{number}"
        if isinstance(line, RowError):
            yield place, line
        elif line.strip():
            yield place, parsed(line)


def parsed(line: str) -> Record | RowError:
    """The object of a line of JSON."""
    try:
        return checked(json.loads(line))
    except json.JSONDecodeError as error:
        return RowError(f"broken JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return unreadable(error)


def unreadable(error: ValueError | RecursionError) -> RowError:
    """JSON that Python does not take: an integer of thousands of digits, or thousands of brackets."""
    is_deep = isinstance(error, RecursionError)
    return RowError(f"JSON that is not read: {'nested too deep' if is_deep else error}")


def checked(value: Any) -> Record | RowError:
    """The value, if it is an object."""
    return value if isinstance(value, dict) else RowError(f"no JSON object: {value!r:.60}")


def read_json(path: Path) -> Iterator[Located]:
    """A list of objects, SQuAD's {"data": list}, {"0": object, ...}, or an object a line."""
    with open_bytes(path) as file:
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
        json.loads(text)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        yield f"{path}:{line}", RowError(f"bad UTF-8: {error.reason}")
        return
    except json.JSONDecodeError as error:
        # A second object behind the first: the file has one per line, whatever its name says.
        if error.msg == "Extra data" and error.lineno > 1:
            yield from read_jsonl(path)
        else:
            yield f"{path}:{error.lineno}", RowError(f"broken JSON: {error.msg}")
        return
    except (ValueError, RecursionError):
        pass  # the entry at fault comes out below
    line, last = 1, 0
    for number, (at, entry) in enumerate(entries_of(text), start=1):
        line, last = line + text.count("\n", last, at), at
        yield f"{path}:{line}: entry {number}", entry


def entries_of(text: str) -> list[tuple[int, Record | RowError]]:
    """The objects of well-formed JSON, each with the offset that it begins at.

    One that Python does not take is the last: where it ends is not known.
    """
    start = behind_gap(text, 0)
    # A list around it, so that a bare value is read like the others.
    found = list(members(text, start) if text[start] in "[{" else members(f"[{text}]", 0))
    data = next((at for key, at, _ in found if key == "data" and text[at] == "["), None)
    if data is not None:
        found = list(members(text, data))
    return [
        (at, value if isinstance(value, RowError) else checked(value)) for _, at, value in found
    ]


def members(text: str, at: int) -> Iterator[tuple[str, int, Any]]:
    """Key (empty in a list), offset and value of all that the list or object at an offset holds."""
    is_object = text[at] == "{"
    at = behind_gap(text, at + 1)
    while text[at : at + 1] not in ("", "]", "}"):
        key = ""
        try:
            if is_object:
                key, at = DECODER.raw_decode(text, at)
                at = behind_gap(text, at)
            value, end = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield key, at, unreadable(error)
            return
        yield key, at, value
        at = behind_gap(text, end)


def behind_gap(text: str, at: int) -> int:
    """The offset of what comes next behind blanks, commas and colons."""
    match = GAP.match(text, at)
    assert match is not None  # it may be empty
    return match.end()


def read_tsv(path: Path, columns: Sequence[str] = ()) -> Iterator[Located]:
    """Tab-separated without quoting, as GLUE's files are; `columns` where no header is found."""
    header: list[str] | None = None
    with open_bytes(path) as file:
        for number, line in lines_of(file):
            place = f"{path}:{number}"
            if isinstance(line, RowError):
                yield place, line
                continue
            if not line:
                continue
            values = line.split("\t")
            if header is None:
                header = list(columns) if columns and not set(values) & set(columns) else values
                if header is values:
                    continue
            yield place, row_of(header, values)


def read_csv(path: Path) -> Iterator[Located]:
    """Comma-separated with a header line and double quotes; a field may span lines."""
    csv.field_size_limit(MAX_FIELD)
    with open_bytes(path) as file:
        # Bad bytes come through as lone surrogates, so that the row they stand in can be named.
        text = (line.decode("utf-8", errors="surrogateescape") for line in file)
        reader = csv.reader(text, strict=True)
        header: list[str] | None = None
        while True:
            start = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"{path}:{start}", RowError(f"broken CSV: {error}")
                continue
            if header is None:
                header = [name.removeprefix("\ufeff") for name in values]
            elif values:
                yield f"{path}:{start}", row_of(header, values)


def row_of(header: Sequence[str], values: Sequence[str]) -> Record | RowError:
    """A line's values under their names."""
    if len(values) != len(header):
        return RowError(f"found {len(values)} fields, the header has {len(header)}")
    try:
        "".join(values).encode("utf-8")
    except UnicodeEncodeError:
        return RowError("bad UTF-8")
    return dict(zip(header, values, strict=True))


def read_parquet(path: Path) -> Iterator[Located]:
    """The rows of a parquet file, read in batches."""
    from pyarrow import parquet  # not above: the names of files are found without it

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except ValueError as error:  # pyarrow.ArrowInvalid
        raise DataError(f"{path}: no readable parquet file: {error}") from None
