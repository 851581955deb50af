"""File formats: records of local files, each with the place it stands at: jsonl, json, tables, parquet, arrow.

A record that cannot be read comes out as a RowError in its place, so that the caller decides
whether to stop or to continue.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from pemt.data.errors import DataError
from pemt.data.tables import Columns, Located, RawRow, layout_of, read_table
from pemt.data.text import open_bytes, text_lines
from pemt.tasks import RowError

EXTENSIONS = ("jsonl", "json", "csv", "tsv", "parquet", "arrow", "ndjson", "txt")
DELIMITERS = {"csv": ",", "tsv": "\t", "txt": "\t"}  # as the extension says

GAP = re.compile(r"[\s,:]*")


def once_each(pairs: list[tuple[str, Any]]) -> RawRow | RowError:
    """An object of JSON; one that has a key twice is malformed, as a table's header is."""
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        return RowError(f"duplicate key {twice!r} in one object")
    return record


DECODER = json.JSONDecoder(object_pairs_hook=once_each)


def read_records(path: Path, columns: Columns | None = None) -> Iterator[Located]:
    """The records of one file, by its extension; `.gz` behind it is unpacked on the way.

    Raises DataError where the file is missing, cannot be opened or has another extension.
    """
    extension = extension_of(path)
    readers = {"json": read_json, "parquet": read_parquet, "arrow": read_arrow}
    if extension not in EXTENSIONS:
        raise DataError(f"{path}: the extension is {extension!r}; allowed: {', '.join(EXTENSIONS)}")
    try:
        if is_table(path):
            yield from read_table(path, DELIMITERS[extension], columns or Columns())
        else:
            yield from readers.get(extension, read_jsonl)(path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def extension_of(path: Path) -> str:
    """A file's extension in small letters, without that of packing."""
    return path.name.lower().removesuffix(".gz").rpartition(".")[2]


def is_table(path: Path) -> bool:
    """Whether a file is read as a table: by its extension, and for .txt by whether it begins as JSON does."""
    extension = extension_of(path)
    if extension == "txt":
        first = next((line.strip() for line in text_lines(path) if line.strip()), "")
        return first != "[" and not first.startswith(("{", "[{"))
    return extension in DELIMITERS


def note_on(path: Path, columns: Columns) -> str:
    """What was decided on how to read a file; empty where there was nothing to decide.

    Raises DataError where it cannot be read.
    """
    try:
        if is_table(path):
            return layout_of(path, DELIMITERS[extension_of(path)], columns).note
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return ""


def lines_of(file: IO[bytes]) -> Iterator[tuple[int, str | RowError]]:
    """Numbered lines without their ends, a byte order mark left out; bad UTF-8 is a RowError."""
    for number, line in enumerate(file, start=1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        try:
            yield number, line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield number, RowError(f"bad UTF-8: {error.reason} at byte {error.start}")


def read_jsonl(path: Path) -> Iterator[Located]:
    """One object a line, blank lines are passed over; or one list, as pandas writes it."""
    with open_bytes(path) as file:
        first = next((line.strip() for line in file if line.strip()), b"")
    is_list = first == b"[" or first.startswith(b"[{")
    yield from read_json(path) if is_list else each_line(path)


def each_line(path: Path) -> Iterator[Located]:
    """One object a line."""
    with open_bytes(path) as file:
        yield from parsed_lines(str(path), lines_of(file))


def parsed_lines(name: str, lines: Iterable[tuple[int, str | RowError]]) -> Iterator[Located]:
    """The objects of numbered lines, each with its place in the file of that name."""
    for number, line in lines:
        row_id = f"{name}:{number}"
        if isinstance(line, RowError):
            yield row_id, line
        elif line.strip():
            yield row_id, parsed(line)


def parsed(line: str) -> RawRow | RowError:
    """The object of a line of JSON."""
    try:
        return checked(DECODER.decode(line))
    except json.JSONDecodeError as error:
        return RowError(f"broken JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return unreadable(error)


def unreadable(error: ValueError | RecursionError) -> RowError:
    """JSON that Python does not take: an integer of thousands of digits, or thousands of brackets."""
    is_deep = isinstance(error, RecursionError)
    return RowError(f"JSON that is not read: {'nested too deep' if is_deep else error}")


def checked(value: Any) -> RawRow | RowError:
    """The value, if it is an object."""
    is_known = isinstance(value, dict | RowError)
    return value if is_known else RowError(f"no JSON object: {value!r:.60}")


def read_json(path: Path) -> Iterator[Located]:
    """A list of objects, SQuAD's {"data": list}, {"0": object, ...}, columns, or an object a line."""
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
            yield from each_line(path)
        else:
            yield f"{path}:{error.lineno}", RowError(f"broken JSON: {error.msg}")
        return
    except (ValueError, RecursionError):
        pass  # the entry at fault comes out below
    line, last = 1, 0
    for number, (at, entry) in enumerate(entries_of(text), start=1):
        line, last = line + text.count("\n", last, at), at
        yield f"{path}:{line}: entry {number}", entry


def entries_of(text: str) -> list[tuple[int, RawRow | RowError]]:
    """The objects of well-formed JSON, each with the offset that it begins at.

    One that Python does not take is the last: where it ends is not known.
    """
    start = behind_gap(text, 0)
    # A list around it, so that a bare value is read like the others.
    found = list(members(text, start) if text[start] in "[{" else members(f"[{text}]", 0))
    data = next((at for key, at, _ in found if key == "data" and text[at] == "["), None)
    if data is not None:
        found = list(members(text, data))
    elif text[start] == "{" and (rows := rows_of_columns({key: each for key, _, each in found})):
        return [(start, row) for row in rows]
    return [(at, checked(value)) for _, at, value in found]


def rows_of_columns(columns: RawRow) -> list[RawRow]:
    """The rows of an object that holds columns, as lists (datasets) or as {"0": value, ...} (pandas).

    An object with plain values is one row. Any other has none.
    """
    values = list(columns.values())
    if not all(isinstance(each, list | dict) for each in values):
        return [] if any(isinstance(each, RowError) for each in values) else [columns]
    first = values[0] if values else {}
    if all(isinstance(each, list) and len(each) == len(first) for each in values):
        rows = zip(*values, strict=True)
    elif any(key.isdecimal() for key in columns) or not all(map(str.isdecimal, first)):
        return []
    elif all(isinstance(each, dict) and each.keys() == first.keys() for each in values):
        rows = zip(*(each.values() for each in values), strict=True)
    else:
        return []
    return [dict(zip(columns, row, strict=True)) for row in rows]


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


def read_parquet(path: Path) -> Iterator[Located]:
    """The rows of a parquet file, read in batches."""
    from pyarrow import parquet  # not above: the names of files are found without it

    try:
        with parquet.ParquetFile(path) as file:
            yield from rows_of_batches(path, file.schema_arrow, file.iter_batches(batch_size=1024))
    except ValueError as error:  # pyarrow.ArrowInvalid
        raise DataError(f"{path}: no readable parquet file: {error}") from None


def read_arrow(path: Path) -> Iterator[Located]:
    """The rows of a file that `datasets` saved to disk: a stream of arrow batches, or a file of them."""
    import pyarrow
    from pyarrow import ipc

    try:
        with pyarrow.memory_map(str(path)) as file:
            is_stream = file.read(6) != b"ARROW1"
            file.seek(0)
            if is_stream:
                reader = batches = ipc.open_stream(file)
            else:
                reader = ipc.open_file(file)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            yield from rows_of_batches(path, reader.schema, batches)
    except ValueError as error:  # pyarrow.ArrowInvalid
        raise DataError(f"{path}: no readable arrow file: {error}") from None


def rows_of_batches(path: Path, schema: Any, batches: Iterable[Any]) -> Iterator[Located]:
    """The rows of arrow batches, numbered from 1.

    Raises DataError where two columns have one name: a row would keep the last.
    """
    twice = [name for name, count in Counter(schema.names).items() if count > 1]
    if twice:
        raise DataError(f"{path}: duplicate column {twice[0]!r}; give each a name of its own")
    rows = chain.from_iterable(batch.to_pylist() for batch in batches)
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", row
